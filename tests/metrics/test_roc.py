"""AUROC and the rate of false positives against scikit-learn, also as functions of how often each sample counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from clipkit.core import ClipkitError
from clipkit.metrics import auroc, fpr_at_tpr, intervals_of, lower_is_better, packed, unpacked
from clipkit.metrics.per_sample import PerSample
from clipkit.metrics.roc import auroc_of, fpr_at_tpr_of


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([1, 2, 1000]))
@settings(max_examples=60, deadline=None)
def test_telling_two_kinds_apart_is_scikit_learns(positive, negative, seed, levels):
    rng = np.random.default_rng(seed)
    truth = np.arange(positive + negative) < positive
    scores = rng.integers(levels, size=positive + negative) / levels + 0.1 * truth * (levels > 1)
    a, b = scores[truth], scores[~truth]
    assert auroc(a, b) == pytest.approx(roc_auc_score(truth, scores))
    assert auroc(a, b) == pytest.approx(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    for tpr in (0.5, 0.95, 1.0):
        at = np.argmax(true >= tpr - 1e-9)  # the first threshold that suffices; the curve is straight up to there
        share = min(1, (tpr - true[at - 1]) / (true[at] - true[at - 1]))
        assert fpr_at_tpr(a, b, tpr) == pytest.approx(false[at - 1] + share * (false[at] - false[at - 1]))
        if levels == 1000 and len(set(scores)) == len(scores):
            assert fpr_at_tpr(a, b, tpr) == pytest.approx(false[at])
    if levels == 1:
        assert auroc(a, b) == 0.5
        assert fpr_at_tpr(a, b) == pytest.approx(0.95)


def test_one_side_alone_has_no_curve():
    one, none = np.ones(3), np.ones(0)
    assert np.isnan([auroc(one, none), auroc(none, one), fpr_at_tpr(none, one), fpr_at_tpr(one, none)]).all()
    with pytest.raises(ClipkitError, match="a true positive rate of 0.0 is no share"):
        fpr_at_tpr(one, one, 0.0)
    for function in (auroc, fpr_at_tpr):
        for pair in ((one, np.array([np.nan])), (np.array([np.inf]), one)):
            with pytest.raises(ClipkitError, match="NaN or infinity"):
                function(*pair)


@given(st.integers(2, 30), st.integers(0, 10**6), st.sampled_from([1, 3, 1000]))
@settings(max_examples=60, deadline=None)
def test_a_draw_counts_as_samples_that_are_there_so_often(count, seed, levels):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(levels, size=count) / levels, rng.random(count) < 0.5
    counts = rng.multinomial(count, np.ones(count) / count, size=5)
    for statistic, figure in ((auroc_of, auroc), (fpr_at_tpr_of, fpr_at_tpr)):
        wanted = []
        for draw in counts:
            drawn, kind = np.repeat(scores, draw), np.repeat(positive, draw)
            wanted.append(figure(drawn[kind], drawn[~kind]))
        np.testing.assert_allclose(statistic(scores, positive)(counts), wanted, atol=1e-12)
        places = np.unique(scores, return_inverse=True)[1]
        np.testing.assert_allclose(statistic(places, positive)(counts), wanted, atol=1e-12)


def test_what_is_kept_of_each_sample_gives_the_figures_and_their_intervals():
    rng = np.random.default_rng(0)
    known, unknown = {"unknown": rng.normal(1, 1, 300)}, {"unknown": rng.normal(0, 1, 200)}
    samples = PerSample.of_unknown(known, unknown, "x")
    kept = packed(samples)
    assert kept is not None
    assert kept["arrays"]["unknown"]["dtype"] == "<u2"
    units, statistics = unpacked(kept).statistics()
    assert units == 500
    found = intervals_of(samples)
    for name, figure in (("unknown_auroc", auroc), ("unknown_fpr95", fpr_at_tpr)):
        value = figure(known["unknown"], unknown["unknown"])
        assert statistics[name](np.ones((1, 500), np.int64))[0] == pytest.approx(value)
        assert found[name].low < value < found[name].high
    assert found["unknown_auroc"].high - found["unknown_auroc"].low < 0.12
    assert lower_is_better("unknown_fpr95")
    assert not lower_is_better("unknown_auroc")
