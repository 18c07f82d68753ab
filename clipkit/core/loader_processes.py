"""What processes make in order, ahead of its use: torch's own loader processes, whose failures are told in a line."""

import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from clipkit.core.errors import ClipkitError
from clipkit.core.parallel import stay
from clipkit.core.process import end_with_parent

__all__ = ["LoaderOptions", "in_loader_processes"]


class _HeldBack:
    """torch's answer to a child's end, which raises the death of a loader process, kept until an item is waited for.

    A signal's handler runs wherever the main thread is just then: in a step, in the midst of a checkpoint, or while
    the processes are being ended, where nobody takes the error for what it is.
    """

    def __init__(self) -> None:
        self._answer: Any = None
        self._waiting = self._missed = False

    def take_over(self) -> None:
        """Stand where torch's handler stands, if it is there; from other threads there is none."""
        if threading.current_thread() is not threading.main_thread():
            return
        found = signal.getsignal(signal.SIGCHLD)
        if getattr(found, "__module__", None) == "torch.utils.data._utils.signal_handling":
            self._answer = found
            signal.signal(signal.SIGCHLD, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._answer(number, frame)
        else:
            self._missed = True

    def next(self, items: Iterator[Any]) -> Any:
        """The next item; here, and only here, a process that died meanwhile is told."""
        if threading.current_thread() is not threading.main_thread():
            return next(items)
        self._waiting = True
        try:
            if self._missed:
                self._missed = False
                self._answer(signal.SIGCHLD, None)
            return next(items)
        finally:
            self._waiting = False


_HELD_BACK = _HeldBack()  # one for all: a process has one handler


@dataclass(frozen=True)
class LoaderOptions:
    """How loader processes work."""

    ahead: int
    """How much each of them makes ahead."""
    timeout: float = 0.0
    """Seconds that one item may take; 0 for as long as it wants."""
    pin_memory: bool = False
    """For copies to a GPU that do not wait."""
    seed: int = 0
    """Of the processes' own generators."""
    start: str | None = None
    """How processes are started, see `multiprocessing.get_context`; as this platform does when not given."""


def in_loader_processes(
    made: Dataset[Any], wanted: Iterable[Any], workers: int, options: LoaderOptions
) -> Iterator[Any]:
    """``made[each]`` for each that is wanted, in order. Tensors come through shared memory.

    Args:
        made: makes them, in processes that share what it refers to.
        wanted: what to ask it for.
        workers: how many processes.
        options: how they work.

    Raises:
        ClipkitError: where a process is killed, or takes too long.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores is the user's choice
        loader: DataLoader[Any] = DataLoader(
            made,
            batch_size=None,
            sampler=wanted,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=options.ahead,
            pin_memory=options.pin_memory,
            worker_init_fn=_begin,
            timeout=options.timeout,
            multiprocessing_context=options.start,
            # Of its own: an iterator draws a seed, and from the global generator that would shift the model's dropout.
            generator=torch.Generator().manual_seed(options.seed),
        )
        given = iter(loader)
    _HELD_BACK.take_over()
    try:
        while True:
            try:
                item = _HELD_BACK.next(given)
            except StopIteration:
                return
            yield item
    except (RuntimeError, OSError, EOFError) as error:
        # What was raised within a process comes as it was, with its traceback in its words.
        if str(error).startswith("Caught ") or (isinstance(error, RuntimeError) and "DataLoader" not in str(error)):
            raise
        # Killed from outside, mostly for memory. torch's own message runs over several lines; a process that is killed
        # while it hands something over is a broken connection.
        raise ClipkitError(f"a loader process is gone or stuck: {' '.join(str(error).split())[:300]}") from error
    finally:
        # An error's traceback refers to them as long as it is kept, and at exit they would be waited for: they `stay`.
        given._shutdown_workers()


def _begin(number: int) -> None:
    stay(number)
    # torch has them look for their parent, but one that is handing something over looks no more: nobody empties the
    # pipe, all of them keep it open, and with it their memory and what they hold of the parent's locks.
    end_with_parent(signal.SIGKILL)
