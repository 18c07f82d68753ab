"""Start one process per device on this machine and stay with them, and stop politely when asked to.

torchrun does this too, and for many machines; but it turns every exit status into 1, and a run that was preempted says
with its status that it wants to be resumed. Signals are requests: whoever is asked to stop finishes the step, saves
and goes.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from clipkit.core.errors import ClipkitError
from clipkit.core.process import end_with_parent

__all__ = ["PREEMPTED", "SIGNALS", "StopRequest", "launch"]

PREEMPTED = 75
"""Exit status of a run that was asked to stop and has saved itself: EX_TEMPFAIL of sysexits.h, "temporary failure, try
again". A queue that starts a job again on this status, and only then, takes up a run exactly where it stood."""

GRACE = 30.0  # seconds that the others have to end by themselves when one process has failed


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


def _watch(started: list[subprocess.Popen[bytes]]) -> int:
    deadline, failed = None, None
    while any(process.poll() is None for process in started):
        # 1 is a run that is done, with failures that were listed.
        broken = [process.returncode for process in started if process.poll() not in (None, 0, 1, PREEMPTED)]
        if deadline is None and broken:
            deadline, failed = time.monotonic() + GRACE, broken[0]
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


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Of preemption and `kill`, of Ctrl-C, and of Slurm's ``--signal=USR1@120``."""


class StopRequest:
    """Catches `SIGNALS` for the length of a ``with`` block and remembers that one came.

    The loop looks at `requested` between steps. A second SIGINT raises KeyboardInterrupt at once: who presses Ctrl-C
    twice will not wait. Outside the main thread, where Python lets nobody catch signals, it never asks for anything.

    Attributes:
        requested: whether to stop.
        signal: the name of the signal that came first, such as ``SIGTERM``; None before.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal: str | None = None
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        # Nothing is printed here: a handler that interrupts a print may not print.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number).name
        self.requested = True
