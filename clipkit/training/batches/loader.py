"""Training batches: what stands at the positions of a step, read, decoded and augmented by threads and processes.

Position `p` of the sequence (`clipkit.training.batches.dataset`) decides everything about what stands there: which
sample, which of its captions, how it is augmented, and what replaces it where it cannot be used. Ranks, processes and
threads only divide the positions, and a resumed run starts at another position of the same sequence. Nothing is waited
for without end: a sample that does not come within the timeout stops the run with the name of its shard.
"""

import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from clipkit.core import (
    FEW_CORES,
    BadSample,
    ClipkitError,
    LoaderOptions,
    Threads,
    cores,
    in_loader_processes,
    processes_here,
)
from clipkit.data.shards import Shards
from clipkit.data.sources import text_id
from clipkit.images import Augmentation, Encoded, Preprocess, Waiting, augmented_pixels, can_wait, decode_waiting
from clipkit.models import Tokenizer
from clipkit.storage import is_pipe
from clipkit.training.batches.dataset import MISSING_HINT, Incomplete, TrainData, TrainSet, pick
from clipkit.training.batches.pipe import StreamSet
from clipkit.training.settings import DataConfig

__all__ = ["Batch", "Batches", "describe", "open_train_data", "train_batches"]

MAX_REPLACEMENTS = 20
MOST_WORKERS = 8  # see `DataConfig.workers`
AHEAD = 3  # batches that are being made while one is used


class Batch(TypedDict):
    """What the loader gives for one step of one rank."""

    pixels: Tensor  # uint8 [n, 3, height, width]
    tokens: Tensor  # int64 [n, context]
    image_ids: Tensor  # int64 [n], equal for equal samples
    text_ids: Tensor  # int64 [n], equal for equal captions
    references: list[Any]  # what stands in each row, for `TrainData.name`
    left_out: list[dict[str, Any]]  # ledger lines of samples that could not be used and were replaced
    waiting: list[Waiting]  # images that `Batches.on_device` decodes; their rows of pixels are empty


def open_train_data(
    config: DataConfig, seed: int, *, excluded: list[list[int]] | None = None, is_main: bool = True
) -> TrainData:
    """Open what ``data.train`` names.

    Args:
        config: the settings; `parts` must not be empty.
        seed: chooses the order.
        excluded: what a run that is resumed had left out of its plan.
        is_main: whether this rank keeps the ledger of what all ranks pass over.

    Raises:
        ClipkitError: where shards are missing, or nothing in them can be used.
    """
    specs = [part.shards for part in config.parts]
    if excluded is not None and len(excluded) not in (0, len(specs)):
        raise ClipkitError(
            f"data.train names {len(specs)} sets of shards, the run was trained on {len(excluded)}; use --init-from"
        )
    if any(is_pipe(spec) for spec in specs):
        if len(specs) > 1 or config.replacement:
            raise ClipkitError(
                f"{specs[0]}: a pipe is read in order and cannot be mixed or drawn from; fetch it to shards first"
            )
        return StreamSet(
            specs[0], seed, window=config.window, missing=config.missing, timeout=config.timeout, is_main=is_main
        )
    shards = [Shards.open(spec, int(config.cache_gib * 2**30)) for spec in specs]
    return TrainSet(shards, config, seed, excluded)


def describe(data: TrainData, samples: int) -> str:
    """What a run of so many samples reads and how it is shuffled, in a few words for a person."""
    if data.size is None:
        order = f"shuffled in blocks of {data.window:,}" if data.window else "in its own order"
        return f"a stream {order} (each rank reads all of it, a resumed run passes over what was used)"
    if data.replacement:
        return f"{samples:,} draws from {data.size:,} samples"
    epochs, rest = divmod(samples, data.size)
    length = f"{epochs:,} epochs" + (f" and {rest:,} samples" if rest else "")
    shuffled = f" shuffled in windows of {data.window:,}" if data.window else ""
    return f"{data.size:,} samples{shuffled}, {length} of them"


class Batches(Dataset["Batch | str"]):
    """Makes the batch that stands at some positions of the sequence.

    Args:
        data: the sequence.
        preprocess: of the model.
        tokenizer: of the model.
        config: captions, augmentation, threads, timeout.
        seed: of all draws; with the position it decides everything.
        before: positions up to which images are prepared otherwise, in order, such as smaller at first.
    """

    def __init__(
        self,
        data: TrainData,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        config: DataConfig,
        seed: int,
        before: Sequence[tuple[int, Preprocess]] = (),
    ):
        self.data = data
        self.preprocess = preprocess
        self.before = before
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed
        # Ranks on one machine share its cores.
        own = max(1, cores() // processes_here())
        self.workers = min(MOST_WORKERS, own) if own > FEW_CORES else 0
        if config.workers is not None:
            self.workers = config.workers
        if data.size is None:
            self.workers = 0  # a stream has one reader per rank
        self.threads = config.threads or (1 if self.workers else own)
        self._pool: Threads | None = None
        self._owner = 0

    def __getitem__(self, positions: Sequence[int]) -> "Batch | str":
        try:
            return self.result(self.begin(positions))
        except ClipkitError as error:
            return str(error)

    def begin(self, positions: Sequence[int]) -> list[tuple[Any, "queue.SimpleQueue[Any]"]]:
        """Start on a batch; threads take its samples one by one."""
        if self._pool is None or self._owner != os.getpid():  # threads do not survive a fork
            self._pool, self._owner = Threads(self.threads), os.getpid()
        references = self.data.first(positions)
        submit, on_gpu = self._pool.submit, self.config.decode == "gpu"
        return [
            (reference, submit(lambda p=position, r=reference: self._one(p, r, on_gpu)))
            for position, reference in zip(positions, references, strict=True)
        ]

    def result(self, begun: list[tuple[Any, "queue.SimpleQueue[Any]"]]) -> "Batch | str":
        """Wait for a batch that was begun. Failures come as text: a worker process would wrap them in its traceback."""
        items = []
        for reference, answer in begun:
            try:
                item, error = answer.get(timeout=self.config.timeout)
            except queue.Empty:
                shard, key = self.data.name(reference)
                return (
                    f"{shard} has not given sample {key!r} for {self.config.timeout:g} s; look at its disk or network, "
                    "or raise data.timeout"
                )
            if isinstance(error, ClipkitError):
                return str(error)
            if error is not None:
                raise error
            items.append(item)
        captions = [item["caption"] for item in items]
        high, wide = items[0]["size"]
        empty = np.zeros((3, high, wide), np.uint8)
        return Batch(
            pixels=torch.from_numpy(np.stack([item.get("pixels", empty) for item in items])),
            tokens=self.tokenizer(captions),
            image_ids=torch.tensor([item["image_id"] for item in items]),
            text_ids=torch.tensor([text_id(caption) for caption in captions]),
            references=[item["reference"] for item in items],
            left_out=self.data.drain() + [line for item in items for line in item["left_out"]],
            waiting=[item["waiting"]._replace(row=row) for row, item in enumerate(items) if "waiting" in item],
        )

    def on_device(self, batch: Batch, device: torch.device) -> Tensor:
        """The pixels on the device, uint8 ``[n, 3, height, width]``. What waits undecoded is decoded there.

        An image that the GPU refuses is decoded here, and replaced as ever, in `batch` too, where that fails as well.
        """
        pixels = batch["pixels"].to(device, non_blocking=True)
        if not batch["waiting"]:
            return pixels

        def fall_back(waiting: Waiting) -> None:
            item = self._one(waiting.position, waiting.reference, on_gpu=False)
            row = waiting.row
            pixels[row] = torch.from_numpy(item["pixels"]).to(device)
            batch["tokens"][row] = self.tokenizer([item["caption"]])[0]
            batch["image_ids"][row], batch["text_ids"][row] = item["image_id"], text_id(item["caption"])
            batch["references"][row] = item["reference"]
            batch["left_out"].extend(item["left_out"])

        preprocess = self._preprocess_at(batch["waiting"][0].position)
        decode_waiting(pixels, batch["waiting"], preprocess, device, fall_back)
        return pixels

    def close(self) -> None:
        """Let the threads go; a batch that is begun later has new ones."""
        pool, self._pool = self._pool, None
        if pool is not None and self._owner == os.getpid():
            pool.end()

    def _preprocess_at(self, position: int) -> Preprocess:
        return next((preprocess for end, preprocess in self.before if position < end), self.preprocess)

    def _one(self, position: int, reference: Any, on_gpu: bool) -> dict[str, Any]:
        left_out: list[dict[str, Any]] = []
        preprocess = self._preprocess_at(position)
        for attempt in range(MAX_REPLACEMENTS):
            # A generator per attempt, so that a replacement is as reproducible as the sample it stands for.
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt:
                reference = self.data.other(reference, rng)
            try:
                image, caption = pick(self.data.read(reference), self.config, rng)
                about = {"caption": caption, "image_id": self.data.image_id(reference), "left_out": left_out}
                about |= {"reference": reference, "size": preprocess.size}
                return about | self._image(image, preprocess, rng, Waiting(0, position, reference) if on_gpu else None)
            except BadSample as error:
                # Of the sample itself. What cannot be read at all (a disk, a network) ends the run instead: the sample
                # may be good, and a run that is resumed loses nothing.
                shard, key = self.data.name(reference)
                if isinstance(error, Incomplete) and self.config.missing == "stop":
                    raise ClipkitError(f"{shard}: {key}: {error}; {MISSING_HINT}") from error
                left_out.append({"shard": shard, "key": key, "reason": str(error), "position": position})
        last = left_out[-1]
        place = f"{last['key']!r} in {last['shard']}: {last['reason']}"
        raise ClipkitError(f"{MAX_REPLACEMENTS} samples in a row cannot be used, the last {place}")

    def _image(
        self, data: bytes, preprocess: Preprocess, rng: np.random.Generator, waiting: Waiting | None
    ) -> dict[str, Any]:
        source = Encoded(data, preprocess.background)
        if waiting is not None and can_wait(data, source, preprocess):
            width, height = source.size
            drawn = Augmentation.draw(width, height, preprocess.size, self.config.augment, rng)
            return {"waiting": waiting._replace(data=data, drawn=drawn)}
        exact = self.config.decode == "exact"
        return {"pixels": augmented_pixels(source, preprocess, self.config.augment, rng, exact=exact)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


class _Positions(Sampler[list[int]]):
    """For each step from `first` on, the positions that belong to one rank."""

    def __init__(self, first: int, steps: int, batch_size: int, rank: int, world_size: int):
        self.first, self.steps = first, steps
        self.batch_size, self.share = batch_size, batch_size // world_size
        self.rank = rank

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            start = step * self.batch_size + self.rank * self.share
            yield list(range(start, start + self.share))


def train_batches(
    batches: Batches,
    *,
    first_step: int,
    steps: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of steps ``first_step … steps - 1`` for one rank, made ahead of their use.

    Args:
        batches: makes them, in `batches.workers` processes or in threads of this one.
        first_step: where to start.
        steps: where to stop.
        batch_size: of all ranks together.
        rank, world_size: whose part of each batch.
        pin_memory: for copies to a GPU that do not wait.

    Raises:
        ClipkitError: where the batch cannot be divided evenly among the ranks, no usable sample is found, or a shard
            does not answer.
    """
    if batch_size % world_size:
        raise ClipkitError(f"batch_size {batch_size} cannot be divided among {world_size} ranks; make it a multiple")
    positions = _Positions(first_step, steps, batch_size, rank, world_size)
    if batches.workers:
        return _checked(_from_processes(batches, positions, pin_memory))
    return _checked(_from_threads(batches, positions, pin_memory))


def _from_processes(batches: Batches, positions: _Positions, pin_memory: bool) -> Iterator["Batch | str"]:
    # A worker gives up by itself; this timeout is for one that cannot even do that.
    timeout = 2 * batches.config.timeout + 60
    options = LoaderOptions(AHEAD, timeout, pin_memory, batches.seed)
    return in_loader_processes(batches, positions, batches.workers, options)


def _from_threads(batches: Batches, positions: _Positions, pin_memory: bool) -> Iterator["Batch | str"]:
    done: queue.Queue[Any] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def offer(value: Any) -> None:
        while not stopped.is_set():
            try:
                done.put(value, timeout=0.2)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            begun: deque[Any] = deque()
            for wanted in positions:
                # Two at once, so that the threads have work while the last samples of a batch are awaited.
                begun.append(batches.begin(wanted))
                if len(begun) == 2:
                    offer(_pinned(batches.result(begun.popleft()), pin_memory))
                if stopped.is_set():
                    return
            while begun:
                offer(_pinned(batches.result(begun.popleft()), pin_memory))
            offer(None)
        except ClipkitError as error:
            offer(str(error))
        except BaseException as error:
            offer(error)

    maker = threading.Thread(target=make, daemon=True, name="clipkit-batches")

    def stop() -> None:
        stopped.set()
        batches.close()
        maker.join(2.0)

    # Daemon threads that are inside torch when the interpreter ends would abort the process.
    atexit.register(stop)
    maker.start()
    try:
        while (batch := done.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop()
        atexit.unregister(stop)


def _pinned(batch: "Batch | str", pin_memory: bool) -> "Batch | str":
    if pin_memory and not isinstance(batch, str):
        for name in ("pixels", "tokens", "image_ids", "text_ids"):
            batch[name] = batch[name].pin_memory()
    return batch


def _checked(batches: Iterator["Batch | str"]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, str):
            raise ClipkitError(batch)
        yield batch
