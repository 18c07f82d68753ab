"""What a device is fast at."""

import functools

import torch

__all__ = ["fast_bf16"]


@functools.cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products; a CPU without them takes some 50 times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return False
