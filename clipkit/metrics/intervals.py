"""How far a figure may be off: intervals of shares, of any figure by the bootstrap, and of two models' difference.

What a figure would be over other samples of the kind is told by drawing as many samples from one's own, with
repetition, again and again. A figure goes into it as a function of how often each sample counts (`Statistic`), so that
many draws are worked out together, and samples are what is drawn for figures that are no means, such as mAP, too.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipkit.core import ClipkitError

__all__ = [
    "Interval",
    "Statistic",
    "bootstrap",
    "bootstrap_all",
    "class_mean_of",
    "mean_of",
    "paired_bootstrap",
    "unit_mean_of",
    "unit_share_of",
    "wilson_interval",
]

Array = np.ndarray
Statistic = Callable[[Int[Array, "draws n"]], Float[Array, " draws"]]
"""A figure of each draw, given how often each of n samples was drawn; where all are 1 it is the figure itself. See
`mean_of`, `class_mean_of`, `clipkit.metrics.ranking.median_rank_of`,
`clipkit.metrics.average_precision.mean_average_precision_of`."""
AT_ONCE = 1 << 21  # samples drawn at a time: 32 bytes each


class Interval(NamedTuple):
    """A figure and where it may lie."""

    value: float
    low: float
    high: float


def wilson_interval(right: int | float, count: int, level: float = 0.95) -> Interval:
    """The score interval of a share (Wilson 1927).

    It stays within 0 and 1, and keeps its level on average for few samples and for shares near 0 and 1, where the
    bootstrap's and right ± 1.96 standard errors do not.

    Args:
        right: how many; no whole number where ties count in part.
        count: of how many; none gives NaN, which may lie anywhere.
        level: how often such intervals hold the truth.

    Raises:
        ClipkitError: for more right ones than there are, or a level that is no share.
    """
    _refuse(right, count, level)
    if not count:
        return Interval(float("nan"), 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, more = right / count, z * z / count
    middle = (share + more / 2) / (1 + more)
    half = z / (1 + more) * (share * (1 - share) / count + more / (4 * count)) ** 0.5
    return Interval(share, max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < count else 1.0)


def _refuse(right: int | float, count: int, level: float) -> None:
    if not 0 <= right <= count:
        raise ClipkitError(f"{right} right of {count} is no share; give from 0 to {count}")
    _refuse_level(level)


def _refuse_level(level: float) -> None:
    if not 0 < level < 1:
        raise ClipkitError(f"a level of {level} is no share between 0 and 1; 0.95 is usual")


def mean_of(values: Float[Array, " n"]) -> Statistic:
    """The mean of values of the samples, such as ``retrieval_per_sample`` gives, as a function of the draws."""
    first = values[0] if len(values) else 0.0  # as in `clipkit.metrics.mean`
    return lambda counts: first + counts @ (values - first) / counts.sum(axis=1)


def unit_mean_of(values: Float[Array, " n"], unit_of: Int[Array, " n"], units: int) -> Statistic:
    """The mean of values as a function of how often each unit is drawn, where a unit brings all its values with it.

    It is `mean_of` under `bootstrap`'s ``groups``, and takes memory for the units only: an image with its captions.

    Args:
        values: such as ``retrieval_per_sample`` gives.
        unit_of: of each value, from 0.
        units: how many there are.
    """
    first = values[0] if len(values) else 0.0  # as in `clipkit.metrics.mean`
    sums = np.bincount(unit_of, weights=values - first, minlength=units)
    sizes = np.bincount(unit_of, minlength=units)
    return lambda counts: first + counts @ sums / (counts @ sizes)


def unit_share_of(
    part: Float[Array, " n"], whole: Float[Array, " n"], unit_of: Int[Array, " n"], units: int
) -> Statistic:
    """The ratio of two sums over the samples as a function of how often each unit is drawn, as in `unit_mean_of`.

    It is NaN in a draw whose `whole` is nothing.

    Args:
        part, whole: of each sample, such as whether an index answers it, of what the exact search finds.
        unit_of, units: see `unit_mean_of`.
    """
    parts, wholes = (np.bincount(unit_of, weights=values, minlength=units) for values in (part, whole))

    def statistic(counts: Array) -> Array:
        of = counts @ wholes
        return np.divide(counts @ parts, of, out=np.full(len(counts), np.nan), where=of > 0)

    return statistic


def class_mean_of(values: Float[Array, " n"], labels: Int[Array, " n"]) -> Statistic:
    """The mean over classes of the mean of their samples' values, as a function of the draws.

    Of ``zeroshot_acc@1`` it is the mean per-class recall. Classes that a draw lacks are left out of it.

    Args:
        values: of each sample.
        labels: its class.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    first = values[0] if len(values) else 0.0
    apart = values[order] - first

    def statistic(counts: Array) -> Array:
        ordered = counts[:, order]
        sizes = np.add.reduceat(ordered, starts, axis=1)
        sums = np.add.reduceat(ordered * apart, starts, axis=1)
        return first + (sums / np.maximum(sizes, 1)).sum(axis=1) / (sizes > 0).sum(axis=1)

    return statistic


def bootstrap(
    statistic: Statistic,
    n: int,
    *,
    groups: Int[Array, " n"] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    centred: bool = False,
) -> Interval:
    """A figure with its percentile bootstrap interval (Efron 1979; Efron & Tibshirani 1993, chapter 13).

    The same seed gives the same draws. Memory: 32 bytes for each of 2 million samples drawn at a time, or of n where
    that is more, and what the statistic takes for them.

    Args:
        statistic: the figure.
        n: how many samples it is of.
        groups: a number for each sample; those with the same are drawn together, such as captions of one image, whose
            values go together. Samples are drawn singly when not given.
        level: share of the draws within the interval.
        draws: how many.
        seed: of the draws.
        centred: whether the draws are shifted so that their mean is the figure: by the bootstrap's estimate of bias
            (Efron & Tibshirani 1993, chapter 10). For figures that draws lift or lower as such, like mAP, which gains
            from an image that is drawn twice and ties with itself: their interval might leave out the figure.

    Returns:
        The figure of the samples as they are, and the interval: NaN where there are not at least two samples or groups
        to draw among. Draws of which the figure is NaN, such as the mAP of a draw without a positive, are left out.

    Raises:
        ClipkitError: where `groups` has another length, or `level` or `draws` makes no interval.
    """
    return _interval(statistic, n, groups, level, draws, seed, centred)


def paired_bootstrap(
    first: Statistic,
    second: Statistic,
    n: int,
    *,
    groups: Int[Array, " n"] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    centred: bool = False,
) -> Interval:
    """How much better the first of two models is than the second on the same samples, with its bootstrap interval.

    Both see the same draws, so that what is hard for both does not widen the interval: two models differ where it
    leaves out 0. A model compared with itself differs by exactly 0, with an interval from 0 to 0.

    Args:
        first, second: the figure of each, over the same samples in the same order.
        n, groups, level, draws, seed, centred: see `bootstrap`.

    Returns:
        The difference, first minus second, and its interval.

    Raises:
        ClipkitError: see `bootstrap`.
    """
    return _interval(lambda counts: first(counts) - second(counts), n, groups, level, draws, seed, centred)


def bootstrap_all(
    statistics: Mapping[str, Statistic],
    n: int,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    centred: Collection[str] = (),
) -> dict[str, Interval]:
    """Several figures of the same samples with their intervals, from one set of draws; each as `bootstrap` gives it.

    Args:
        statistics: the figures by name.
        n, level, draws, seed: see `bootstrap`.
        centred: which of them are, see there.

    Raises:
        ClipkitError: see `bootstrap`.
    """
    _refuse_draws(level, draws)
    if n < 2:
        alone = (n, None, level, draws, seed, False)
        return {name: _interval(statistic, *alone) for name, statistic in statistics.items()}
    once, found = np.ones((1, n), np.int64), {name: [] for name in statistics}
    for counts in _drawn(n, n, None, draws, seed):
        for name, statistic in statistics.items():
            found[name].append(statistic(counts))
    return {
        name: _percentiles(float(statistic(once)[0]), np.concatenate(found[name]), level, name in centred)
        for name, statistic in statistics.items()
    }


def _interval(
    statistic: Statistic, n: int, groups: Array | None, level: float, draws: int, seed: int, centred: bool
) -> Interval:
    _refuse_draws(level, draws)
    if groups is not None and len(groups) != n:
        raise ClipkitError(f"{len(groups):,} groups are named for {n:,} samples; name one for each")
    if not n:
        return Interval(*[float("nan")] * 3)
    value = float(statistic(np.ones((1, n), np.int64))[0])
    group_of = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    units = n if group_of is None else int(group_of.max()) + 1
    if units < 2:
        return Interval(value, float("nan"), float("nan"))
    found = np.concatenate([statistic(counts) for counts in _drawn(n, units, group_of, draws, seed)])
    return _percentiles(value, found, level, centred)


def _refuse_draws(level: float, draws: int) -> None:
    _refuse_level(level)
    if draws < 1:
        raise ClipkitError(f"{draws} draws make no interval; 1000 are usual")


def _percentiles(value: float, found: Array, level: float, centred: bool) -> Interval:
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(value, float("nan"), float("nan"))
    if centred:
        found = found + (value - found.mean())
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _drawn(n: int, units: int, group_of: Array | None, draws: int, seed: int) -> Iterator[Int[Array, "some n"]]:
    """How often each sample is drawn, some draws at a time; how many at a time does not change them."""
    rng = np.random.default_rng(seed)
    at_once = max(1, AT_ONCE // n)
    for start in range(0, draws, at_once):
        some = min(at_once, draws - start)
        drawn = rng.integers(units, size=(some, units)) + units * np.arange(some)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=some * units).reshape(some, units)
        yield counts if group_of is None else counts[:, group_of]
