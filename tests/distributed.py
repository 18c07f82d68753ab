"""Run a function in two gloo processes on the CPU, or the command in processes that were started together."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.kills import command, ready_server


def _rank(rank: int, function: Callable[[int, int], Any], folder: str, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # the server has that of the test which needed it first
    os.environ.update({**environment, "MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"})
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(function(rank, 2), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_two_ranks(function: Callable[[int, int], Any]) -> list[Any]:
    """Call ``function(rank, 2)`` in both processes; returns what each gave."""
    ready_server()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (function, folder, dict(os.environ)), nprocs=2, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def run_together(
    *args: object, processes: int, first: Callable[[], None] | None = None
) -> list[tuple[str, int | None]]:
    """Run the command in each of them, as ``--processes`` starts them; returns what each said and its status.

    Args:
        args: the command's words.
        processes: how many; one is told of no others.
        first: is called in each of them before, with its environment.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        told |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(processes):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            environment = {**os.environ, **told, **of_rank}
            started.append(command(*args, said=f"{folder}/{rank}", environment=environment, first=first))
        for process in started:
            process.join()
        return [((Path(folder) / str(n)).read_text(), process.exitcode) for n, process in enumerate(started)]
