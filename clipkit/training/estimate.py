"""What a training run would take, before anything is spent: measured on a few of its own steps."""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipkit.training.batches import Batch, Batches
from clipkit.training.checkpoint import checkpoint_bytes
from clipkit.training.metrics_log import memory_gib
from clipkit.training.train_state import Learner

__all__ = ["plan_run"]

WARM_UP_STEPS, TIMED_STEPS = 2, 5


def plan_run(
    learner: Learner,
    stretches: list[tuple[int, int]],
    start: Callable[[int, int], tuple[Batches, Any]],
    gradient_of: Callable[[Batches, Batch, int], Any],
    out: Path,
) -> dict[str, Any]:
    """Figures of a run that has not begun, and what stands against it.

    Args:
        learner: as it would train; it is changed, and of no use afterwards.
        stretches: first and last step (exclusive) of each phase: they differ in cost.
        start: makes batches from a step to another (exclusive), and the batches.
        gradient_of: computes the gradient of a batch at a step.
        out: where the run would be written.

    Returns:
        Plain figures: parameters, bytes and GiB of this rank, seconds, and under ``problems`` a line for each thing
        that would not fit.
    """
    figures: dict[str, Any] = _size_figures(learner)
    problems: list[str] = []
    seconds = 0.0
    try:
        seconds = sum(
            (last - first) * _seconds_per_step(learner, first, start, gradient_of) for first, last in stretches
        )
    except torch.OutOfMemoryError:  # of what did fit nothing can be told
        problems.append(
            f"a batch of {learner.config.batch_size} does not fit into the memory of {figures['device']}; set "
            "micro_batch (the loss stays over the whole batch), towers.gradient_checkpointing=true, or sharding=full"
        )
    steps = stretches[-1][1] - stretches[0][0]
    samples = steps * learner.config.batch_size
    figures |= {"steps": steps, "samples": samples}
    if seconds:
        figures |= {"hours": seconds / 3600, "samples_per_second": samples / seconds}
        figures["seconds_per_step"] = seconds / steps
    disk_figures, disk_problems = _disk_figures(learner, out)
    return figures | _memory_figures(learner) | disk_figures | {"problems": problems + disk_problems}


def _size_figures(learner: Learner) -> dict[str, Any]:
    device, distributed = learner.distributed.device, learner.distributed
    return {
        "parameters": sum(p.numel() for p in learner.shape.parameters()),
        "trained_parameters": sum(t.numel() for _, t in learner.weights.named_parameters()),
        "ranks": distributed.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": distributed.precision,
    }


def _seconds_per_step(
    learner: Learner,
    first: int,
    start: Callable[[int, int], tuple[Batches, Any]],
    gradient_of: Callable[[Batches, Batch, int], Any],
) -> float:
    """The median of a few steps from `first` on, loading included, behind some to warm up."""
    spent = []
    maker, batches = start(first, first + WARM_UP_STEPS + TIMED_STEPS)
    began = time.perf_counter()
    for batch in batches:
        gradient_of(maker, batch, first)
        learner.step(0.0, first + 1)
        learner.scale()  # waits for the device
        spent.append(time.perf_counter() - began)
        began = time.perf_counter()
    return statistics.median(spent[WARM_UP_STEPS:])


def _memory_figures(learner: Learner) -> dict[str, float]:
    states = [s for optimizer in learner.optimizers for s in optimizer.state.values()]
    device = learner.distributed.device
    return {
        "weights_gib": _gib(tensor for _, tensor in learner.weights.named_tensors()),
        "optimizer_gib": _gib(t for s in states for t in s.values() if isinstance(t, torch.Tensor)),
        "average_gib": _gib(tensor for _, tensor in learner.weights.named_average() or []),
        "peak_memory_gib": memory_gib(device),
        "memory_gib": _memory(device),
    }


def _disk_figures(learner: Learner, out: Path) -> tuple[dict[str, float], list[str]]:
    """What the checkpoints take and what is free, and what is to be said where they do not fit."""
    each = checkpoint_bytes(learner.shape, learner.optimizers, average=learner.config.optim.ema is not None)
    # One is written before the oldest goes; the best one stays beside the last ones.
    kept = learner.config.checkpoint.keep + 1 + (learner.config.validation.best is not None)
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    figures = {
        "checkpoint_gib": each / 2**30,
        "checkpoints_gib": kept * each / 2**30,
        "disk_free_gib": free / 2**30,
    }
    if free >= kept * each:
        return figures, []
    return figures, [
        f"{folder} has {free / 2**30:.1f} GiB free, {kept} checkpoints take {kept * each / 2**30:.1f}; "
        "free some, or set checkpoint.keep"
    ]


def _gib(tensors: Any) -> float:
    # Of a divided tensor this rank holds its part.
    local = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local) / 2**30


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
