"""What becomes of memory that was freed: kept for the next step, or given back to the system between stages.

glibc returns large blocks and the free end of its heap at once, and the next step then faults them in again page by
page: 25,000 to 70,000 faults a step for a pair of 14 M parameters, 5 to 10 per cent of its time on a CPU. Small blocks
it keeps, though, and a stage that frees a hundred thousand of them takes no less memory than before.
"""

import contextlib
import ctypes

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 1 << 30  # they are C ints


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees; its size no longer falls after a peak. Only glibc can do so.

    Returns:
        Whether it is so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))


def give_back_freed_memory() -> None:
    """Return to the system what has been freed, as far as the C library can; takes a millisecond or some."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
