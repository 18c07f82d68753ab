"""Training batches whose order is a pure function of (seed, position).

A run reads one endless sequence of samples: epoch after epoch, each a permutation of the set. Position `p` of the
sequence decides everything about what stands there: which sample, which of its captions, how it is augmented. Ranks
and workers only divide the positions, and a resumed run starts at another position of the same sequence.
"""

from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipkit.augment import augmented_pixels
from clipkit.config import AugmentConfig
from clipkit.errors import BadSample, ClipkitError
from clipkit.preprocess import Preprocess
from clipkit.shards import Shards, captions_of, image_extension
from clipkit.sources import sample_id
from clipkit.towers.dual_encoder import Tokenizer

__all__ = ["Batch", "TrainSet", "sample_at", "train_batches"]

MAX_REPLACEMENTS = 20


class Batch(TypedDict):
    """What the loader gives for one step of one rank."""

    pixels: Tensor  # uint8 [n, 3, height, width]
    tokens: Tensor  # int64 [n, context]
    image_ids: Tensor  # int64 [n], equal for equal samples
    text_ids: Tensor  # int64 [n], equal for equal captions
    left_out: list[dict[str, Any]]  # ledger lines of samples that could not be used and were replaced


class _Permutations:
    """The permutation of the epoch that was asked for last; making one costs 20 ms per million samples."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def at(self, position: int) -> int:
        epoch, within = divmod(position, self.size)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.size)
        return int(self._order[within])


def sample_at(position: int, size: int, seed: int) -> int:
    """The index of the sample at a position of the training sequence."""
    return _Permutations(size, seed).at(position)


class TrainSet(Dataset[dict[str, Any]]):
    """Item `p` is the sample at position `p` of the training sequence, decoded, augmented, with one caption."""

    def __init__(self, shards: Shards, preprocess: Preprocess, augment: AugmentConfig, seed: int):
        self.shards = shards
        self.preprocess = preprocess
        self.augment = augment
        self.seed = seed
        self._order = _Permutations(len(shards), seed)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self._order.at(position)
        left_out: list[dict[str, Any]] = []
        for attempt in range(MAX_REPLACEMENTS):
            # A generator per attempt, so that a replacement is as reproducible as the sample it stands for.
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt:
                index = int(rng.integers(len(self.shards)))
            try:
                return {**self._load(index, rng), "left_out": left_out}
            except ClipkitError as error:
                where = {"shard": self.shards.tar_of(index).name, "key": self.shards.key(index)}
                left_out.append({**where, "reason": str(error), "position": position})
        last = left_out[-1]
        # Returned, not raised: a worker process would wrap the message in its traceback.
        place = f"{last['key']!r} in {last['shard']}: {last['reason']}"
        return {"failed": f"{MAX_REPLACEMENTS} samples in a row cannot be used, the last {place}"}

    def _load(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        members = self.shards[index]
        captions, _ = captions_of(members)
        extension = image_extension(members)
        if extension is None:
            raise BadSample("the sample has no image")
        if not captions:
            raise BadSample("the sample has no caption")
        caption = captions[int(rng.integers(len(captions)))]
        pixels = augmented_pixels(members[extension], self.preprocess, self.augment, rng)
        return {"pixels": pixels, "caption": caption, "image_id": sample_id(self.shards.key(index))}


class _Collate:
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items: list[dict[str, Any]]) -> Batch | str:
        for item in items:
            if "failed" in item:
                return item["failed"]
        captions = [item["caption"] for item in items]
        return Batch(
            pixels=torch.from_numpy(np.stack([item["pixels"] for item in items])),
            tokens=self.tokenizer(captions),
            image_ids=torch.tensor([item["image_id"] for item in items]),
            text_ids=torch.tensor([sample_id(caption.lower()) for caption in captions]),
            left_out=[line for item in items for line in item["left_out"]],
        )


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
    data: TrainSet,
    tokenizer: Tokenizer,
    *,
    first_step: int,
    steps: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of steps ``first_step … steps - 1`` for one rank.

    Raises:
        ClipkitError: where the batch cannot be divided evenly among the ranks, or no usable sample is found.
    """
    if batch_size % world_size:
        raise ClipkitError(f"batch_size {batch_size} cannot be divided among {world_size} ranks; make it a multiple")
    loader = DataLoader(
        data,
        batch_sampler=_Positions(first_step, steps, batch_size, rank, world_size),
        collate_fn=_Collate(tokenizer),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=bool(workers),
        pin_memory=pin_memory,
        # Of its own: an iterator draws a seed, and from the global generator that would shift the model's dropout.
        generator=torch.Generator().manual_seed(data.seed),
    )
    return _checked(loader)


def _checked(loader: DataLoader[Any]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, str):
            raise ClipkitError(batch)
        yield batch
