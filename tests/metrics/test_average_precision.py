"""Average precision against scikit-learn, the definition read aloud, and every order of the tied."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from clipkit.core import ClipkitError
from clipkit.metrics import average_precision as module
from clipkit.metrics import chance_of, mean_average_precision
from clipkit.metrics.average_precision import average_precision, mean_average_precision_of


def in_order(positive):
    """The mean over the positives of the precision up to each."""
    places = np.flatnonzero(positive) + 1
    return np.mean(np.arange(1, len(places) + 1) / places) if len(places) else np.nan


def over_all_orders(scores, positive):
    """The mean over all orders of equal scores."""
    ties = [np.flatnonzero(scores == score) for score in np.unique(scores)[::-1]]
    every = itertools.product(*[itertools.permutations(tie) for tie in ties])
    return np.mean([in_order(positive[list(itertools.chain(*order))]) for order in every])


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_without_ties_it_is_scikit_learns(images, classes, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(images * classes).reshape(images, classes).astype(np.float32) / 1000
    labels = rng.random((images, classes)) < 0.4
    found = average_precision(scores, labels)
    for column in range(classes):
        if not labels[:, column].any():
            assert np.isnan(found[column])
            continue
        assert found[column] == pytest.approx(average_precision_score(labels[:, column], scores[:, column]))
        assert found[column] == pytest.approx(in_order(labels[np.argsort(-scores[:, column]), column]))
    if labels.any():
        held = labels.any(axis=0)
        theirs = average_precision_score(labels[:, held], scores[:, held])
        assert mean_average_precision(scores, labels) == pytest.approx(theirs)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_ties_are_the_mean_over_all_orders(images, levels, seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(levels, size=images) / 4, rng.random(images) < 0.6
    positive[0] = True
    assert average_precision(scores[:, None], positive[:, None]) == pytest.approx([over_all_orders(scores, positive)])


@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_collapsed_model_scores_exactly_chance(images, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.random((images, classes)) < rng.random()
    labels[0, 0] = True
    # Equal but for what the last place makes of the same product.
    scores = (0.3 + rng.integers(3, size=labels.shape) * 2.0**-25).astype(np.float32)
    assert mean_average_precision(scores, labels) == chance_of(labels)
    n, harmonic = images, float(sum(Fraction(1, i) for i in range(1, images + 1)))
    formula = [(harmonic + (n - harmonic) * (r - 1) / max(n - 1, 1)) / n for r in labels.sum(axis=0) if r]
    assert chance_of(labels) == pytest.approx(np.mean(formula), rel=1e-12)


def test_chance_is_what_random_scores_give():
    rng = np.random.default_rng(0)
    labels = np.arange(12)[:, None] < [1, 4, 11]
    drawn = [
        mean_average_precision(rng.permuted(np.tile(np.arange(12.0), (3, 1)), axis=1).T, labels) for _ in range(2000)
    ]
    assert chance_of(labels) == pytest.approx(np.mean(drawn), abs=0.01)
    assert chance_of(labels[:, :1]) > 3 / 12  # not the share of the positives, which is 1 / 12


@given(st.integers(2, 14), st.integers(1, 3), st.sampled_from([3, 1000]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_draw_counts_as_its_samples_repeated(images, classes, levels, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(levels, size=(images, classes)) / 1000, rng.random((images, classes)) < 0.3
    counts = rng.multinomial(images, np.full(images, 1 / images), size=6)
    found = mean_average_precision_of(scores, labels)(counts)
    for draw, value in zip(counts, found, strict=True):
        rows = np.repeat(np.arange(images), draw)
        assert value == pytest.approx(mean_average_precision(scores[rows], labels[rows]), nan_ok=True)


def test_long_inverse_sums_keep_their_digits():
    for before, count in [(0, 7), (998, 5), (1000, 1), (1003, 2), (10**6, 3), (12_345, 70_000)]:
        exact = float(sum(Fraction(1, before + j) for j in range(1, min(count, 3000) + 1)))
        found = module._inverses(np.array([[before]]), np.array([[min(count, 3000)]]))
        assert found.item() == pytest.approx(exact, rel=1e-12)


def test_many_scores_close_together_are_not_all_one_tie():
    scores = np.linspace(0.2, 0.3, 400_000).astype(np.float32)[:, None]
    positive = scores > 0.299
    assert np.diff(scores[:, 0]).max() < 1e-6
    assert mean_average_precision(scores, positive) > 0.999
    assert mean_average_precision(-scores, positive) < 0.02


def test_nothing_and_what_is_no_number():
    one = np.ones((1, 1))
    assert mean_average_precision(one, one > 0) == 1
    for images, classes in [(0, 2), (3, 0), (1, 2)]:
        nothing = np.zeros((images, classes))
        assert np.isnan(mean_average_precision(nothing, nothing > 0))
        assert np.isnan(chance_of(nothing > 0))
        assert np.isnan(average_precision(nothing, nothing > 0)).all()
        assert np.isnan(mean_average_precision_of(nothing, nothing > 0)(np.ones((2, images), np.int64))).all()
    for function in (mean_average_precision, mean_average_precision_of):
        with pytest.raises(ClipkitError, match="NaN or infinity, first in row 1"):
            function(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.ones((2, 2), bool))
