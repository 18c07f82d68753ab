"""The figures of a run while it goes: ``metrics.jsonl``, the trackers, and how fast it is."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

from clipkit.training.distributed import Distributed
from clipkit.training.run_folder import Run

__all__ = ["MetricsLog", "Pace", "memory_gib"]

Item = TypeVar("Item")


class Pace:
    """Samples per second and the share of time spent waiting for data, since they were asked for last."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._paused = 0.0
        self._samples = 0

    def next(self, batches: Iterator[Item]) -> Item:
        """The next batch; the time until it comes counts as waiting.

        Raises:
            StopIteration: where there is none.
        """
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def used(self, samples: int) -> None:
        """So many were trained on."""
        self._samples += samples

    def pause(self, seconds: float) -> None:
        """Time that is no training, such as validation."""
        self._paused += seconds

    def take(self) -> dict[str, float]:
        """``samples_per_second`` over all ranks and ``data_wait``, a share of the time; starts anew."""
        now = time.perf_counter()
        spent = max(now - self._began - self._paused, 1e-9)
        figures = {"samples_per_second": self._samples / spent, "data_wait": self._waited / spent}
        self._began, self._waited, self._paused, self._samples = now, 0.0, 0.0, 0
        return figures


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: of the GPU where it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts in KiB


class MetricsLog:
    """``metrics.jsonl``: one line of plain numbers per report; the trackers are told the same."""

    def __init__(self, run: Run, distributed: Distributed):
        self.run = run
        self.distributed = distributed

    def write(self, *, step: int, **figures: float | None) -> None:
        """Append a line; flushed, so that a plot can follow the run."""
        if self.distributed.is_main:
            with self.run.metrics_path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, **figures}) + "\n")
        self.distributed.log({name: value for name, value in figures.items() if value is not None}, step)
