"""Where relevant items rank among all others: counted exactly, block by block, and what the counts are worth.

Scores are inner products of unit-norm vectors, exact on the grid of `clipkit.metrics.products`, so that no figure
depends on how the work is cut; such that differ by no more than 1e-6 are ties, as the towers' own rounding tells no
more. Ties are
resolved as if in random order, and the expected value is given: vectors that all coincide are worth exactly what
guessing would be.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipkit.core import ClipkitError
from clipkit.metrics.products import on_grid, paired_products

__all__ = [
    "TIE_WIDTH",
    "RankCounts",
    "VectorBlocks",
    "guessed",
    "mean",
    "median_rank",
    "median_rank_of",
    "rank_pairs",
    "recall_at_k",
    "reciprocal_rank",
    "refuse_bad_scores",
]

Array = np.ndarray
VectorBlocks = Float[Array, "_ _"] | Sequence[Float[Array, "_ _"]]
"""Floats ``[rows, dim]`` of any precision, in one array or in several that follow each other; memory-mapped or not."""
TIE_WIDTH = np.float32(1e-6)
BLOCK = 4096  # rows of the left at a time, and half as many of the right: 64 MiB of scores
STRIP = 128  # rows of scores that are counted at a time: 2 MiB stay in the cache. No more than a byte can count
HALF = 1e-9  # a share that lies no further from a half is one


def mean(values: Float[Array, " n"]) -> float:
    """The mean, which for equal values is that value to the last digit, as chance has it; NaN for none."""
    return float(values[0] + (values - values[0]).mean()) if len(values) else float("nan")


def refuse_bad_scores(scores: Float[Array, "n ..."]) -> None:
    """Refuse NaN and infinity, which every comparison would get wrong without a word.

    Raises:
        ClipkitError: with the first such row.
    """
    if not (whole := np.isfinite(scores).all(axis=tuple(range(1, scores.ndim)))).all():
        raise ClipkitError(f"the scores hold NaN or infinity, first in row {int(np.argmin(whole)):,}; leave it out")


class RankCounts(NamedTuple):
    """For each of n queries, how its relevant items stand among all items: three counts, int64 ``[n]``."""

    better: Int[Array, " n"]
    """Irrelevant items that score above the best relevant one."""
    tied: Int[Array, " n"]
    """Items with the score of the best relevant one, itself included."""
    relevant_tied: Int[Array, " n"]
    """How many of the tied are relevant; at least one."""


class _Rows:
    """VectorBlocks in parts that follow each other, read as float32 where they are asked for."""

    def __init__(self, vectors: VectorBlocks, name: str):
        self._parts = [vectors] if isinstance(vectors, np.ndarray) else list(vectors)
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self._name = name
        dims = {part.shape[1] for part in self._parts}
        if len(dims) > 1:
            raise ClipkitError(
                f"the {name} vectors have dimensions {' and '.join(map(str, sorted(dims)))}; they must agree"
            )
        self.dim = dims.pop() if dims else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def block(self, start: int, stop: int) -> Float[Array, "rows dim"]:
        """The rows from start to stop.

        Raises:
            ClipkitError: where one is not finite; every comparison would get it wrong without a word.
        """
        found = []
        # An index of which much was taken away has a part for each stretch that is left: not to be walked through.
        at = int(np.searchsorted(self._ends, start, side="right"))
        while at < len(self._parts) and (first := int(self._ends[at]) - len(self._parts[at])) < stop:
            found.append(self._parts[at][max(start - first, 0) : stop - first].astype(np.float32))
            at += 1
        block = found[0] if len(found) == 1 else np.concatenate(found)
        # The sum is finite wherever all numbers are, but for huge ones, and costs no array of booleans.
        with np.errstate(over="ignore", invalid="ignore"):
            suspect = not np.isfinite(block.sum())
        if suspect and not (whole := np.isfinite(block).all(axis=1)).all():
            raise ClipkitError(
                f"the {self._name} vectors hold NaN or infinity, first in row {start + int(np.argmin(whole)):,}; leave "
                "such rows out"
            )
        return block

    def take(self, rows: Int[Array, " n"]) -> Float[Array, "n dim"]:
        """Some rows, in this order; finite or not."""
        found = np.empty((len(rows), self.dim or 0), np.float32)
        part_of = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(part_of).tolist():
            here, part = part_of == number, self._parts[number]
            found[here] = part[rows[here] - (int(self._ends[number]) - len(part))]
        return found


def rank_pairs(
    left: VectorBlocks,
    right: VectorBlocks,
    right_of_left: Int[Array, " left"],
    *,
    names: tuple[str, str] = ("left", "right"),
    advance: Callable[[int], object] | None = None,
) -> tuple[RankCounts, RankCounts]:
    """Rank each left vector's own right one among all right ones, and the best own left one of each right among all.

    Captions are left and images right, or images left and classes right. Every score is computed once, for both
    directions, and none is kept: with b = 4,096 rows of the left and half as many of the right at a time the memory is
    ``4 b² + 32 b dim`` bytes (134 MB at 512 dimensions) and some 60 bytes per row of both sides, whatever their number.
    Where one is memory-mapped it is read once (left), or once for every b rows of the left (right).

    Args:
        left: unit-norm vectors ``[left, dim]``.
        right: unit-norm vectors ``[right, dim]``. One may own several left ones, or none.
        right_of_left: the row in `right` that each left vector belongs to.
        names: what messages call the vectors.
        advance: told how many more rows of the left have been compared with everything.

    Returns:
        Ranks of the left vectors, and of those right ones that own a left one, in their order.

    Raises:
        ClipkitError: where vectors are not finite or do not fit each other, or `right_of_left` names no row.
    """
    lefts, rights = _Rows(left, names[0]), _Rows(right, names[1])
    _check(lefts, rights, right_of_left, names)
    own = np.empty(len(lefts))
    for start, stop in _blocks(len(lefts)):
        others = rights.take(right_of_left[start:stop])
        own[start:stop] = paired_products(lefts.block(start, stop)[:, None], others[:, None])[:, 0, 0]
    best = np.full(len(rights), -np.inf)
    np.maximum.at(best, right_of_left, own)
    found = np.zeros((2, len(lefts)), np.int64), np.zeros((2, len(rights)), np.int64)
    height, width = min(BLOCK, len(lefts)), min(max(1, BLOCK // 2), len(rights))
    scores_at, above_at = np.empty(height * width), np.empty(min(STRIP, height) * width, bool)
    for start, stop in _blocks(len(lefts)):
        block, belongs = on_grid(lefts.block(start, stop)), right_of_left[start:stop]
        for first, last in _blocks(len(rights), max(1, BLOCK // 2)):
            scores = scores_at[: (stop - start) * (last - first)].reshape(stop - start, last - first)
            np.matmul(block, on_grid(rights.block(first, last)).T, out=scores)
            pairs = np.flatnonzero((first <= belongs) & (belongs < last))
            scores[pairs, belongs[pairs] - first] = -np.inf  # what is relevant has been counted with its own scores
            for top in range(0, len(scores), STRIP):
                strip, rows = scores[top : top + STRIP], slice(start + top, min(start + top + STRIP, stop))
                above = above_at[: strip.size].reshape(strip.shape)
                for at, edge in enumerate((TIE_WIDTH, -TIE_WIDTH)):
                    np.greater(strip, own[rows, None] + edge, out=above)
                    found[0][at, rows] += _per_row(above)
                    np.greater(strip, best[None, first:last] + edge, out=above)
                    found[1][at, first:last] += above.view(np.uint8).sum(axis=0, dtype=np.uint8)
        if advance is not None:
            advance(stop - start)
    tied = np.bincount(right_of_left, weights=own > best[right_of_left] - TIE_WIDTH, minlength=len(rights)).astype(
        np.int64
    )
    one, owns = np.ones(len(lefts), np.int64), tied > 0
    of_left, of_right = (
        RankCounts(better, up_to - better + relevant, relevant)
        for (better, up_to), relevant in ((found[0], one), (found[1][:, owns], tied[owns]))
    )
    return of_left, of_right


def _check(lefts: _Rows, rights: _Rows, right_of_left: Array, names: tuple[str, str]) -> None:
    if len(right_of_left) != len(lefts):
        raise ClipkitError(
            f"{len(lefts):,} {names[0]} vectors are told to belong to {len(right_of_left):,} {names[1]} vectors; name "
            "one for each"
        )
    if not len(lefts):
        return
    if right_of_left.min() < 0 or right_of_left.max() >= len(rights):
        wrong = int(np.argmax((right_of_left < 0) | (right_of_left >= len(rights))))
        raise ClipkitError(
            f"{names[0]} vector {wrong:,} belongs to {names[1]} row {int(right_of_left[wrong]):,}, and there are "
            f"{len(rights):,}, counted from 0"
        )
    if lefts.dim != rights.dim:
        raise ClipkitError(
            f"the {names[0]} vectors have dimension {lefts.dim}, the {names[1]} vectors {rights.dim}; embed both with "
            "one model"
        )


def _blocks(count: int, size: int | None = None) -> Iterator[tuple[int, int]]:
    size = BLOCK if size is None else size
    return ((start, min(start + size, count)) for start in range(0, count, size))


def _per_row(flags: Array) -> Array:
    # Row by row: with an axis, numpy makes 8 bytes of each boolean first.
    return np.fromiter((np.count_nonzero(row) for row in flags), np.int64, len(flags))


def guessed(items: Int[Array, " n"], relevant: Int[Array, " n"]) -> RankCounts:
    """The ranks of one who cannot tell any item from another, and so what guessing is worth.

    Args:
        items: how many there are for each query.
        relevant: how many of them are relevant; at least one.
    """
    return RankCounts(np.zeros(len(items), np.int64), items.astype(np.int64), relevant.astype(np.int64))


def recall_at_k(
    better: Int[Array, " n"],
    tied: Int[Array, " n"],
    relevant_tied: Int[Array, " n"],
    k: int | Int[Array, "lists 1"],
) -> Float[Array, "*lists n"]:
    """The chance that a relevant item is among the first k, when equal scores come in random order.

    Args:
        better, tied, relevant_tied: see `RankCounts`.
        k: length of the list; or several lengths.

    Returns:
        1 - C(tied - relevant_tied, s) / C(tied, s), where s = k - better places are left for the tied.
    """
    places = np.clip(k - better, 0, tied)
    result = np.where(places > 0, 1.0, 0.0)
    open_ = np.nonzero((places > 0) & (places <= tied - relevant_tied))
    if len(open_[0]):
        t, r, s = tied[open_[-1]], relevant_tied[open_[-1]], places[open_]
        # The quotient is symmetric in r and s, a product of as many factors as the smaller has.
        few, many = np.minimum(r, s), np.maximum(r, s)
        missed = np.ones(len(t))
        for j in range(int(few.max())):
            missed *= np.where(j < few, (t - many - j) / np.maximum(t - j, 1), 1.0)
        result[open_] = np.where(r == 1, s / t, 1.0 - missed)
    return result


def reciprocal_rank(
    better: Int[Array, " n"], tied: Int[Array, " n"], relevant_tied: Int[Array, " n"]
) -> Float[Array, " n"]:
    """1 over the rank, from 1, of the first relevant item (Voorhees 1999), in the mean over random orders of ties.

    Args:
        better, tied, relevant_tied: see `RankCounts`.
    """
    result = 1.0 / (better + 1)
    mixed = np.flatnonzero(tied > relevant_tied)
    if len(mixed):
        kinds, kind_of = np.unique(np.stack([better, tied, relevant_tied])[:, mixed], axis=1, return_inverse=True)
        result[mixed] = np.array([_mean_reciprocal(*kind) for kind in kinds.T.tolist()])[kind_of.ravel()]
    return result


def _mean_reciprocal(better: int, tied: int, relevant: int) -> float:
    # The first relevant one of the tied comes first with the chance r / t, and next with that of a miss and a hit.
    behind = np.arange(1, tied - relevant + 1)
    chance = relevant / tied * np.cumprod(np.append(1.0, (tied - relevant + 1 - behind) / (tied - behind)))
    return float((chance / (better + np.arange(1, len(chance) + 1))).sum())


def median_rank_of(ranks: RankCounts) -> Callable[[Int[Array, "draws n"]], Float[Array, " draws"]]:
    """The median rank, from 1, as a function of how often each query counts; see `clipkit.metrics.bootstrap`.

    The rank of a query whose best relevant item is tied counts at every place that the item may take, with its chance:
    the median is where recall at k passes one half, and half-way where that is one half for a while.
    """
    longest = int((ranks.better + ranks.tied).max(initial=1))
    # Queries that rank alike go together: there are no more kinds of them than there are items, but for ties.
    distinct, kind_of = np.unique(np.stack(ranks), axis=1, return_inverse=True)
    kinds = RankCounts(*distinct)
    order = np.argsort(kind_of.ravel(), kind="stable")
    starts = np.flatnonzero(np.diff(kind_of.ravel()[order], prepend=-1))

    def least(drawn: Array, share: float, low: Array) -> Array:
        wanted, high = share * drawn.sum(axis=1), np.full(len(drawn), longest)
        while (low < high).any():
            middle = (low + high) // 2
            found = (drawn * recall_at_k(*kinds, middle[:, None])).sum(axis=1)
            low, high = np.where(found < wanted, middle + 1, low), np.where(found < wanted, high, middle)
        return low

    def statistic(counts: Array) -> Array:
        drawn = np.add.reduceat(counts[:, order], starts, axis=1)
        first = least(drawn, 0.5 - HALF, np.ones(len(counts), np.int64))
        last, open_ = first.copy(), (drawn * recall_at_k(*kinds, first[:, None])).sum(axis=1)
        more = np.flatnonzero(open_ < (0.5 + HALF) * drawn.sum(axis=1))
        last[more] = least(drawn[more], 0.5 + HALF, first[more])
        return (first + last) / 2

    return statistic


def median_rank(ranks: RankCounts) -> float:
    """The median over all queries, see `median_rank_of`. NaN for none."""
    if not len(ranks.better):
        return float("nan")
    return float(median_rank_of(ranks)(np.ones((1, len(ranks.better)), np.int64))[0])
