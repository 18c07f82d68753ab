"""Run a function in two gloo processes on the CPU."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, function: Callable[[int, int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(function(rank, 2), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_two_ranks(function: Callable[[int, int], Any]) -> list[Any]:
    """Call ``function(rank, 2)`` in both processes; returns what each gave."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, folder), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
