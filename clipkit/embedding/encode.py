"""From samples to embeddings in memory: images decoded while the towers work, in batches that are stated."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Side,
    UnreadSample,
    cores,
    in_loader_processes,
    in_threads,
    processes_here,
    progress,
)
from clipkit.data.sources import Sample, Source
from clipkit.embedding.store import Embedded
from clipkit.embedding.update import Kept
from clipkit.images import Decoding, Shown, decoded, shown
from clipkit.models import DualEncoder, evaluating, in_blocks

__all__ = ["embed_source"]

GROUP, AHEAD = 16, 2  # rows that a process hands over at once, and groups ahead: 2.4 MB each at 224 px
MOST_WORKERS = 14
SHARED_MEMORY = Path("/dev/shm")  # through which groups come on Linux
WORTH_PROCESSES = 2000  # samples; starting processes takes as long as some hundred


def embed_source(
    source: Source,
    model: DualEncoder,
    *,
    sides: Sequence[Side] = ("image", "text"),
    rows: range | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    workers: int | None = None,
    show: str | None = "embed",
    kept: Mapping[int, Kept] | None = None,
    decoding: Decoding = "exact",
) -> Embedded:
    """Embed samples of a source, decoding in threads or processes while the towers work.

    Args:
        source: see `clipkit.data.sources.open_source`.
        model: in the precision that is wanted.
        sides: images, texts or both. A sample whose image is unusable is left out of both.
        rows: which samples; all of them when not given.
        batch_size: images at a time, those of so many rows: an image that cannot be used shifts no other into another
            batch. They are encoded in blocks of one height (see `DualEncoder.image_block`), so an image's embedding is
            the same whichever others are embedded with it.
        threads: that decode; 0 for none beside this one; when not given, as many as this process's share of the cores.
        workers: processes that decode in place of threads; 0 for none. When not given, none where that share is a few
            cores, or there are few samples, or they are fetched from elsewhere, or a GPU decodes; else one per core
            but two, as in one process Python lets threads compute one at a time between what the decoders do. Fewer
            where shared memory has no room for what they hand over.
        show: title of the progress bar; None for no bar.
        kept: what is known of rows from before, see `clipkit.embedding.update`: their images are not read, nor are they
            encoded, nor captions that there were before. The others of the rows go into batches together.
        decoding: of the images, see `clipkit.images.model_input`.
    """
    rows = range(len(source)) if rows is None else rows
    kept = {} if kept is None else kept
    found = Embedded(np.zeros(0), np.zeros(0), [], [], np.zeros(0, np.int64))
    image_of_text: list[int] = []
    known_texts: dict[int, np.ndarray] = {}
    block = model.image_block(batch_size)
    images = _Rows(
        model.embed_dim,
        lambda pixels: in_blocks(model.encode_image, _stacked(pixels, model.device), block).cpu().numpy(),
    )

    def load(i: int) -> _Loaded:
        before, pixels = kept.get(i), None
        if before is not None and before.reason is not None:
            return _Loaded(i, None, None, before.reason)
        try:
            sample = source[i] if "image" in sides and before is None else source.without_image(i)
            if "image" in sides and before is None:
                pixels = shown(sample.read(), model.preprocess, decoding)
        except BadSample as error:
            return _Loaded(i, None, None, str(error), isinstance(error, UnreadSample))
        if "image" not in sides and not sample.captions:
            return _Loaded(i, None, None, "the sample has no caption")
        return _Loaded(i, Sample(sample.key, None, sample.extension, sample.captions, sample.columns), pixels)

    own = max(1, cores() // processes_here())
    if workers is None:
        suits = threads is None and own > FEW_CORES and len(rows) >= WORTH_PROCESSES and not source.remote
        workers = min(own - 2, MOST_WORKERS) if suits else 0
    if decoding != "gpu" and (workers := min(workers, _most_workers(model, batch_size))):
        loaded = _in_groups(load, rows, workers)
    else:
        loaded = in_threads(load, rows, own if threads is None else threads, ahead=4 * batch_size)
    if decoding == "gpu":
        loaded = _decoded(loaded, model, batch_size)
    with torch.inference_mode(), evaluating(model):
        for row, sample, pixels, reason, unread in progress(loaded, show, len(rows), "samples") if show else loaded:
            before = kept.get(row)
            if sample is None:
                found.left_out.append({"row": row, "key": source.key(row), "reason": reason})
                found.unread += [row] if unread else []
            else:
                if "text" in sides:
                    for caption, vector in zip(sample.captions, _known(before, sample.captions), strict=True):
                        if vector is not None:
                            known_texts[len(found.captions)] = vector
                        image_of_text.append(len(found.samples))
                        found.captions.append(caption)
                found.samples.append(sample)
                found.rows.append(row)
                if pixels is not None:
                    images.add(pixels)
                elif before is not None and before.image is not None:
                    images.know(before.image)
            # Where most is known already, batches of the rows between would be small.
            full = images.waiting == batch_size if kept else (row + 1 - rows.start) % batch_size == 0
            if full or row == rows[-1]:
                images.flush()
        new = [at for at in range(len(found.captions)) if at not in known_texts]
        found.text = np.empty((len(found.captions), model.embed_dim), np.float32)
        found.text[new] = model.embed_texts([found.captions[at] for at in new], 4 * batch_size)
    for at, vector in known_texts.items():
        found.text[at] = vector
    found.image = images.joined()
    found.image_of_text = np.array(image_of_text, np.int64)
    return found


class _Loaded(NamedTuple):
    row: int
    sample: Sample | None
    pixels: Shown | None
    reason: str | None = None
    unread: bool = False


class _Groups(Dataset[Any]):
    """Loads rows in a process of its own, and gives their pixels as one tensor."""

    def __init__(self, load: Callable[[int], _Loaded]):
        self._load = load

    def __getitem__(self, rows: range) -> "tuple[list[_Loaded], torch.Tensor | tuple[bytes, list[int]]] | str":
        try:
            loaded = [self._load(row) for row in rows]
        except ClipkitError as error:  # torch would wrap it in its traceback
            return str(error)
        pixels = [each.pixels for each in loaded if each.pixels is not None]
        together = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)  # type: ignore[arg-type]
        place = iter(range(len(pixels)))
        told = [each if each.pixels is None else each._replace(pixels=next(place)) for each in loaded]  # type: ignore[arg-type]
        try:
            return told, together.share_memory_() if pixels else together
        except RuntimeError:
            # Others have taken the room meanwhile. In torch's own hands it would be lost, and waited for without end.
            return told, (together.numpy().tobytes(), list(together.shape))


def _most_workers(model: DualEncoder, batch_size: int) -> int:
    """How many processes' groups have room in shared memory, of which Docker gives 64 MB when it is not asked.

    A group that has none, as others have taken it meanwhile, comes through a pipe, which takes longer.
    """
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:  # other systems have no such bound
        return MOST_WORKERS
    height, width = model.preprocess.size
    group = GROUP * 3 * height * width
    waiting = (batch_size // GROUP + 2) * group  # in the batch that is being gathered
    room = 0.9 * about.f_bavail * about.f_frsize / processes_here() - waiting
    return max(0, int(room // (AHEAD * group)))


def _in_groups(load: Callable[[int], _Loaded], rows: range, workers: int) -> Iterator[_Loaded]:
    """As `in_threads` does, in forked processes, with which `load` and all that it refers to is shared."""
    groups = [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]
    for group in in_loader_processes(_Groups(load), groups, workers, ahead=AHEAD, start="fork"):
        if isinstance(group, str):
            raise ClipkitError(group)
        loaded, pixels = group
        together = np.frombuffer(pixels[0], np.uint8).reshape(pixels[1]) if isinstance(pixels, list) else pixels.numpy()
        for each in loaded:
            yield each if each.pixels is None else each._replace(pixels=together[each.pixels])


def _decoded(loaded: Iterator[_Loaded], model: DualEncoder, batch_size: int) -> Iterator[_Loaded]:
    """The same, with the pixels of what waited for the device."""
    while group := list(islice(loaded, batch_size)):
        found = decoded([each.pixels for each in group], model.preprocess, model.device)
        for each, pixels in zip(group, found, strict=True):
            if isinstance(pixels, BadSample):
                yield _Loaded(each.row, None, None, str(pixels))
            else:
                yield each._replace(pixels=pixels)


def _known(before: Kept | None, captions: Sequence[str]) -> list[np.ndarray | None]:
    return [None] * len(captions) if before is None else before.known(captions)


def _stacked(pixels: list[Any], device: torch.device) -> torch.Tensor:
    if all(isinstance(each, np.ndarray) for each in pixels):
        return torch.from_numpy(np.stack(pixels)).to(device)
    return torch.stack([torch.as_tensor(each).to(device) for each in pixels])  # some were decoded there


class _Rows:
    """Embeddings of one side in order: a batch at a time, or known already."""

    def __init__(self, dim: int, encode: Callable[[list[Any]], np.ndarray]):
        self._encode = encode
        self._items: list[Any] = []
        self._blocks = [np.zeros((0, dim), np.float32)]
        self._known: list[np.ndarray] = []
        self._places: tuple[list[int], list[int]] = ([], [])
        self._count = 0

    @property
    def waiting(self) -> int:
        return len(self._items)

    def add(self, item: Any) -> None:
        self._items.append(item)
        self._places[0].append(self._count)
        self._count += 1

    def know(self, vector: np.ndarray) -> None:
        self._known.append(vector)
        self._places[1].append(self._count)
        self._count += 1

    def flush(self) -> None:
        if self._items:
            self._blocks.append(self._encode(self._items))
            self._items = []

    def joined(self) -> np.ndarray:
        new = np.concatenate(self._blocks)
        if not self._known:
            return new
        found = np.empty((self._count, new.shape[1]), np.float32)
        found[self._places[0]], found[self._places[1]] = new, np.stack(self._known)
        return found
