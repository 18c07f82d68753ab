"""The device that a process computes on, and what it is fast at."""

import functools

import torch

from clipkit.core.errors import ClipkitError
from clipkit.core.process import local_rank

__all__ = ["fast_bf16", "pick_device", "settled_precision"]


@functools.cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products; a CPU without them takes some 50 times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def pick_device(name: str | None = None) -> torch.device:
    """The device of this name; when not given, a GPU, else Apple's, else the CPU.

    Processes that were started together take a GPU each, in turn where there are fewer of these.

    Raises:
        ClipkitError: where there is no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            number = local_rank()
            return torch.device("cuda") if number is None else torch.device("cuda", number % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ClipkitError(f"no device {name!r}: {' '.join(str(error).split())[:120]}") from error
    return device


def settled_precision(precision: str, device: torch.device) -> str:
    """``bf16`` or ``fp32``: what a precision (see `cast_for_inference`) means on a device."""
    return precision if precision != "auto" else "bf16" if fast_bf16(device) else "fp32"
