"""The order of samples: bijections that are never stored, exact shares, bounded windows."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.training.batches.order import Mixture, Order, permuted


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_permutation_holds_each_number_once(size, key):
    assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


def test_any_position_alone_gives_what_all_together_give():
    whole = permuted(np.arange(1000), 1000, [3, 4])
    assert [int(permuted(np.array([p]), 1000, [3, 4])[0]) for p in range(1000)] == whole.tolist()
    assert permuted(np.arange(1000), 1000, [3, 5]).tolist() != whole.tolist()


def test_a_billion_samples_cost_no_memory():
    at = np.array([0, 123_456_789, 999_999_999])
    found = permuted(at, 10**9, [0])
    assert len(set(found.tolist())) == 3
    assert ((found >= 0) & (found < 10**9)).all()


def test_every_value_comes_up_everywhere_equally_often():
    """A chi-square statistic over (position, value) pairs, against its known mean and spread."""
    size, draws = 13, 4000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), permuted(np.arange(size), size, [seed])] += 1
    expected = draws / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    found = permuted(np.arange(100_000), 100_000, [1])
    steps = np.abs(np.diff(found))
    assert steps.mean() == pytest.approx(100_000 / 3, rel=0.02)  # of independent uniform draws
    assert np.corrcoef(np.arange(100_000), found)[0, 1] == pytest.approx(0, abs=0.02)


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


@given(SIZES, st.one_of(st.none(), st.integers(1, 20)), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_epoch_holds_every_sample_once_whatever_the_window(sizes, window, seed):
    order = Order(sizes, seed, window=window)
    for epoch in range(3):
        start = epoch * order.size
        assert sorted(order.at(range(start, start + order.size))) == list(range(order.size))
    spanning = range(order.size // 2, 2 * order.size)
    assert order.at(spanning).tolist() == [int(order.at([p])[0]) for p in spanning]


@given(SIZES, st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_a_window_needs_few_shards_at_a_time_and_says_which(sizes, window):
    order = Order(sizes, 5, window=window)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    needed = owner[order.at(range(order.size))]
    # The plain twin: walk the shards in the order in which they are announced, and cut where a window is full.
    announced = order.shards_from(0)
    expected, held, position = [], 0, 0
    while position < order.size:
        shard = next(announced)
        expected.append(shard)
        held += sizes[shard]
        if held >= window or position + held == order.size:
            assert set(needed[position : position + held]) == set(expected)
            position, held, expected = position + held, 0, []
    rng = np.random.default_rng(0)
    for position in range(order.size):
        stand_in = owner[order.another(position, rng)]
        first = next(order.shards_from(position))
        window_of_it = set(needed[max(0, position - sum(sizes)) :])
        assert stand_in in window_of_it | {first}


def test_replacement_draws_each_position_by_itself():
    order = Order([50, 50], 3, replacement=True)
    drawn = order.at(range(400))
    assert len(set(drawn[:100].tolist())) < 80  # of 100 draws from 100 about 63 are different
    assert set(drawn.tolist()) <= set(range(100))
    assert drawn[[7, 300]].tolist() == order.at([7, 300]).tolist()


@given(
    st.lists(st.sampled_from([1, 2, 3, 0.5, 0.1, 7.25]), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
def test_a_mixture_counts_every_sequence_without_gaps(weights, seed, start):
    mixture = Mixture(weights, seed)
    which, local = mixture.at(range(start + 500))
    for number in range(len(weights)):
        assert local[which == number].tolist() == list(range((which == number).sum()))
    late, late_local = mixture.at(range(start, start + 500))
    assert late.tolist() == which[start:].tolist()
    assert late_local.tolist() == local[start:].tolist()


def test_a_mixture_keeps_its_shares_exactly():
    mixture = Mixture([3, 1, 0.5], 0)
    which, _ = mixture.at(range(4096 * 9))
    assert np.bincount(which).tolist() == [4096 * 6, 4096 * 2, 4096]
    within = np.bincount(which[:4096])
    assert all(abs(n - 4096 * share) <= 1 for n, share in zip(within, (2 / 3, 2 / 9, 1 / 9), strict=True))
    far, local = mixture.at([10**15])  # beyond what floats count exactly
    exact = Fraction(2, 3) if far[0] == 0 else Fraction(2, 9) if far[0] == 1 else Fraction(1, 9)
    assert abs(int(local[0]) - 10**15 * exact) <= 4096


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, 1e-9]])
def test_weights_that_cannot_be_kept_are_refused(weights):
    with pytest.raises(ClipkitError, match=r"weight"):
        Mixture(weights, 0)
