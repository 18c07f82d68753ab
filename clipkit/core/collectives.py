"""What ranks tell each other outside of training: values gathered, and failures that all of them raise."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from clipkit.core.errors import ClipkitError

__all__ = ["Gather", "gather_objects", "gathering", "on_each", "process_group", "together"]

Value = TypeVar("Value")
Gather = Callable[[Any], list[Any]]
"""Called on every rank with a value of its own, gives all ranks' values in rank order."""
GROUP_TIMEOUT = timedelta(days=7)  # a rank may wait for what the first does alone; one that dies is told by torchrun


def gather_objects(value: Any) -> list[Any]:
    """What each rank of the process group gives, in rank order; what stands in for it where there is no group: itself.

    Values are pickled; with NCCL they pass through the GPU.
    """
    dist = sys.modules.get("torch.distributed")  # who has no group need not import it
    if dist is None or not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gathering(world_size: int, gather: Gather | None = None) -> Gather:
    """What brings the ranks' parts together: what is given, else `gather_objects` where there are several."""
    return gather or (gather_objects if world_size > 1 else lambda value: [value])


def together(work: Callable[[], Value], gather: Gather) -> list[Value]:
    """What the work gives on each rank. Where one fails, all raise its error, so that none waits in vain."""
    value, failure = None, None
    try:
        value = work()
    except ClipkitError as error:
        failure = error
    gathered = gather((value, failure and str(failure)))
    for _, reason in gathered:
        if reason is not None:
            raise ClipkitError(reason) from failure
    return [value for value, _ in gathered]


def on_each(work: Callable[[], Value], gather: Gather) -> Value:
    """What the work gives on this rank, where it stays; where it fails on one, all raise its error.

    Whatever a rank may fail at by itself belongs in here: ranks that went on from different places would gather what
    does not belong together.
    """
    own: list[Value] = []
    together(lambda: own.append(work()), gather)
    return own[0]


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started, for what a command computes: gives rank and number of ranks.

    Over gloo, as embeddings are gathered in main memory whatever the towers run on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)  # half an hour when nothing is said
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
