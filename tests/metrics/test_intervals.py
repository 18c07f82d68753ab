"""Intervals against scipy, against samples that are really repeated, and against the truth that they are to hold."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.metrics import (
    bootstrap,
    class_mean_of,
    intervals,
    mean_average_precision,
    mean_of,
    paired_bootstrap,
    wilson_interval,
)
from clipkit.metrics.average_precision import mean_average_precision_of
from clipkit.metrics.intervals import bootstrap_all, unit_share_of
from clipkit.metrics.ranking import RankCounts, median_rank, median_rank_of


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(max_examples=100, deadline=None)
def test_intervals_of_shares_are_scipys(count, share, level):
    right = round(share * count)
    value, low, high = wilson_interval(right, count, level)
    wanted = scipy.stats.binomtest(right, count).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert low <= value == right / count <= high


def test_shares_of_nothing_and_of_more_than_all():
    value, low, high = wilson_interval(0, 0)
    assert np.isnan(value)
    assert (low, high) == (0, 1)
    assert wilson_interval(10, 10).high == 1
    assert wilson_interval(0, 10).low == 0
    with pytest.raises(ClipkitError, match="3 right of 2 is no share"):
        wilson_interval(3, 2)
    with pytest.raises(ClipkitError, match="a level of 95.0 is no share"):
        wilson_interval(1, 2, 95.0)
    assert wilson_interval(2.5, 10).value == 0.25


def test_intervals_of_shares_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for share in (0.5, 0.9, 0.97):
        drawn = rng.binomial(60, share, 2000).tolist()
        assert (
            0.92 < np.mean([low <= share <= high for _, low, high in map(wilson_interval, drawn, [60] * 2000)]) < 0.98
        )


def drawn_one_by_one(n, draws, seed, groups=None):
    """The samples of each draw: the members of the groups that were drawn, as often as they were."""
    rng = np.random.default_rng(seed)
    names = np.arange(n) if groups is None else np.unique(groups)
    own = np.arange(n) if groups is None else groups
    for _ in range(draws):
        chosen = names[rng.integers(len(names), size=len(names))]
        yield np.concatenate([np.flatnonzero(own == name) for name in chosen])


def statistics(rng, n):
    """Each statistic with the figure that it is of the samples in some rows."""
    values, labels = rng.random(n), rng.integers(4, size=n)
    ranks = RankCounts(rng.integers(9, size=n), *np.array([[3, 2, 1], [1, 2, 1]])[:, rng.integers(3, size=n)])
    scores, wanted = rng.integers(6, size=(n, 3)) / 8, rng.random((n, 3)) < 0.3
    return {
        "mean": (mean_of(values), lambda rows: values[rows].mean()),
        "per class": (
            class_mean_of(values, labels),
            lambda rows: np.mean([values[rows][labels[rows] == c].mean() for c in np.unique(labels[rows])]),
        ),
        "median rank": (median_rank_of(ranks), lambda rows: median_rank(RankCounts(*(each[rows] for each in ranks)))),
        "mAP": (
            mean_average_precision_of(scores, wanted),
            lambda rows: mean_average_precision(scores[rows], wanted[rows]),
        ),
    }


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["mean", "per class", "median rank", "mAP"])
@pytest.mark.parametrize("n", [2, 3, 17, 40])
def test_the_bootstrap_is_samples_really_repeated(name, n, grouped):
    rng = np.random.default_rng(n)
    statistic, figure = statistics(rng, n)[name]
    groups = np.append([7, 100], rng.integers(5, size=n - 2) * 10) if grouped else None
    value, low, high = bootstrap(statistic, n, groups=groups, level=0.9, draws=60, seed=3)
    found = np.array([figure(rows) for rows in drawn_one_by_one(n, 60, 3, groups)])
    assert value == pytest.approx(figure(np.arange(n)))
    assert (low, high) == pytest.approx(tuple(np.quantile(found[~np.isnan(found)], [0.05, 0.95])))


def test_how_many_draws_are_made_at_a_time_changes_nothing(monkeypatch):
    n = 31
    for name, (statistic, _) in statistics(np.random.default_rng(1), n).items():
        groups = np.arange(n) // 2
        whole = [bootstrap(statistic, n, draws=50, groups=each) for each in (None, groups)]
        for at_once in (1, 3 * n, 7 * n + 5):
            monkeypatch.setattr(intervals, "AT_ONCE", at_once)
            parts = [bootstrap(statistic, n, draws=50, groups=each) for each in (None, groups)]
            assert np.allclose(parts, whole, rtol=1e-12, atol=0), name
        monkeypatch.undo()
        assert bootstrap(statistic, n, draws=50, seed=1) != whole[0]


def test_the_bootstrap_of_a_mean_is_scipys_up_to_its_draws():
    values = np.random.default_rng(2).random(200) ** 3
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    _, low, high = bootstrap(mean_of(values), 200, draws=20_000)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


def test_the_bootstrap_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = []
    for seed in range(400):
        _, low, high = bootstrap(mean_of(rng.random(60)), 60, draws=300, seed=seed)
        held.append(low <= 0.5 <= high)
    assert 0.91 < np.mean(held) < 0.98


def test_samples_that_are_copies_add_nothing_where_they_are_grouped():
    values = np.random.default_rng(0).random(80)
    alone = bootstrap(mean_of(values), 80)
    copies, groups = np.repeat(values, 5), np.repeat(np.arange(80), 5)
    assert bootstrap(mean_of(copies), 400, groups=groups) == pytest.approx(alone)
    narrow = bootstrap(mean_of(copies), 400)
    assert narrow.high - narrow.low < 0.6 * (alone.high - alone.low)


def test_a_model_compared_with_itself_differs_by_exactly_nothing():
    for _, (statistic, _) in statistics(np.random.default_rng(0), 50).items():
        assert paired_bootstrap(statistic, statistic, 50) == (0, 0, 0)


def test_what_is_hard_for_both_models_does_not_hide_their_difference():
    rng = np.random.default_rng(0)
    easy = rng.random(300)
    first, second = ((easy + edge + rng.normal(0, 0.1, 300) > 0.5).astype(float) for edge in (0.1, 0.0))
    value, low, high = paired_bootstrap(mean_of(first), mean_of(second), 300)
    assert value == pytest.approx(first.mean() - second.mean())
    assert 0 < low < value < high
    other = paired_bootstrap(mean_of(second), mean_of(first), 300)
    assert other == pytest.approx((-value, -high, -low))
    apart = [bootstrap(mean_of(values), 300) for values in (first, second)]
    assert apart[0].low < apart[1].high  # each alone, they might be equal
    singly = [first[rows].mean() - second[rows].mean() for rows in drawn_one_by_one(300, 1000, 0)]
    assert (low, high) == pytest.approx(tuple(np.quantile(singly, [0.025, 0.975])))


def test_few_samples_and_none():
    for n, groups in [(1, None), (3, np.array([4, 4, 4]))]:
        value, low, high = bootstrap(mean_of(np.full(n, 0.25)), n, groups=groups)
        assert value == 0.25
        assert np.isnan([low, high]).all()
    assert np.isnan(bootstrap(mean_of(np.zeros(0)), 0)).all()
    assert np.isnan(bootstrap(class_mean_of(np.zeros(0), np.zeros(0, int)), 0)).all()
    scores = np.zeros((5, 2))
    assert np.isnan(bootstrap(mean_average_precision_of(scores, scores > 0), 5)).all()
    one = mean_average_precision_of(scores, np.arange(10).reshape(5, 2) == 0)  # many draws are without the positive
    assert not np.isnan(bootstrap(one, 5)).any()
    with pytest.raises(ClipkitError, match="2 groups are named for 3 samples"):
        bootstrap(mean_of(np.zeros(3)), 3, groups=np.zeros(2, int))
    with pytest.raises(ClipkitError, match="0 draws make no interval"):
        bootstrap(mean_of(np.zeros(3)), 3, draws=0)
    with pytest.raises(ClipkitError, match="a level of 1.0 is no share"):
        paired_bootstrap(mean_of(np.zeros(3)), mean_of(np.zeros(3)), 3, level=1.0)


def test_draws_are_not_all_in_memory():
    values = np.random.default_rng(0).random(50_000)
    tracemalloc.start()
    bootstrap(mean_of(values), 50_000, draws=200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 34 * intervals.AT_ONCE  # all at once they would take 32 bytes times 10 million


def test_centred_draws_have_the_figure_for_their_mean():
    rng = np.random.default_rng(0)
    values = rng.random(40)

    def largest(counts):  # no draw is above it, and most are below
        return np.where(counts > 0, values, 0).max(axis=1)

    plain, centred = (bootstrap(largest, 40, centred=each) for each in (False, True))
    means = [values[rows].max() for rows in drawn_one_by_one(40, 1000, 0)]
    assert centred.value == plain.value == values.max()
    assert centred.low == pytest.approx(plain.low + plain.value - np.mean(means))
    assert centred.high == pytest.approx(plain.high + plain.value - np.mean(means))
    other = bootstrap_all({"a": largest, "b": largest}, 40, centred=["a"])
    assert other == {"a": centred, "b": plain}
    assert paired_bootstrap(largest, largest, 40, centred=True) == (0, 0, 0)


@pytest.mark.parametrize("units", [1, 4, 13])
def test_a_share_of_sums_is_that_of_units_really_repeated(units):
    rng = np.random.default_rng(units)
    unit_of = np.append(np.arange(units), rng.integers(units, size=11))
    whole = rng.random(len(unit_of)) * (unit_of % 3 > 0)
    part = whole * rng.integers(0, 2, len(unit_of))
    counts = rng.integers(0, 3, (6, units))
    found = unit_share_of(part, whole, unit_of, units)(counts)
    for of_draw, value in zip(counts, found, strict=True):
        repeated = np.repeat(np.arange(len(unit_of)), of_draw[unit_of])
        total = whole[repeated].sum()
        assert np.isnan(value) if not total else value == pytest.approx(part[repeated].sum() / total)
