"""This process among its siblings, and what becomes of the memory that it frees.

glibc returns large blocks and the free end of its heap at once, and the next step then faults them in again page by
page: 25,000 to 70,000 faults a step for a pair of 14 M parameters, 5 to 10 per cent of its time on a CPU. Small blocks
it keeps, though, and a stage that frees a hundred thousand of them takes no less memory than before.
"""

import contextlib
import ctypes
import os
import signal
import sys

__all__ = ["end_with_parent", "give_back_freed_memory", "keep_freed_memory", "launched", "local_rank", "processes_here"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_THRESHOLD = 1 << 30  # they are C ints


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees; its size no longer falls after a peak. Only glibc can do so.

    Returns:
        Whether it is so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, LARGEST_THRESHOLD))


def give_back_freed_memory() -> None:
    """Return to the system what has been freed, as far as the C library can; takes a millisecond or some."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def launched() -> bool:
    """Whether this process is one of several that something started together."""
    return "RANK" in os.environ


def local_rank() -> int | None:
    """This process's number among those that were started together on this machine (torchrun, accelerate, Slurm)."""
    values = (os.environ.get(name, "") for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return next((int(number) for number in values if number.isdigit()), None)


def processes_here() -> int:
    """How many torchrun or accelerate started on this machine. Slurm gives each of its own cores of its own."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(count)) if count.isdigit() else 1


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have this process be sent a signal when the thread that started it is gone, be it killed; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG, linux/prctl.h
