"""Decisions are what a loop over the images would say, ties and the background included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.classification import Rule
from clipkit.classification.decisions import STATUSES, decide, joined
from clipkit.core import ClipkitError
from clipkit.models import beside_background, fused, probabilities


def one_by_one(shares, rule, top):
    for row in shares.tolist():
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        margin = row[order[0]] - row[order[1]] if len(row) > 1 else 1.0
        sure = row[order[0]] >= rule.threshold and margin >= rule.min_margin
        status = "background" if order[0] in rule.background else "ok" if sure else "unsure"
        yield order[:top], margin, status


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([3, 50]))
@settings(max_examples=60, deadline=None)
def test_a_decision_is_what_a_loop_says(count, classes, top, seed, levels):
    rng = np.random.default_rng(seed)
    cosines = rng.integers(levels, size=(count, classes)) / levels  # with few levels many are equal
    shares = probabilities(cosines, 4.0)
    background = rng.choice(classes, rng.integers(classes), replace=False).tolist()
    groups = [rng.choice(classes, rng.integers(1, classes + 1), replace=False).tolist() for _ in range(2)]
    rule = Rule(float(rng.uniform(0, 0.6)), float(rng.uniform(0, 0.2)), background, groups=groups)
    found = decide(shares, cosines, rule, top)
    halves = [
        decide(shares[part], cosines[part], rule, top) for part in (slice(0, count // 2), slice(count // 2, None))
    ]
    assert len(found) == count
    for at, (order, margin, status) in enumerate(one_by_one(shares, rule, top)):
        assert found.classes[at].tolist() == order
        assert found.margins[at] == pytest.approx(margin, abs=1e-6)
        assert STATUSES[found.statuses[at]] == status
        assert found.probabilities[at] == pytest.approx(shares[at, order], abs=1e-6)
        assert found.cosines[at] == pytest.approx(cosines[at, order], abs=1e-6)
        assert found.groups[at] == pytest.approx([sum(shares[at, c] for c in own) for own in groups], abs=1e-6)
    for name in ("classes", "cosines", "probabilities", "margins", "statuses", "present", "groups"):
        assert np.array_equal(getattr(joined(halves), name), getattr(found, name))


def test_models_are_joined_by_the_mean_of_what_they_say():
    rng = np.random.default_rng(0)
    each = [probabilities(rng.normal(size=(5, 3)), 2.0) for _ in range(3)]
    assert np.allclose(fused(each), sum(each) / 3)
    assert np.allclose(fused(each, [1.0, 0.0, 3.0]), (each[0] + 3 * each[2]) / 4)
    assert np.isnan(decide(fused(each), None, Rule()).cosines).all()


def test_with_a_bias_each_class_stands_alone():
    cosines = np.array([[0.2, -0.1], [1.0, 1.0]], np.float32)
    shares = probabilities(cosines, 10.0, -5.0)
    assert shares == pytest.approx(1 / (1 + np.exp(-(10 * cosines - 5))), abs=1e-6)


def test_numbers_out_of_range():
    with pytest.raises(ClipkitError, match="a threshold is a probability between 0 and 1, got 50"):
        Rule(threshold=50.0)
    with pytest.raises(ClipkitError, match="a margin is a probability"):
        Rule(min_margin=-0.1)


@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_several_classes_at_once(count, classes, seed):
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, (count, classes))
    background = rng.choice(classes, rng.integers(1, classes), replace=False).tolist()
    shares = beside_background(cosines, 7.0, background)
    rule = Rule(float(rng.uniform(0.2, 0.9)), 0.0, background, several=True)
    found = decide(shares, cosines, rule)
    for row, near, present, status in zip(shares, cosines, found.present, found.statuses, strict=True):
        nearest = max(near[c] for c in background)
        for place in range(classes):
            both = np.exp(7 * np.array([near[place], nearest]))
            assert row[place] == pytest.approx(both[0] / both.sum())
            assert present[place] == (place not in background and np.float32(row[place]) >= np.float32(rule.threshold))
        assert STATUSES[status] == ("ok" if present.any() else "background")
