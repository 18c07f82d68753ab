"""Linear probes: multinomial logistic regression on embeddings, from zero or from weights that are known to be good."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipkit.core import ClipkitError

__all__ = ["CLOSE_LOSS", "STRENGTHS", "Linear", "Sweep", "SweepOptions", "choose_strength", "fit_linear", "folds_of"]

Array = np.ndarray
STRENGTHS = tuple(10.0**power for power in range(-6, 7))  # CLIP sweeps over the same range
CLOSE_LOSS = 0.01  # nats: losses no further apart are about as good, and the gentler choice is taken
PATIENCE = 2  # strengths that grow worse in turn end the search
STEPS = 5000  # of L-BFGS; the strongest fits of separable samples take some hundred
GRADIENT, ROUGHLY = 1e-8, 1e-6  # of the mean loss, at which a fit is done; when strengths are compared


class Linear(NamedTuple):
    """Logits are ``features @ weights.T + bias``; float64."""

    weights: Float[Array, "classes dim"]
    bias: Float[Array, " classes"]

    def logits(self, features: Float[Array, "n dim"]) -> Float[Array, "n classes"]:
        """Of samples, float64."""
        return features @ self.weights.T + self.bias


def fit_linear(
    features: Float[Array, "n dim"],
    labels: Int[Array, " n"],
    classes: int,
    *,
    strength: float = 1.0,
    start: Linear | None = None,
) -> Linear:
    """Fit a softmax to labelled samples: ``sum of -log p(label) + |weights - start|² / (2 strength)``, least.

    It is convex; L-BFGS finds its least in float64. The bias is not penalised. Without a start it is scikit-learn's
    ``LogisticRegression(C=strength)`` for three classes and more; for two, which that one tells by one vector where
    there are two here, ``C=2 * strength``. Where there are fewer samples than dimensions the fit runs in the space that
    the samples span, which the weights cannot leave, so its cost grows with the samples and not with the dimensions.

    The classes' weights and biases keep their sums over those that have samples. So a class without samples, which is
    left out of the fit and keeps its start, stands to the others on the whole as it did.

    Args:
        features: of the samples, of any norm.
        labels: the class of each, 0 to `classes` - 1.
        classes: how many there are.
        strength: how much the samples count against the start.
        start: where the penalty pulls to; zero when not given.

    Returns:
        Without a start a class that has no sample has the bias minus infinity: it is never predicted.

    Raises:
        ClipkitError: where there is no sample, a number is not finite, a label names no class, or the start is
            of another shape.
    """
    _refuse(features, labels, classes, start)
    if not (strength > 0 and np.isfinite(strength)):
        raise ClipkitError(f"a strength of {strength:g} fits nothing; give one above 0, such as 1")
    return next(_fit(features.astype(np.float64), labels, classes, [strength], start, GRADIENT))


def _refuse(features: Array, labels: Array, classes: int, start: Linear | None) -> None:
    if not len(labels):
        raise ClipkitError("nothing can be fitted to no samples; give labelled ones")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ClipkitError(f"there are {classes} classes; labels are numbers from 0 to {classes - 1}")
    if not (whole := np.isfinite(features).all(axis=1)).all():
        raise ClipkitError(
            f"the features hold NaN or infinity, first in row {int(np.argmin(whole)):,}; leave the sample out"
        )
    if start is not None:
        if start.weights.shape != (classes, features.shape[1]) or start.bias.shape != (classes,):
            shape = " × ".join(map(str, start.weights.shape))
            raise ClipkitError(f"the start has weights of {shape}, and {classes} × {features.shape[1]} are wanted")
        if not (np.isfinite(start.weights).all() and np.isfinite(start.bias).all()):
            raise ClipkitError("the start holds NaN or infinity")


def _fit(
    features: Array, labels: Array, classes: int, strengths: Sequence[float], start: Linear | None, gradient: float
) -> Iterator[Linear]:
    """A fit for each strength, when it is asked for, each begun where the one before it ended."""
    met = np.unique(labels)
    zero = Linear(np.zeros((classes, features.shape[1])), np.where(np.isin(np.arange(classes), met), 0.0, -np.inf))
    begin = zero if start is None else Linear(*(part.astype(np.float64) for part in start))
    if len(met) < 2:
        yield from [begin] * len(strengths)  # which nothing tells from what it is not
        return
    basis = np.linalg.qr(features.T)[0] if len(features) < features.shape[1] else None
    inside = features if basis is None else features @ basis
    given = features @ begin.weights[met].T + begin.bias[met]
    own = np.searchsorted(met, labels)
    moved = np.zeros((len(met), inside.shape[1] + 1))
    for strength in strengths:
        moved = _least(inside, own, given, strength, moved, gradient)
        change = moved[:, :-1] if basis is None else moved[:, :-1] @ basis.T
        weights, bias = begin.weights.copy(), begin.bias.copy()
        weights[met] += change
        bias[met] += moved[:, -1]
        yield Linear(weights, bias)


def _least(features: Array, labels: Array, given: Array, strength: float, moved: Array, gradient: float) -> Array:
    """What is added to weights and biases, ``[classes, dim + 1]``, where the loss is least."""
    from scipy.optimize import minimize  # takes a quarter of a second

    count = len(labels)
    every = np.arange(count)

    def loss(flat: Array) -> tuple[float, Array]:
        change = flat.reshape(moved.shape)
        logits = given + features @ change[:, :-1].T + change[:, -1]
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        sums = shares.sum(axis=1)
        total = (np.log(sums) - logits[every, labels]).sum() + (change[:, :-1] ** 2).sum() / (2 * strength)
        shares /= sums[:, None]
        shares[every, labels] -= 1
        slope = np.concatenate([shares.T @ features + change[:, :-1] / strength, shares.sum(axis=0)[:, None]], axis=1)
        return float(total / count), (slope / count).ravel()

    # The default bound on how little a step gains would end weak fits of few samples early.
    limits = {"maxiter": STEPS, "maxfun": 2 * STEPS, "gtol": gradient, "ftol": 1e-15, "maxcor": 20}
    return minimize(loss, moved.ravel(), jac=True, method="L-BFGS-B", options=limits).x.reshape(moved.shape)


class Sweep(NamedTuple):
    """What cross-validation says of strengths."""

    strength: float
    """The weakest of those with about the least loss: 0.01 nats more at most."""
    losses: Float[Array, " strengths"]
    """The mean of -log p of the held-out samples, in nats; NaN for strengths beyond two that grew worse in turn."""
    logits: Float[Array, "n classes"]
    """Of each sample at the chosen strength, by a fit to the other folds."""
    judged: Array
    """bool ``[n]``: whose class has samples in other folds; the losses are of these."""


@dataclass(frozen=True)
class SweepOptions:
    """Which strengths are compared, and on what."""

    strengths: Sequence[float] = STRENGTHS
    """To choose from, rising."""
    folds: int = 5
    """See `folds_of`, also of the seed."""
    seed: int = 0
    missing: float = 0.0
    """Share of the loss that is of samples whose class is held out with them, so that it has only its start: such as
    the share of classes that have no samples, which a strong fit would forget. For fits with a start."""


def choose_strength(
    features: Float[Array, "n dim"],
    labels: Int[Array, " n"],
    classes: int,
    options: SweepOptions | None = None,
    *,
    start: Linear | None = None,
    groups: Int[Array, " n"] | None = None,
) -> Sweep:
    """Choose how strongly `fit_linear` is to fit, by the loss on folds that are held out (see `folds_of`).

    CLIP (Radford et al. 2021, appendix A.3) sweeps over the same range on a validation set, by accuracy; of few samples
    many strengths have the same, which the loss tells apart.

    Args:
        features, labels, classes, start: see `fit_linear`.
        options: which strengths, and on what they are compared.
        groups: see `folds_of`.

    Raises:
        ClipkitError: as `fit_linear`, or where no class has samples in two folds.
    """
    options = options or SweepOptions()
    strengths, missing = options.strengths, options.missing
    _refuse(features, labels, classes, start)
    fold = folds_of(labels, options.folds, groups=groups, seed=options.seed)
    features = features.astype(np.float64)
    judged = np.zeros(len(labels), bool)
    for number in np.unique(fold):
        judged[fold == number] = np.isin(labels[fold == number], labels[fold != number])
    if not judged.any():
        raise ClipkitError("no class has two samples, so nothing can be held out; give more, or name the strength")
    held_out = _held_out(features, labels, classes, strengths, start, fold)
    by_class = np.unique(labels, return_inverse=True)[1] % options.folds
    unmet = _held_out(features, labels, classes, strengths, start, by_class) if missing else None
    losses, logits = np.full(len(strengths), np.nan), []
    for at, each in enumerate(held_out):
        logits.append(each)
        losses[at] = _loss(each[judged], labels[judged])
        if unmet is not None:
            losses[at] += missing * (_loss(next(unmet), labels) - losses[at])
        if at - int(np.nanargmin(losses)) == PATIENCE:  # the strongest take longest, and the loss has one valley
            break
    best = int(np.flatnonzero(losses <= np.nanmin(losses) + CLOSE_LOSS)[0])
    return Sweep(float(strengths[best]), losses, logits[best], judged)


def _held_out(
    features: Array, labels: Array, classes: int, strengths: Sequence[float], start: Linear | None, fold: Array
) -> Iterator[Array]:
    """For each strength, when it is asked for, the logits of all samples, each by a fit to the other folds."""
    folds = [fold == number for number in np.unique(fold)]
    fits = [_fit(features[~out], labels[~out], classes, strengths, start, ROUGHLY) for out in folds]
    for _ in strengths:
        logits = np.empty((len(labels), classes))
        for out, fit in zip(folds, fits, strict=True):
            logits[out] = next(fit).logits(features[out])
        yield logits


def _loss(logits: Array, labels: Array) -> float:
    logits = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]).mean())


def folds_of(
    labels: Int[Array, " n"], folds: int = 5, *, groups: Int[Array, " n"] | None = None, seed: int = 0
) -> Int[Array, " n"]:
    """Deal samples to folds so that each has about as many of every class (Kohavi 1995).

    Args:
        labels: the class of each.
        folds: how many; fewer where no class has so many samples.
        groups: a number for each sample; those with the same, such as pictures of one thing, go into one fold.
        seed: of the dealing.

    Returns:
        0 to `folds` - 1 for each.

    Raises:
        ClipkitError: for fewer than two folds.
    """
    if folds < 2:
        raise ClipkitError(f"{folds} folds hold nothing out; 5 are usual")
    rng = np.random.default_rng(seed)
    unit = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    first = np.unique(unit, return_index=True)[1]
    label_of = labels[first]
    order = rng.permutation(len(first))
    order = order[np.argsort(label_of[order], kind="stable")]
    used = min(folds, int(np.unique(label_of, return_counts=True)[1].max(initial=1)))
    dealt = np.empty(len(first), np.int64)
    dealt[order] = np.arange(len(first)) % max(used, 1)
    return dealt[unit]
