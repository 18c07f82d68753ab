"""Linear probes: the least of their loss, as scikit-learn finds it, whatever the samples look like."""

import numpy as np
import pytest

from clipkit.classification import Linear, SweepOptions, choose_strength, fit_linear, folds_of
from clipkit.core import ClipkitError


def samples(n: int, dim: int, classes: int, seed: int = 0, apart: float = 1.0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])
    return rng.normal(size=(n, dim)) + apart * rng.normal(size=(classes, dim))[labels], labels


def slope(features, labels, fitted: Linear, strength: float, start: Linear):
    """The gradient of the loss, as it stands on paper."""
    logits = fitted.logits(features)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1
    return shares.T @ features + (fitted.weights - start.weights) / strength, shares.sum(0)


@pytest.mark.parametrize(("n", "dim", "classes"), [(41, 7, 3), (13, 37, 5), (97, 11, 4)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 300.0])
def test_it_is_what_scikit_learn_fits(n, dim, classes, strength):
    from sklearn.linear_model import LogisticRegression

    features, labels = samples(n, dim, classes)
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=20_000).fit(features, labels)
    ours = fit_linear(features, labels, classes, strength=strength)
    assert np.allclose(ours.weights, theirs.coef_, atol=2e-5 * max(1, np.abs(theirs.coef_).max()))
    assert np.allclose(ours.bias, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_of_two_classes_it_is_scikit_learns_at_twice_the_strength():
    from sklearn.linear_model import LogisticRegression

    features, labels = samples(37, 5, 2)
    theirs = LogisticRegression(C=2 * 0.7, tol=1e-10, max_iter=10_000).fit(features, labels)
    ours = fit_linear(features, labels, 2, strength=0.7)
    assert np.allclose(ours.weights[1] - ours.weights[0], theirs.coef_[0], atol=1e-5)
    assert ours.bias[1] - ours.bias[0] == pytest.approx(theirs.intercept_[0], abs=1e-5)


@pytest.mark.parametrize(("n", "dim"), [(9, 31), (31, 9)])
def test_the_penalty_pulls_to_the_start(n, dim):
    features, labels = samples(n, dim, 4, seed=3)
    rng = np.random.default_rng(1)
    start = Linear(rng.normal(size=(4, dim)), rng.normal(size=4))
    for strength in (1e-3, 1.0, 50.0):
        fitted = fit_linear(features, labels, 4, strength=strength, start=start)
        for part in slope(features, labels, fitted, strength, start):
            assert np.abs(part).max() < 1e-5
    near, far = (fit_linear(features, labels, 4, strength=s, start=start) for s in (1e-9, 1e3))
    assert np.allclose(near.weights, start.weights, atol=1e-6)
    assert (far.logits(features).argmax(1) == labels).all()


def test_a_class_without_samples_keeps_its_start_and_stands_as_it_did():
    features, labels = samples(40, 6, 3, seed=5)
    labels = np.array([0, 2, 3])[labels]  # none of 1 and 4
    rng = np.random.default_rng(2)
    start = Linear(rng.normal(size=(5, 6)), rng.normal(size=5))
    fitted = fit_linear(features, labels, 5, start=start)
    for at in (1, 4):
        assert np.array_equal(fitted.weights[at], start.weights[at])
        assert fitted.bias[at] == start.bias[at]
    met = [0, 2, 3]
    assert np.allclose(fitted.weights[met].sum(0), start.weights[met].sum(0))
    assert fitted.bias[met].sum() == pytest.approx(start.bias[met].sum())
    alone = fit_linear(features, np.searchsorted(met, labels), 3)
    bare = fit_linear(features, labels, 5)
    assert np.array_equal(bare.weights[met], alone.weights)
    assert not bare.weights[[1, 4]].any()
    assert (bare.bias[[1, 4]] == -np.inf).all()


def test_samples_that_tell_nothing_are_no_trouble():
    labels = np.array([0, 0, 0, 1, 2, 2])
    same = fit_linear(np.ones((6, 4)), labels, 3, strength=1.0)
    shares = np.exp(same.logits(np.ones((1, 4))))[0]
    assert np.allclose(shares / shares.sum(), [3 / 6, 1 / 6, 2 / 6], atol=1e-6)  # the bias alone
    one = fit_linear(np.ones((3, 4)), np.zeros(3, int), 1)
    assert (one.weights.any(), one.bias.tolist()) == (False, [0.0])
    single = fit_linear(np.eye(4), np.array([0, 1, 2, 3]), 4, strength=1e6)  # separable, hardly penalised
    assert (single.logits(np.eye(4)).argmax(1) == np.arange(4)).all()
    assert np.isfinite(single.weights).all()
    huge = fit_linear(1e6 * np.eye(3), np.arange(3), 3)
    assert (huge.logits(np.eye(3)).argmax(1) == np.arange(3)).all()


def test_float16_and_float32_are_fitted_in_float64():
    features, labels = samples(30, 5, 3)
    for dtype in (np.float16, np.float32):
        rounded = features.astype(dtype)
        fitted = fit_linear(rounded, labels, 3)
        assert fitted.weights.dtype == np.float64
        assert np.array_equal(fitted.weights, fit_linear(rounded.astype(np.float64), labels, 3).weights)


def test_what_cannot_be_fitted_is_refused():
    features, labels = samples(10, 4, 3)
    wrong = features.copy()
    wrong[7, 2] = np.nan
    for call, told in [
        (lambda: fit_linear(wrong, labels, 3), "first in row 7"),
        (lambda: fit_linear(features[:0], labels[:0], 3), "no samples"),
        (lambda: fit_linear(features, labels, 2), "from 0 to 1"),
        (lambda: fit_linear(features, labels - 1, 3), "from 0 to 2"),
        (lambda: fit_linear(features, labels, 3, strength=0.0), "above 0"),
        (lambda: fit_linear(features, labels, 3, strength=float("nan")), "above 0"),
        (lambda: fit_linear(features, labels, 3, start=Linear(np.zeros((3, 5)), np.zeros(3))), "3 × 4 are wanted"),
        (lambda: fit_linear(features, labels, 3, start=Linear(np.full((3, 4), np.nan), np.zeros(3))), "start holds"),
        (lambda: choose_strength(features[:3], np.arange(3), 3), "no class has two samples"),
        (lambda: choose_strength(features, labels, 3, SweepOptions(folds=1)), "hold nothing out"),
    ]:
        with pytest.raises(ClipkitError, match=told):
            call()


def test_the_strength_is_the_one_with_the_least_loss_held_out():
    features, labels = samples(60, 20, 4, apart=0.7)
    start = Linear(np.random.default_rng(0).normal(size=(4, 20)), np.zeros(4))
    grid = [0.001, 0.03, 1.0, 30.0]
    found = choose_strength(features, labels, 4, SweepOptions(grid, folds=4, seed=3), start=start)
    fold = folds_of(labels, 4, seed=3)
    losses, held = [], []
    for strength in grid:
        logits = np.empty((60, 4))
        for at in range(4):  # each by a fit of its own, from the start
            others = fold != at
            fitted = fit_linear(features[others], labels[others], 4, strength=strength, start=start)
            logits[~others] = fitted.logits(features[~others])
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.log(shares[np.arange(60), labels]).mean())
        held.append(logits)
    tried = ~np.isnan(found.losses)
    assert np.allclose(found.losses[tried], np.array(losses)[tried], atol=1e-4)
    assert tried[: int(np.argmin(losses)) + 3].all()
    best = next(at for at in range(4) if losses[at] < min(losses) + 0.01)
    assert found.strength == grid[best]
    assert np.allclose(found.logits, held[best], atol=1e-2)
    assert found.judged.all()
    again = choose_strength(features, labels, 4, SweepOptions(grid, folds=4, seed=3), start=start)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_strength_is_weaker_where_classes_are_missing():
    """Half of the loss is of samples whose class is held out, by fits that never saw it."""
    features, labels = samples(48, 20, 6, apart=0.6)
    rng = np.random.default_rng(1)
    means = np.stack([features[labels == at].mean(0) for at in range(6)])
    start = Linear(0.1 * (means + rng.normal(size=means.shape)), np.zeros(6))
    grid = [0.001, 0.01, 0.1, 1.0]
    plain, half = (choose_strength(features, labels, 6, SweepOptions(grid, missing=m), start=start) for m in (0.0, 0.5))
    fold = labels % 5
    for at, strength in enumerate(grid[:2]):
        logits = np.empty((48, 6))
        for number in range(5):
            out = fold == number
            fitted = fit_linear(features[~out], labels[~out], 6, strength=strength, start=start)
            logits[out] = fitted.logits(features[out])
        unmet = -np.log((np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(48), labels]).mean()
        assert half.losses[at] == pytest.approx((plain.losses[at] + unmet) / 2, abs=1e-3)
    assert half.strength <= plain.strength


def test_a_sample_without_its_like_is_not_judged():
    features, labels = samples(12, 5, 3)
    labels[:] = [0] * 6 + [1] * 5 + [2]
    found = choose_strength(features, labels, 3)
    assert found.judged.tolist() == [True] * 11 + [False]
    assert np.isfinite(found.logits[:, :2]).all()


def test_the_search_ends_where_stronger_fits_only_grow_worse():
    features, labels = samples(40, 30, 3, apart=0.0)  # noise: the weakest is the best
    found = choose_strength(features, labels, 3, SweepOptions([1e-4, 1e-2, 1.0, 1e2, 1e4]))
    assert found.strength == 1e-4
    assert np.isnan(found.losses).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("seed", range(3))
def test_folds_hold_as_many_of_every_class_and_keep_groups_together(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(6, size=203)
    fold = folds_of(labels, 5, seed=seed)
    assert np.array_equal(fold, folds_of(labels, 5, seed=seed))
    table = np.zeros((6, 5), int)
    np.add.at(table, (labels, fold), 1)
    assert (np.ptp(table, axis=1) <= 1).all()
    assert np.ptp(table.sum(0)) <= 1
    groups = rng.integers(40, size=203) * 6 + labels
    fold = folds_of(labels, 5, groups=groups, seed=seed)
    for group in np.unique(groups):
        assert len(set(fold[groups == group])) == 1
    assert set(folds_of(np.array([0, 0, 1]), 5)) == {0, 1}  # of two samples no three folds can be made
