"""Start one process per device on this machine and stay with them: ``clipkit train --gpus N``.

torchrun does this too, and for many machines; but it turns every exit status into 1, and a run that was preempted says
with its status that it wants to be resumed.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from clipkit.errors import ClipkitError

__all__ = ["end_with_parent", "launch", "launched", "local_rank", "processes_here"]

PATIENCE = 30.0  # seconds that the others have to end by themselves when one process has failed


def launched() -> bool:
    """Whether this process is one of several that something started together."""
    return "RANK" in os.environ


def local_rank() -> int | None:
    """This process's number among those that were started together on this machine (torchrun, accelerate, Slurm)."""
    told = (os.environ.get(name, "") for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return next((int(number) for number in told if number.isdigit()), None)


def processes_here() -> int:
    """How many torchrun or accelerate started on this machine. Slurm gives each of its own cores of its own."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdigit() else 1


def launch(program: str, args: Sequence[str], processes: int, *, gpus: bool) -> int:
    """Run ``python PROGRAM ARGS`` in several processes that find each other; returns the worst of their exit statuses.

    Signals to stop are passed on; when one process fails the others are ended.

    Args:
        program: the job's file.
        args: its command line.
        processes: how many.
        gpus: each has a GPU of its own; else all of them compute on the CPU.

    Raises:
        ClipkitError: where there are fewer GPUs.
    """
    if gpus:
        import torch

        there = torch.cuda.device_count()
        if there < processes:
            raise ClipkitError(f"--gpus {processes}: this machine has {there}; for CPU processes say --processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared["LOCAL_WORLD_SIZE"] = str(processes)
    if not gpus:
        # Each process would take all cores for itself.
        threads = max(1, (os.cpu_count() or 1) // processes)
        shared |= {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    started = [
        subprocess.Popen(
            [sys.executable, program, *args],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            # Ctrl-C reaches every process of a terminal's group: once from there and once from here would be twice.
            process_group=0,
            preexec_fn=end_with_parent,
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _watch(started)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have this process be sent a signal when the thread that started it is gone, be it killed; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG, linux/prctl.h


def _watch(started: list[subprocess.Popen[bytes]]) -> int:
    deadline, failed = None, None
    while any(process.poll() is None for process in started):
        # 1 is a run that is done, 75 one that stops in good order: both end by themselves.
        broken = [process.returncode for process in started if process.poll() not in (None, 0, 1, 75)]
        if deadline is None and broken:
            deadline, failed = time.monotonic() + PATIENCE, broken[0]
            for process in started:
                if process.poll() is None:
                    process.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.1)
    statuses = [process.returncode for process in started]
    # The one that failed first matters more than those that were ended because of it. A process that was killed has the
    # signal's number, negative.
    worst = max(statuses, key=abs) if failed is None else failed
    return 128 - worst if worst < 0 else worst
