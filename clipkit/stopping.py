"""Signals as polite requests: whoever is asked to stop finishes the step, saves and goes."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["PREEMPTED", "SIGNALS", "StopRequest"]

PREEMPTED = 75
"""Exit status of a run that was asked to stop and has saved itself: EX_TEMPFAIL of sysexits.h, "temporary failure, try
again". A queue that starts a job again on this status, and only then, takes up a run exactly where it stood."""

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
