"""Calibration and abstention against scikit-learn, the definitions read aloud, and the guarantee kept on others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sklearn_log_loss

from clipkit.core import ClipkitError
from clipkit.metrics import (
    COLDEST,
    HOTTEST,
    calibration,
    calibration_error,
    fit_temperature,
    log_loss,
    precision_threshold,
    reliability,
)
from clipkit.metrics.selective import risk_coverage
from clipkit.models import probabilities


@given(st.integers(1, 60), st.integers(0, 10**6), st.integers(1, 20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_calibration_error_is_the_definition(count, seed, bins, equal_mass):
    rng = np.random.default_rng(seed)
    probability = rng.choice([0.0, 1.0, *rng.random(count)], count)
    right = rng.random(count) < 0.5
    edges = [number / bins for number in range(1, bins)]
    if equal_mass:  # the bin's last sample of all in order, with all that are equal to it
        ordered = sorted(probability)
        edges = [ordered[max(-(-count * number // bins), 1) - 1] for number in range(1, bins)]
    wanted, counts = 0.0, []
    for low, high in zip([-1, *edges], [*edges, 1], strict=True):
        inside = (probability > low) & (probability <= high)
        counts.append(inside.sum())
        if inside.any():
            wanted += inside.mean() * abs(probability[inside].mean() - right[inside].mean())
    assert calibration_error(probability, right, bins, equal_mass=equal_mass) == pytest.approx(wanted, abs=1e-12)
    found = reliability(probability, right, bins, equal_mass=equal_mass)
    assert found.counts.tolist() == counts
    shuffled = rng.permutation(count)
    again = reliability(probability[shuffled], right[shuffled], bins, equal_mass=equal_mass)
    assert all(np.allclose(a, b, equal_nan=True) for a, b in zip(found, again, strict=True))


def test_bins_are_scikit_learns():
    rng = np.random.default_rng(0)
    probability = rng.random(500)
    right = rng.random(500) < probability
    share, mean = calibration_curve(right, probability, n_bins=7)
    found = reliability(probability, right, 7)
    assert found.right == pytest.approx(share)
    assert found.probability == pytest.approx(mean)
    assert set(reliability(probability, right, 7, equal_mass=True).counts) <= {71, 72}


def test_calibration_of_nothing_and_of_what_is_no_probability():
    none, no = np.zeros(0), np.zeros(0, bool)
    assert np.isnan(calibration_error(none, no))
    assert reliability(none, no, 3, equal_mass=True).counts.tolist() == [0, 0, 0]
    assert calibration_error(np.array([0.75]), np.array([True])) == 0.25
    assert calibration_error(np.array([0.75], np.float32), np.array([True]), equal_mass=True) == 0.25
    for bad in (1.5, -0.1, np.nan):
        with pytest.raises(ClipkitError, match="a probability lies outside 0 and 1"):
            calibration_error(np.array([0.5, bad]), np.array([True, True]))
    with pytest.raises(ClipkitError, match="0 bins hold nothing"):
        reliability(none, no, 0)


def made_up(scale, count=4000, classes=7, seed=0):
    """Cosines, and labels drawn with the probabilities that they have at a scale."""
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-0.2, 0.4, (count, classes)).astype(np.float32)
    shares = probabilities(cosines, scale).cumsum(axis=1)
    return cosines, (rng.random((count, 1)) > shares).sum(axis=1).clip(max=classes - 1)


@pytest.mark.parametrize("scale", [3.0, 14.3, 60.0, 400.0])
def test_a_known_temperature_is_recovered_and_no_prediction_changes(scale, monkeypatch):
    cosines, labels = made_up(scale)
    found = fit_temperature(cosines, labels)
    assert found == pytest.approx(1 / scale, rel=0.06 if scale < 100 else 0.15)
    for other in (0.97 * found, 1.03 * found, 0.01):
        assert log_loss(cosines, labels, found) <= log_loss(cosines, labels, other)
    assert log_loss(cosines, labels, found) == pytest.approx(
        sklearn_log_loss(labels, probabilities(cosines, 1 / found)), rel=1e-6
    )
    for factor in (100.0, -1.0, 0.0):
        shifted = cosines.astype(float) * abs(factor or 1) + factor
        assert fit_temperature(shifted, labels) == pytest.approx(found * abs(factor or 1), rel=1e-6)
    before, after = (probabilities(cosines, each) for each in (100.0, 1 / found))
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    right = cosines.argmax(axis=1) == labels
    assert calibration_error(after.max(axis=1), right) < 0.05
    if scale < 100:
        assert calibration_error(before.max(axis=1), right) > 2 * calibration_error(after.max(axis=1), right)
    monkeypatch.setattr(calibration, "CHUNK", 100)
    assert fit_temperature(cosines, labels) == pytest.approx(found, rel=1e-9)


def test_the_ends_of_the_temperature():
    logits = np.eye(3, dtype=np.float32)
    assert fit_temperature(logits, np.arange(3)) == COLDEST
    assert fit_temperature(-logits, np.arange(3)) == HOTTEST
    assert fit_temperature(np.zeros((4, 3)), np.arange(4) % 3) == HOTTEST
    assert fit_temperature(np.array([[1.0, 2.0]]), np.array([1])) == COLDEST
    assert log_loss(np.zeros((4, 3)), np.arange(4) % 3) == pytest.approx(np.log(3))
    assert np.isnan(log_loss(logits[:0], np.zeros(0, int)))


def test_what_gives_no_temperature_is_refused():
    logits = np.eye(3)
    with pytest.raises(ClipkitError, match="no samples; give labelled ones"):
        fit_temperature(logits[:0], np.zeros(0, int))
    for label in (3, -1):
        for function in (fit_temperature, log_loss):
            with pytest.raises(ClipkitError, match="there are 3 classes; labels are columns from 0 to 2"):
                function(logits, np.array([0, 1, label]))
    logits[1, 1] = np.nan
    with pytest.raises(ClipkitError, match="NaN or infinity, first in row 1"):
        fit_temperature(logits, np.arange(3))


@given(st.integers(0, 40), st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
@settings(max_examples=80, deadline=None)
def test_the_threshold_is_the_least_that_keeps_the_precision(count, seed, wanted):
    rng = np.random.default_rng(seed)
    scores = rng.integers(12, size=count) / 12
    right = rng.random(count) < scores
    thresholds, accepted, hits = risk_coverage(scores, right)
    assert thresholds.tolist() == sorted(set(scores.tolist()), reverse=True)
    assert accepted.tolist() == [(scores >= s).sum() for s in thresholds]
    assert hits.tolist() == [right[scores >= s].sum() for s in thresholds]
    found = precision_threshold(scores, right, wanted)
    kept = {s: right[scores >= s].mean() for s in np.unique(scores) if right[scores >= s].mean() >= wanted - 1e-9}
    if not kept:
        assert (found.threshold, found.accepted) == (float("inf"), 0)
        assert np.isnan(found.precision)
        return
    assert found.threshold == min(kept)
    assert found.precision == pytest.approx(kept[found.threshold])
    assert found.accepted == pytest.approx((scores >= found.threshold).mean())


@given(
    st.integers(0, 400), st.integers(0, 10**6), st.sampled_from([5, 10**6]), st.sampled_from([np.float32, np.float64])
)
@settings(max_examples=100, deadline=None)
def test_a_sure_threshold_is_above_a_sample_and_passes_the_exact_test(count, seed, levels, dtype):
    rng = np.random.default_rng(seed)
    scores = (rng.integers(levels, size=count) / levels).astype(dtype)
    right = rng.random(count) < 0.7 + 0.3 * scores
    found = precision_threshold(scores, right, 0.8, level=0.9)
    passed = scores >= found.threshold
    assert found.accepted == (passed.mean() if count else 0)
    if not passed.any():
        return
    assert found.precision == right[passed].mean()
    assert binomtest(int(right[passed].sum()), int(passed.sum())).proportion_ci(0.8).low >= 0.8
    below = scores[~passed]
    if len(below):  # the highest that is not accepted is the next number below the threshold
        assert np.nextafter(below.max(), dtype(2)) == dtype(found.threshold) > below.max()
    else:
        assert found.threshold == -np.inf


def test_all_may_be_accepted_and_nothing():
    scores = np.random.default_rng(0).random(500)
    assert precision_threshold(scores, np.ones(500, bool), 0.9, 0.95) == (-np.inf, 1, 1)
    for right, wanted, level in [(False, 0.1, 0.95), (True, 1.0, 0.95), (True, 0.999, 0.95)]:
        found = precision_threshold(scores, np.full(500, right), wanted, level)
        assert (found.threshold, found.accepted) == (np.inf, 0)
    # As few as can do: ln 0.05 / ln 0.9 is 28.4.
    for count, threshold in ((28, np.inf), (29, -np.inf)):
        assert precision_threshold(scores[:count], np.ones(count, bool), 0.9, 0.95).threshold == threshold
    for wanted in (0.0, 1.2):
        with pytest.raises(ClipkitError, match="cannot be had; give one above 0, up to 1"):
            precision_threshold(scores, scores > 0, wanted)
    with pytest.raises(ClipkitError, match="a level of 95.0 is no share"):
        precision_threshold(scores, scores > 0, 0.9, 95.0)


@pytest.mark.parametrize("count", [150, 1000])
def test_a_sure_threshold_keeps_its_word_on_others(count):
    """Of a score s the chance to be right is 0.5 + s / 2: what passes a threshold t is right with 0.75 + t / 4."""
    rng = np.random.default_rng(count)
    sure, usual, accepted = [], [], []
    for _ in range(400):
        scores = rng.random(count)
        right = rng.random(count) < 0.5 + scores / 2
        found = precision_threshold(scores, right, 0.85, level=0.9)
        sure.append(0.75 + max(found.threshold, 0) / 4 >= 0.85)
        accepted.append(found.accepted)
        usual.append(0.75 + precision_threshold(scores, right, 0.85).threshold / 4 >= 0.85)
    assert np.mean(sure) >= 0.9
    assert np.mean(usual) < 0.6  # which is why
    assert np.mean(accepted) > (0.05 if count == 150 else 0.35)  # 0.6 of all could be
