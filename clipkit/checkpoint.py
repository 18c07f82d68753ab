"""Checkpoints of a training run: complete or absent, and never a pickle.

``checkpoints/step-000420/`` holds ``model/`` (usable by itself), ``optimizer.safetensors``, ``rng-00.safetensors`` for
each rank, and ``state.json`` with the step and the data position. It is written aside and renamed into place.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from clipkit.artifact import MODEL_FOLDER, read_json, write_json
from clipkit.errors import ClipkitError
from clipkit.towers import DualEncoder

__all__ = ["checkpoints", "load_checkpoint", "publish", "save_rank", "save_shared", "scratch_folder"]

STEP = re.compile(r"step-(\d{6,})")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if STEP.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def scratch_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it is published; the same on every rank."""
    return run / "checkpoints" / f".step-{step:06d}"


def save_shared(scratch: Path, model: DualEncoder, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What is the same on all ranks: the model, the optimizer's state by parameter name, and `state`.

    Raises:
        ClipkitError: where it cannot be written.
    """
    try:
        if scratch.exists():
            shutil.rmtree(scratch)  # a kill in the middle of an earlier try
        model.save(scratch / MODEL_FOLDER)
        names = {id(p): name for name, p in model.named_parameters()}
        tensors = {
            f"{names[id(p)]}:{key}": value.detach().cpu().contiguous()
            for p, values in optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, scratch / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise ClipkitError(f"cannot write the checkpoint {scratch}: {error}; the one before it is kept") from error
    write_json(scratch / "state.json", state)


def save_rank(scratch: Path, rank: int) -> None:
    """What each rank has of its own: the states of its random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, scratch / f"rng-{rank:02d}.safetensors")


def publish(scratch: Path, keep: int) -> Path:
    """Move a fully written checkpoint to its name and remove all but the last `keep`."""
    final = scratch.with_name(scratch.name.removeprefix("."))
    if final.exists():
        shutil.rmtree(final)
    scratch.replace(final)
    for old in checkpoints(final.parent.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
    """Put back the optimizer's state and this rank's random generators; the model is loaded by `load_model`.

    Args:
        folder: a complete checkpoint.
        model: gives the parameters their names.
        optimizer: over this model's parameters, fresh.
        rank: whose generators to set. A rank that the saved run did not have keeps its own.

    Returns:
        The `state` that was saved.

    Raises:
        ClipkitError: where a file is missing, cut or altered.
    """
    path = folder / "optimizer.safetensors"
    try:
        tensors = load_file(path)
        rng = folder / f"rng-{rank:02d}.safetensors"
        states = load_file(rng) if rng.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise ClipkitError(f"{folder} is broken ({error}); remove it to resume from the one before") from error
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(":")
        if parameter not in parameters:
            raise ClipkitError(f"{path} has state for {parameter}, which the model lacks")
        owner = parameters[parameter]
        if tensor.shape == owner.shape:
            # In the parameter's own memory layout: the fused step walks both as flat memory.
            tensor = torch.empty_like(owner, dtype=tensor.dtype).copy_(tensor)
        optimizer.state[owner][key] = tensor.detach().to(owner.device)
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return read_json(folder / "state.json")
