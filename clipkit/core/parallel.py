"""Work done at once, in order where that matters: threads for what waits, processes for what computes in Python."""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from clipkit.core.errors import ClipkitError

__all__ = ["FEW_CORES", "Threads", "cores", "in_processes", "in_threads", "stay"]

FEW_CORES = 4  # that threads of one process still keep busy with images; beyond, they wait for each other

Item = TypeVar("Item")
Value = TypeVar("Value")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(load: Callable[[Item], Value], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Value]:
    """``load(item)`` of each, in order, at most `ahead` of them waiting, so that memory stays flat; 0 threads: here."""
    if not threads:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(threads, "load") as pool:
        todo = iter(items)
        waiting = deque(pool.submit(load, item) for item in islice(todo, ahead))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(load, item) for item in islice(todo, 1))
        finally:
            for future in waiting:
                future.cancel()


class Threads:
    """Daemon threads that work through a queue: unlike an executor's, one that is stuck does not hold up the exit."""

    def __init__(self, number: int):
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="clipkit-loader") for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (task := self._todo.get()) is not None:
            function, answer = task
            try:
                answer.put((function(), None))
            except BaseException as error:  # it belongs to whoever waits, not to this thread
                answer.put((None, error))

    def submit(self, function: Callable[[], Any]) -> "queue.SimpleQueue[Any]":
        """Have a function called; what it returns and the error that it raised come together, one of them None."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._todo.put((function, answer))
        return answer

    def end(self) -> None:
        """Drop what waits and let the threads go; one that is stuck is waited for no longer than a second."""
        with contextlib.suppress(queue.Empty):
            while (task := self._todo.get_nowait()) is not None:
                task[1].put((None, ClipkitError("the loader was closed")))
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join(1.0)


def in_processes(work: Callable[[Callable[[Any], None]], None], count: int) -> Iterator[Any]:
    """Run ``work(tell)`` in each of `count` forked processes and give what they tell, until all are done.

    They are forked, so that what `work` refers to is shared and not copied. They end with this process, be it killed.

    Raises:
        ClipkitError: the first that one of them raised; the others are ended then, and clean up after themselves.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, Any] = {}
    try:
        for _ in range(count):
            reader, writer = context.Pipe(duplex=False)
            running[reader] = context.Process(target=_run, args=(work, writer, os.getpid()), daemon=True)
            running[reader].start()
            writer.close()
        while running:
            for reader in wait(list(running)):
                try:
                    succeeded, value = reader.recv()  # type: ignore[union-attr]
                except EOFError:
                    _check(running.pop(reader))  # type: ignore[arg-type]
                    continue
                if not succeeded:
                    raise ClipkitError(value[0]) from RuntimeError(value[1])
                yield value
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(10.0)
            process.kill()


def _check(process: Any) -> None:
    process.join()
    if process.exitcode:
        ending = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"status {process.exitcode}"
        raise ClipkitError(
            f"a worker process ended with {ending}; the same command goes on, with --workers 1 it needs less"
        )


def _run(work: Callable[[Callable[[Any], None]], None], writer: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this one
    signal.signal(signal.SIGTERM, _leave)

    def tell(value: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)  # it was killed: what is left is done when the command is run again
        writer.send((True, value))

    try:
        work(tell)
    except Exception as error:
        message = str(error) if isinstance(error, ClipkitError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(BrokenPipeError):
            writer.send((False, (message, traceback.format_exc())))


def stay(_: int = 0) -> None:
    """Let signals to stop pass by: they reach the whole group, and the process that this one works for ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _leave(*_: Any) -> NoReturn:
    raise SystemExit(0)  # an exception, so that files half written are removed on the way out
