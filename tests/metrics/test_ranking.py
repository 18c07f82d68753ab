"""Ranks against the whole matrix of scores, and what they are worth against every order of the tied."""

import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.metrics import mean, rank_pairs, ranking, recall_at_k
from clipkit.metrics.ranking import (
    TIE_WIDTH,
    RankCounts,
    guessed,
    median_rank,
    median_rank_of,
    reciprocal_rank,
    refuse_bad_scores,
)


def vectors(rng, rows, kind, dim=7):
    """Unit vectors: at random, or of few kinds, so that most are tied."""
    if kind == "tied":
        return np.eye(dim, dtype=np.float32)[rng.integers(3, size=rows)]
    drawn = rng.normal(size=(rows, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def whole(scores, relevant):
    """The counts from all scores at once, for queries that have a relevant item."""
    scores, relevant = (each[relevant.any(axis=1)] for each in (scores, relevant))
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    tied = np.abs(scores - best) <= TIE_WIDTH
    return RankCounts(
        ((scores > best + TIE_WIDTH) & ~relevant).sum(axis=1), tied.sum(axis=1), (tied & relevant).sum(axis=1)
    )


def in_parts(rows, count):
    return [part for part in np.array_split(rows, count) if len(part)] if count > 1 else rows


@given(
    st.integers(1, 40),
    st.integers(1, 25),
    st.integers(0, 10**6),
    st.sampled_from(["random", "tied"]),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(1, 3),
    st.sampled_from([1, 4, 7, 64]),
)
@settings(max_examples=120, deadline=None)
def test_blocks_count_what_the_whole_matrix_holds(left, right, seed, kind, dtype, parts, block):
    rng = np.random.default_rng(seed)
    lefts, rights = (vectors(rng, rows, kind).astype(dtype) for rows in (left, right))
    right_of_left = rng.integers(right, size=left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", block)
        patch.setattr(ranking, "STRIP", 3)
        found = rank_pairs(in_parts(lefts, parts), in_parts(rights, parts), right_of_left)
    scores = lefts.astype(np.float32) @ rights.astype(np.float32).T
    relevant = right_of_left[:, None] == np.arange(right)
    for ours, wanted in zip(found, (whole(scores, relevant), whole(scores.T, relevant.T)), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_memory_mapped_parts_are_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    dim, block = 24, 512
    lefts, rights = (vectors(rng, rows, "random", dim).astype(np.float16) for rows in (20_000, 9_000))
    right_of_left = rng.integers(9_000, size=20_000)
    mapped = []
    for name, rows in (("l", lefts), ("r", rights)):
        for number, part in enumerate(np.array_split(rows, 3)):
            np.save(tmp_path / f"{name}{number}.npy", part)
        mapped.append([np.load(tmp_path / f"{name}{number}.npy", mmap_mode="r") for number in range(3)])
    told = []
    monkeypatch.setattr(ranking, "BLOCK", block)
    tracemalloc.start()
    found = rank_pairs(*mapped, right_of_left, advance=told.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        peak <= 4 * block**2 + ranking.STRIP * block + 12 * block * dim + 60 * 29_000 + 100_000
    )  # the last for Python itself
    assert sum(told) == 20_000
    scores = lefts.astype(np.float32) @ rights.astype(np.float32).T
    rows = slice(0, 20_000, 997)
    wanted = whole(scores[rows], right_of_left[rows, None] == np.arange(9_000))
    # Scores that are 1e-6 apart but for a unit of the last place may be a tie in one way of summing and not in another.
    for ours, expected in zip(found[0], wanted, strict=True):
        assert np.abs(ours[rows] - expected).max() <= 1
    assert np.array_equal(found[0].better[rows] == 0, wanted.better == 0)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_wherever_it_stands(side, bad):
    rng = np.random.default_rng(0)
    given_ = [vectors(rng, 9, "random") for _ in range(2)]
    right_of_left = np.zeros(9, np.int64)  # row 8 on the right belongs to none
    given_[side][8, 3] = bad
    name = ("caption", "image")[side]
    with pytest.raises(ClipkitError, match=f"the {name} vectors hold NaN or infinity, first in row 8; leave"):
        rank_pairs(in_parts(given_[0], 2), in_parts(given_[1], 2), right_of_left, names=("caption", "image"))


def test_huge_numbers_are_finite():
    huge = np.full((40, 4), 1e38, np.float32)
    with np.errstate(over="ignore"), pytest.raises(ClipkitError, match="first in row 3"):
        rank_pairs(np.append(huge[:3], [[np.inf] * 4], axis=0).astype(np.float32), huge, np.zeros(4, np.int64))
    small = np.full((1, 4), 1e-38, np.float32)
    assert rank_pairs(small, huge, np.zeros(1, np.int64))[0].tied.tolist() == [40]


def test_what_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    a, b = vectors(rng, 4, "random"), vectors(rng, 3, "random")
    for wrong in ([0, 1, 3, 0], [0, 1, -1, 0]):
        with pytest.raises(ClipkitError, match=f"left vector 2 belongs to right row {wrong[2]}, and there are 3"):
            rank_pairs(a, b, np.array(wrong))
    with pytest.raises(ClipkitError, match="4 left vectors are told to belong to 2 right vectors"):
        rank_pairs(a, b, np.zeros(2, np.int64))
    with pytest.raises(ClipkitError, match="dimension 7, the right vectors 5"):
        rank_pairs(a, b[:, :5], np.zeros(4, np.int64))
    with pytest.raises(ClipkitError, match="the left vectors have dimensions 5 and 7"):
        rank_pairs([a[:2], a[2:, :5]], b, np.zeros(4, np.int64))
    with pytest.raises(ClipkitError, match="belongs to right row 0, and there are 0"):
        rank_pairs(a, b[:0], np.zeros(4, np.int64))
    refuse_bad_scores(a[:0])
    with pytest.raises(ClipkitError, match="the scores hold NaN or infinity, first in row 2"):
        refuse_bad_scores(np.array([0, 1, np.nan, 1]))


def test_nothing_ranks_as_nothing():
    b = vectors(np.random.default_rng(0), 3, "random")
    for empty in (b[:0], []):
        for ranks in rank_pairs(empty, b, np.zeros(0, np.int64)):
            assert [len(each) for each in ranks] == [0, 0, 0]
            assert len(recall_at_k(*ranks, 3)) == len(reciprocal_rank(*ranks)) == 0
            assert np.isnan(median_rank(ranks))
    assert np.isnan(mean(np.zeros(0)))


def orders(better, tied, relevant):
    """The first relevant item's rank in each order of the tied, which are equally likely."""
    return [better + 1 + min(places) for places in itertools.combinations(range(tied), relevant)]


COUNTS = st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 7)).map(
    lambda c: (c[0], max(c[1:]), min(c[1:]))
)


@given(st.lists(COUNTS, min_size=1, max_size=6), st.integers(1, 14))
@settings(max_examples=100, deadline=None)
def test_ranks_are_worth_their_mean_over_all_orders(counts, k):
    ranks = RankCounts(*np.array(counts).T)
    every = [orders(*each) for each in counts]
    assert recall_at_k(*ranks, k) == pytest.approx([np.mean(np.array(e) <= k) for e in every], abs=1e-12)
    assert reciprocal_rank(*ranks) == pytest.approx([np.mean(1 / np.array(e)) for e in every], rel=1e-12)
    at_several = recall_at_k(*ranks, np.array([[k], [1], [2 * k]]))
    assert np.array_equal(at_several, [recall_at_k(*ranks, each) for each in (k, 1, 2 * k)])


def exact_median(every, weights):
    """The median of a mixture of distributions, each of equally likely ranks, in fractions."""
    total, below, found = sum(weights), Fraction(0), []
    for rank in range(1, 100):
        below += sum(Fraction(w * e.count(rank), len(e)) for e, w in zip(every, weights, strict=True))
        if len(found) == 0 and below >= Fraction(total, 2):
            found.append(rank)
        if below > Fraction(total, 2):
            return (found[0] + rank) / 2
    raise AssertionError


@given(st.lists(COUNTS, min_size=1, max_size=8), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_median_is_that_of_all_orders(counts, seed):
    ranks = RankCounts(*np.array(counts).T)
    every = [orders(*each) for each in counts]
    assert median_rank(ranks) == exact_median(every, [1] * len(counts))
    drawn = np.random.default_rng(seed).integers(4, size=(5, len(counts)))
    drawn[:, 0] += 1
    assert median_rank_of(ranks)(drawn).tolist() == [exact_median(every, row.tolist()) for row in drawn]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_without_ties_the_median_is_numpys(better):
    one = np.ones(len(better), np.int64)
    assert median_rank(RankCounts(np.array(better), one, one)) == np.median(np.array(better) + 1)


def test_guessing_among_very_many():
    ranks = guessed(np.full(3, 1_000_000), np.array([1, 5, 400]))
    missed = np.prod([(1e6 - 10 - j) / (1e6 - j) for j in range(5)])
    assert recall_at_k(*ranks, 10)[:2] == pytest.approx([1e-5, 1 - missed], rel=1e-9)
    assert recall_at_k(*ranks, 10)[0] == 10 / 1_000_000
    harmonic = np.log(1e6) + np.euler_gamma + 5e-7
    assert reciprocal_rank(*ranks)[0] == pytest.approx(harmonic / 1e6, rel=1e-9)
    single = RankCounts(*(each[:1] for each in ranks))
    assert median_rank(single) == 500_000.5


def test_the_mean_of_equal_values_is_that_value():
    for value in (1 / 3, 1 / 49, 0.1):
        assert all(mean(np.full(n, value)) == value for n in range(1, 60))
    assert mean(np.array([0.0, 1.0, 0.5])) == 0.5
