"""Samples of a source with what a tower is shown of them, loaded by threads or processes ahead of the towers."""

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from clipkit.core import (
    FEW_CORES,
    BadSample,
    ClipkitError,
    LoaderOptions,
    UnreadSample,
    cores,
    in_loader_processes,
    in_threads,
    processes_here,
)
from clipkit.data.sources import Sample, Source
from clipkit.embedding.options import EncodeOptions
from clipkit.embedding.update import KnownSample
from clipkit.images import Shown, decoded, shown
from clipkit.models import DualEncoder

__all__ = ["Loaded", "load_samples"]

GROUP, GROUPS_AHEAD = 16, 2  # rows that a process hands over at once, and groups ahead: 2.4 MB each at 224 px
MOST_PROCESSES = 14
SHARED_MEMORY = Path("/dev/shm")  # through which groups come on Linux
WORTH_PROCESSES = 2000  # samples; starting processes takes as long as some hundred


class Loaded(NamedTuple):
    """A row of a source as it comes to the towers."""

    row: int
    sample: Sample | None
    """Without its image's bytes; None where it cannot be used."""
    pixels: Shown | None
    """None where its image is not to be encoded."""
    reason: str | None = None
    """Why it cannot be used."""
    unread: bool = False
    """Whether that may be otherwise another time."""


def load_samples(
    source: Source, model: DualEncoder, options: EncodeOptions, rows: range, known: Mapping[int, KnownSample]
) -> Iterator[Loaded]:
    """Rows of a source in order, each with the pixels that the model is to encode; see `EncodeOptions`.

    Args:
        source: see `clipkit.data.sources.open_source`.
        model: whose preprocessing images go through, and on whose device they are decoded where a GPU does that.
        options: how.
        rows: which.
        known: samples by row whose images are not read.
    """

    def load(row: int) -> Loaded:
        return _load(source, model, options, row, known.get(row))

    own = max(1, cores() // processes_here())
    workers = options.workers
    if workers is None:
        suits = options.threads is None and own > FEW_CORES and len(rows) >= WORTH_PROCESSES and not source.remote
        workers = min(own - 2, MOST_PROCESSES) if suits else 0
    if options.decoding == "gpu":
        workers = 0
    if workers := min(workers, _most_workers(model, options.batch_size)):
        return _in_groups(load, rows, workers)
    threads = own if options.threads is None else options.threads
    loaded = in_threads(load, rows, threads, ahead=4 * options.batch_size)
    return _decoded(loaded, model, options.batch_size) if options.decoding == "gpu" else loaded


def _load(source: Source, model: DualEncoder, options: EncodeOptions, row: int, known: KnownSample | None) -> Loaded:
    if known is not None and known.reason is not None:
        return Loaded(row, None, None, known.reason)
    pixels, new_image = None, "image" in options.sides and known is None
    try:
        sample = source[row] if new_image else source.without_image(row)
        if new_image:
            pixels = shown(sample.read(), model.preprocess, options.decoding)
    except BadSample as error:
        return Loaded(row, None, None, str(error), isinstance(error, UnreadSample))
    if "image" not in options.sides and not sample.captions:
        return Loaded(row, None, None, "the sample has no caption")
    return Loaded(row, Sample(sample.key, None, sample.extension, sample.captions, sample.columns), pixels)


class _Groups(Dataset[Any]):
    """Loads rows in a process of its own, and gives their pixels as one tensor."""

    def __init__(self, load: Callable[[int], Loaded]):
        self._load = load

    def __getitem__(self, rows: range) -> "tuple[list[Loaded], torch.Tensor | tuple[bytes, list[int]]] | str":
        try:
            loaded = [self._load(row) for row in rows]
        except ClipkitError as error:  # torch would wrap it in its traceback
            return str(error)
        pixels = [each.pixels for each in loaded if each.pixels is not None]
        together = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)  # type: ignore[arg-type]
        place = iter(range(len(pixels)))
        placed = [each if each.pixels is None else each._replace(pixels=next(place)) for each in loaded]  # type: ignore[arg-type]
        try:
            return placed, together.share_memory_() if pixels else together
        except RuntimeError:
            # Others have taken the room meanwhile. In torch's own hands it would be lost, and waited for without end.
            return placed, (together.numpy().tobytes(), list(together.shape))


def _most_workers(model: DualEncoder, batch_size: int) -> int:
    """How many processes' groups have room in shared memory, of which Docker gives 64 MB when it is not asked.

    A group that has none, as others have taken it meanwhile, comes through a pipe, which takes longer.
    """
    try:
        memory = os.statvfs(SHARED_MEMORY)
    except OSError:  # other systems have no such bound
        return MOST_PROCESSES
    height, width = model.preprocess.size
    group = GROUP * 3 * height * width
    waiting = (batch_size // GROUP + 2) * group  # in the batch that is being gathered
    room = 0.9 * memory.f_bavail * memory.f_frsize / processes_here() - waiting
    return max(0, int(room // (GROUPS_AHEAD * group)))


def _in_groups(load: Callable[[int], Loaded], rows: range, workers: int) -> Iterator[Loaded]:
    """As `in_threads` does, in forked processes, with which `load` and all that it refers to is shared."""
    groups = [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]
    for group in in_loader_processes(_Groups(load), groups, workers, LoaderOptions(GROUPS_AHEAD, start="fork")):
        if isinstance(group, str):
            raise ClipkitError(group)
        loaded, pixels = group
        together = np.frombuffer(pixels[0], np.uint8).reshape(pixels[1]) if isinstance(pixels, list) else pixels.numpy()
        for each in loaded:
            yield each if each.pixels is None else each._replace(pixels=together[each.pixels])


def _decoded(loaded: Iterator[Loaded], model: DualEncoder, batch_size: int) -> Iterator[Loaded]:
    """The same, with the pixels of what waited for the device."""
    while group := list(islice(loaded, batch_size)):
        for each, pixels in zip(
            group, decoded([each.pixels for each in group], model.preprocess, model.device), strict=True
        ):
            if isinstance(pixels, BadSample):
                yield Loaded(each.row, None, None, str(pixels))
            else:
                yield each._replace(pixels=pixels)
