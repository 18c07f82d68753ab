"""The order of training samples: pure functions of (seed, epoch, position), in numbers that any process can work out.

Nothing here is stepped through or remembered: where position 10⁹ of a run points to is found as fast as position 0. So
a resumed run needs no more than a number, and ranks and workers can divide the positions as they like.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from clipkit.core import ClipkitError

__all__ = ["Mixture", "Order", "permuted"]

FEISTEL_ROUNDS = 8
BLOCK = 4096  # positions over which a mixture keeps its weights exactly


def permuted(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Values of a pseudo-random permutation of ``0 … size - 1``, without making the whole of it.

    A Feistel network over the next power of four, walked until it lands below `size` (Black & Rogaway 2002, "Ciphers
    with arbitrary finite domains"; on average at most 4 walks). Memory does not grow with `size`, where a stored
    permutation takes 8 bytes per sample and process.

    Args:
        positions: int64, each in ``0 … size - 1``, any shape.
        size: how many there are.
        key: whole numbers that choose the permutation.

    Returns:
        int64 of the same shape.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = _round_keys(tuple(key))
    values = positions.astype(np.uint64)
    todo = np.ones(values.shape, bool)
    while todo.any():
        left, right = values[todo] >> shift, values[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        values[todo] = (left << shift) | right
        todo = values >= size
    return values.astype(np.int64)


@lru_cache(64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """The endless sequence over one set of shards: epoch after epoch, each a permutation of the samples.

    Args:
        sizes: samples in each shard.
        seed: chooses the permutations.
        window: None shuffles over all samples. A number shuffles the shards and then the samples of as many
            neighbouring shards as hold that many, so that only these have to be at hand at a time.
        replacement: draw each position by itself from all samples; there are no epochs then.
    """

    def __init__(
        self, sizes: Sequence[int] | np.ndarray, seed: int, *, window: int | None = None, replacement: bool = False
    ):
        self.sizes = np.asarray(sizes, np.int64)
        self.size = int(self.sizes.sum())
        self.seed = seed
        self.window = window
        self.replacement = replacement
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._laid_out: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Indices of the samples at these positions; int64 of the same length."""
        at = np.asarray(positions, np.int64)
        if self.replacement:
            draws = [np.random.default_rng([self.seed, 1, int(p)]).integers(self.size) for p in at]
            return np.array(draws, np.int64)
        found = np.empty_like(at)
        epochs, within = np.divmod(at, self.size)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._in_epoch(within[chosen], int(epoch))
        return found

    def _in_epoch(self, within: np.ndarray, epoch: int) -> np.ndarray:
        if self.window is None:
            return permuted(within, self.size, [self.seed, epoch])
        shards, shard_ends, windows = self._layout(epoch)
        number = np.searchsorted(windows, within, side="right")
        found = np.empty_like(within)
        for w in np.unique(number):
            chosen = number == w
            start = int(windows[w - 1]) if w else 0
            size = int(windows[w]) - start
            at = start + permuted(within[chosen] - start, size, [self.seed, epoch, int(w)])
            place = np.searchsorted(shard_ends, at, side="right")
            shard = shards[place]
            found[chosen] = self._starts[shard] + at - (shard_ends[place] - self.sizes[shard])
        return found

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards in reading order, the ends of their samples in it, and the ends of the windows."""
        if epoch not in self._laid_out:
            shards = permuted(np.arange(len(self.sizes)), len(self.sizes), [self.seed, epoch, 0, 0])
            ends = np.cumsum(self.sizes[shards])
            windows, filled = [], 0
            for end in ends:
                if end - filled >= (self.window or 1):
                    windows.append(int(end))
                    filled = int(end)
            if filled < self.size:
                windows.append(self.size)
            # Two epochs meet in a batch; older ones are not asked for again.
            self._laid_out = {e: laid for e, laid in self._laid_out.items() if e == epoch - 1}
            self._laid_out[epoch] = shards, ends, np.array(windows, np.int64)
        return self._laid_out[epoch]

    def another(self, position: int, rng: np.random.Generator) -> int:
        """The index of a sample drawn to stand in at a position: from all, or from the same window."""
        if self.window is None or self.replacement:
            return int(rng.integers(self.size))
        epoch, within = divmod(position, self.size)
        windows = self._layout(epoch)[2]
        number = int(np.searchsorted(windows, within, side="right"))
        start = int(windows[number - 1]) if number else 0
        return int(self.at([epoch * self.size + start + int(rng.integers(windows[number] - start))])[0])

    def shards_from(self, position: int) -> Iterator[int]:
        """Numbers of the shards in the order in which a windowed sequence needs them, without end."""
        epoch, within = divmod(position, self.size)
        while True:
            shards, ends, windows = self._layout(epoch)
            number = int(np.searchsorted(windows, within, side="right"))
            start = int(windows[number - 1]) if number else 0
            first = int(np.searchsorted(ends, start, side="right"))
            yield from (int(shard) for shard in shards[first:] if self.sizes[shard])
            epoch, within = epoch + 1, 0


class Mixture:
    """Which of several sequences each position takes its sample from, in given shares.

    The positions come in blocks of 4,096. In each block every sequence has its share to within one sample, and over
    many blocks exactly; inside a block they are shuffled.

    Args:
        weights: one per sequence, in any unit.
        seed: shuffles the blocks.

    Raises:
        ClipkitError: where a weight is not positive, or so small that its sequence would miss whole blocks.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        # As decimal fractions, so that the shares are exact at any position.
        exact = [Fraction(str(weight)) for weight in weights]
        if any(weight <= 0 for weight in exact):
            raise ClipkitError(f"the weights of data.train must be above 0; got {list(weights)}")
        total = sum(exact)
        if min(exact) * BLOCK < total:
            raise ClipkitError(f"a weight of data.train is below 1/{BLOCK} of their sum; got {list(weights)}")
        self.seed = seed
        self._upper = tuple(sum(exact[: i + 1], Fraction(0)) / total for i in range(len(exact)))

    def at(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the sequence that each position takes, and the position in that sequence; both int64."""
        at = np.asarray(positions, np.int64)
        which, local = np.empty_like(at), np.empty_like(at)
        blocks, within = np.divmod(at, BLOCK)
        for block in np.unique(blocks):
            owners, earlier = _block(self._upper, self.seed, int(block))
            chosen = blocks == block
            which[chosen] = owners[within[chosen]]
            local[chosen] = _before(self._upper, int(block))[which[chosen]] + earlier[within[chosen]]
        return which, local


def _before(upper: tuple[Fraction, ...], block: int) -> np.ndarray:
    """How many positions of each sequence stand before a block."""
    return np.diff(np.array([0, *(int(block * BLOCK * u) for u in upper)], np.int64))


@lru_cache(8)
def _block(upper: tuple[Fraction, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a block, its sequence and how many of that sequence stand before it in the block."""
    owners = np.repeat(np.arange(len(upper)), _before(upper, block + 1) - _before(upper, block))
    owners = owners[permuted(np.arange(BLOCK), BLOCK, [seed, block, 0, 0, 0])]
    earlier = np.empty(BLOCK, np.int64)
    for number in range(len(upper)):
        mine = owners == number
        earlier[mine] = np.arange(mine.sum())
    return owners, earlier
