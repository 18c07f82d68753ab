"""Choices against every order of the tied, and against the papers' conditions where nothing is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.metrics import WINOGROUND_CHANCE, choice, choice_per_sample, choice_scores, winoground_per_sample


def over_all_orders(scores):
    """Winoground's conditions on four scores, in the mean over what may break their ties."""
    found = []
    for order in itertools.permutations(range(4)):
        s = scores + np.array(order).reshape(2, 2) * 1e-3
        text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        image = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        found.append((text, image, text and image))
    return np.mean(found, axis=0)


@given(st.integers(1, 5), st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_winogrounds_ties_are_the_mean_over_all_orders(instances, seed, levels):
    scores = np.random.default_rng(seed).integers(levels, size=(instances, 2, 2)) / 4
    found = winoground_per_sample(scores)
    wanted = np.array([over_all_orders(each) for each in scores])
    for name, column in zip(("winoground_text", "winoground_image", "winoground_group"), wanted.T, strict=True):
        assert found[name] == pytest.approx(column)


def test_a_model_that_tells_nothing_apart_scores_exactly_chance():
    image = np.full((3, 2, 5), 5**-0.5, np.float16)
    scores = choice_scores(image, image)
    found = {name: values.mean() for name, values in winoground_per_sample(scores).items()}
    assert found == WINOGROUND_CHANCE
    assert choice_per_sample(scores[:, 0]).tolist() == [0.5] * 3
    assert choice_per_sample(np.zeros((2, 7), np.float32)).tolist() == [1 / 7] * 2


def test_winogrounds_example():
    scores = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.9, 0.8], [0.7, 0.75]], [[0.5, 0.6], [0.4, 0.7]]])
    found = winoground_per_sample(scores)
    assert found["winoground_text"].tolist() == [1, 1, 0]
    assert found["winoground_image"].tolist() == [1, 0, 1]
    assert found["winoground_group"].tolist() == [1, 0, 0]


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([3, 1000]))
@settings(max_examples=60, deadline=None)
def test_a_choice_is_the_best_or_its_share_of_a_tie(instances, choices, seed, levels):
    rng = np.random.default_rng(seed)
    scores, right = rng.integers(levels, size=(instances, choices)) / 1000, rng.integers(choices, size=instances)
    found = choice_per_sample(scores, right)
    for value, of_instance, column in zip(found, scores, right, strict=True):
        best = np.flatnonzero(of_instance == of_instance.max())
        assert value == pytest.approx((column in best) / len(best))
    assert choice_per_sample(scores).tolist() == choice_per_sample(scores, np.zeros(instances, np.int64)).tolist()


def test_ties_are_those_of_float32():
    scores = np.array([[0.25, 0.25 + 5e-7], [0.25, 0.25 + 2e-6]])
    assert choice_per_sample(scores).tolist() == [0.5, 0]
    four = np.stack([scores, scores[:, ::-1]], axis=1)  # each caption prefers its own image, or neither
    assert winoground_per_sample(four)["winoground_group"].tolist() == [1 / 6, 0]


@pytest.mark.parametrize(("images", "texts"), [(1, 2), (2, 2), (1, 5)])
def test_scores_are_inner_products_in_chunks(images, texts, monkeypatch):
    monkeypatch.setattr(choice, "CHUNK", 4)
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(11, images, 6)).astype(np.float16), rng.normal(size=(11, texts, 6))
    found = choice_scores(image, text.astype(np.float32))
    assert found.dtype == np.float32
    wanted = [i.astype(float) @ t.T for i, t in zip(image, text, strict=True)]
    assert np.allclose(found, wanted, atol=1e-5)


def test_nothing_and_what_cannot_be_compared():
    assert choice_scores(np.zeros((0, 2, 3)), np.zeros((0, 2, 3))).shape == (0, 2, 2)
    assert all(len(values) == 0 for values in winoground_per_sample(np.zeros((0, 2, 2))).values())
    assert len(choice_per_sample(np.zeros((0, 2)))) == 0
    for bad in (np.nan, -np.inf):
        scores = np.zeros((3, 2, 2))
        scores[1, 0, 1] = bad
        with pytest.raises(ClipkitError, match="NaN or infinity, first in row 1"):
            winoground_per_sample(scores)
        with pytest.raises(ClipkitError, match="NaN or infinity, first in row 1"):
            choice_per_sample(scores[:, 0])
    for column in (2, -1):
        with pytest.raises(ClipkitError, match=r"there are 2 choices; the right one is a column from 0"):
            choice_per_sample(np.zeros((1, 2)), np.array([column]))
