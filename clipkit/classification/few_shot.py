"""Few-shot classifiers: labelled examples improve on what the class names say, without training the model.

Each gives logits that are the names' own, ``scale * cosine``, changed by what the examples tell. A class that has no
examples keeps its names, and its logit is lifted by the mean change of the classes that have some: examples and names
lie apart in the space (Liang et al. 2022, "Mind the gap"), so a class that is told by names only would otherwise stand
behind all others, or before them. Where there are such classes, what the methods leave open is chosen for them too:
by examples whose whole class is held out.

What the methods leave open is chosen by the examples themselves, each classified by the others. That also gives logits
of the examples that are as good as those of other images, to which a temperature or a threshold can be fitted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.classification.logistic import CLOSE, Linear, choose_strength, fit_linear
from clipkit.core import ClipkitError
from clipkit.metrics import fit_temperature, inner_products, log_loss, on_grid

__all__ = ["ALPHAS", "BETAS", "STRENGTHS", "WEIGHTS", "FewShot", "lifted", "linear", "prototypes", "tip_adapter"]

Array = np.ndarray
Choice = TypeVar("Choice", float, tuple[float, float])
WEIGHTS = tuple(step / 10 for step in range(1, 11))  # of the examples' means, beside the names' rest
ALPHAS = tuple(float(2**power) for power in range(-3, 8))  # of the cache, beside CLIP's logits
BETAS = (1.0, 2.0, 3.0, 5.5, 8.0, 12.0, 20.0, 40.0)  # how much less a less similar example tells
STRENGTHS = tuple(10.0**power for power in range(-2, 6))  # weaker ones leave logits as they are: embeddings are short
# Where nothing can be held out: alpha and beta are the paper's, the others did well with one example of each class.
USUAL = {"weight": 0.3, "alpha": 1.0, "beta": 5.5, "strength": 10.0}
ROWS = 1 << 22  # similarities at a time, in float32


class FewShot(NamedTuple):
    """A classifier that learned from examples."""

    logits: Callable[[Float[Array, "n dim"]], Float[Array, "n classes"]]
    """Of unit-norm embeddings, float64."""
    held_out: Float[Array, "examples classes"]
    """Of the examples, each by what the others tell."""
    judged: Bool[Array, " examples"]
    """Whose class has other examples, so that its held-out logits are such as other images get."""
    chosen: dict[str, float]
    """What was chosen."""


def prototypes(
    features: Float[Array, "n dim"],
    labels: Int[Array, " n"],
    text: Float[Array, "classes dim"],
    scale: float,
    *,
    groups: Int[Array, " n"] | None = None,
    weights: Sequence[float] = WEIGHTS,
) -> FewShot:
    """The nearest class mean (Snell et al. 2017, "Prototypical networks"), mixed with the names.

    The logits are ``scale * ((1 - weight) * cosine with the names + weight * cosine with the mean)``; the weight is the
    one under which the examples, left out one by one, are likeliest, at a temperature of 1 or whatever above suits;
    of weights that are about as good the least.

    Args:
        features: unit-norm embeddings of the examples.
        labels: the class of each.
        text: unit-norm vectors of the classes' names.
        scale: the factor on cosines.
        groups: a number for each example; those with the same, such as copies, are left out together.
        weights: to choose from; 0.3 where no class has two examples.

    Raises:
        ClipkitError: where there is no example, or a number is not finite.
    """
    groups = _checked(features, labels, text, groups)
    features, classes = features.astype(np.float64), len(text)
    sums = np.zeros((classes, features.shape[1]))
    np.add.at(sums, labels, features)
    means = _unit(sums)
    has = np.isin(np.arange(classes), labels)
    by_name = features @ text.T.astype(np.float64)
    by_mean = features @ means.T
    own = np.zeros((int(groups.max()) + 1, features.shape[1]))
    np.add.at(own, groups, features)
    rest = sums[labels] - own[groups]  # copies are of one class
    known, judged = _known_to(labels, groups, has)
    by_mean[np.arange(len(labels)), labels] = (features * _unit(rest)).sum(axis=1)

    base, away = scale * by_name, scale * (by_mean - by_name)
    tried = ((weight, weight * away) for weight in weights)
    best = _best(base, tried, known, labels, judged, has, USUAL["weight"])

    def logits(some: Array) -> Array:
        names = inner_products(some, text)
        return lifted(scale * names, scale * best * (inner_products(some, means) - names), has[None])

    return FewShot(logits, lifted(base, best * away, known), judged, {"weight": best})


def tip_adapter(
    features: Float[Array, "n dim"],
    labels: Int[Array, " n"],
    text: Float[Array, "classes dim"],
    scale: float,
    *,
    groups: Int[Array, " n"] | None = None,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> FewShot:
    """Tip-Adapter, training-free (Zhang et al. 2022, equations 4 and 5): a cache of examples beside the names.

    The logits are ``scale * cosine with the names + alpha * sum of exp(-beta * (1 - cosine with the example))`` over
    the class's examples. Where classes have different numbers of them, each sum is brought to the mean number, so that
    an image is not of a class because more examples of it were at hand; with equal numbers it is the paper's. Alpha and
    beta are chosen as in `prototypes`.

    Args:
        features, labels, text, scale, groups: see `prototypes`.
        alphas, betas: to choose from; 1 and 5.5 where no class has two examples.

    Raises:
        ClipkitError: see `prototypes`.
    """
    groups = _checked(features, labels, text, groups)
    classes = len(text)
    has = np.isin(np.arange(classes), labels)
    features = features.astype(np.float64)
    base = scale * (features @ text.T.astype(np.float64))
    known, judged = _known_to(labels, groups, has)
    hot = np.zeros((len(labels), classes))
    hot[np.arange(len(labels)), labels] = 1
    usual = len(labels) / has.sum()
    examples = on_grid(features)

    def cache(some: Array, beta: float, mine: Array | None = None) -> Array:
        """``[n, classes]``: what the examples tell, those of an image's own group left out where it has one."""
        parts = []
        rows = max(1, ROWS // len(labels))
        for start in range(0, len(some), rows):
            near = np.exp(-beta * (1 - inner_products(some[start : start + rows], examples, gridded=True)))
            counts = np.broadcast_to(hot.sum(axis=0), (len(near), classes))
            if mine is not None:
                others = groups[None] != mine[start : start + rows, None]
                near, counts = near * others, others @ hot
            parts.append(inner_products(near, hot.T) * (usual / np.maximum(counts, 1)))
        return np.concatenate(parts) if parts else np.zeros((0, classes))

    def tried() -> Iterator[tuple[tuple[float, float], Array]]:
        for beta in betas:
            told = cache(features, beta, groups)
            yield from (((alpha, beta), alpha * told) for alpha in alphas)

    alpha, beta = _best(base, tried(), known, labels, judged, has, (USUAL["alpha"], USUAL["beta"]))
    held = lifted(base, alpha * cache(features, beta, groups), known)  # again: kept, they would be 88 of these

    def logits(some: Array) -> Array:
        return lifted(scale * inner_products(some, text), alpha * cache(some, beta), has[None])

    return FewShot(logits, held, judged, {"alpha": alpha, "beta": beta})


def linear(
    features: Float[Array, "n dim"],
    labels: Int[Array, " n"],
    text: Float[Array, "classes dim"],
    scale: float,
    *,
    groups: Int[Array, " n"] | None = None,
    seed: int = 0,
) -> FewShot:
    """A linear probe that begins at the names and is pulled back to them: weights ``scale * text``, no bias.

    See `clipkit.classification.fit_linear`; how strongly it fits is chosen over five folds. Text-initialised probes are
    those of Li et al. 2022 ("ELEVATER") and Silva-Rodriguez et al. 2024 ("CLAP"), who show that the pull back is what
    makes them better than names with few examples, too.

    Args:
        features, labels, text, scale, groups: see `prototypes`.
        seed: of the folds.

    Raises:
        ClipkitError: see `prototypes`.
    """
    groups = _checked(features, labels, text, groups)
    classes = len(text)
    start = Linear(scale * text.astype(np.float64), np.zeros(classes))
    _, judged = _known_to(labels, groups, np.isin(np.arange(classes), labels))
    if judged.any():
        missing = 1 - len(np.unique(labels)) / classes
        how = {"strengths": STRENGTHS, "groups": groups, "missing": missing, "seed": seed}
        sweep = choose_strength(features, labels, classes, start=start, **how)
        strength, held, judged = sweep.strength, sweep.logits, sweep.judged
    else:
        strength, held = USUAL["strength"], features.astype(np.float64) @ start.weights.T
    fitted = fit_linear(features, labels, classes, strength=strength, start=start)

    def logits(some: Array) -> Array:
        return inner_products(some, fitted.weights) + fitted.bias

    return FewShot(logits, held, judged, {"strength": strength})


def lifted(
    base: Float[Array, "n classes"], change: Float[Array, "n classes"], known: Bool[Array, "m classes"]
) -> Float[Array, "n classes"]:
    """Logits and what examples change of them; classes without examples change by the mean of the others.

    Args:
        base: by the names.
        change: by the examples.
        known: which classes have examples, for each image or in one row for all.
    """
    known = np.broadcast_to(known, base.shape)
    mean = np.where(known, change, 0).sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    return base + np.where(known, change, mean)


def _checked(features: Array, labels: Array, text: Array, groups: Array | None) -> Array:
    """The groups as numbers from 0."""
    if not len(labels):
        raise ClipkitError("there are no examples; give some of one class at least")
    if not (whole := np.isfinite(features).all(axis=1)).all():
        raise ClipkitError(f"the examples hold NaN or infinity, first in row {int(np.argmin(whole)):,}; leave it out")
    if not 0 <= labels.min() <= labels.max() < len(text):
        raise ClipkitError(f"there are {len(text)} classes; labels are numbers from 0 to {len(text) - 1}")
    return np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)


def _known_to(labels: Array, groups: Array, has: Array) -> tuple[Array, Array]:
    """For each example, which classes have any beside its own group: bool ``[n, classes]``; and whether its own has."""
    known = np.repeat(has[None], len(labels), axis=0)
    groups_of = np.bincount(labels[np.unique(groups, return_index=True)[1]], minlength=len(has))
    judged = groups_of[labels] > 1
    known[np.arange(len(labels)), labels] = judged
    return known, judged


def _without_own(known: Array, labels: Array) -> Array:
    """The same, as though the class of each example had none at all."""
    found = known.copy()
    found[np.arange(len(labels)), labels] = False
    return found


def _best(
    base: Array,
    tried: Iterable[tuple[Choice, Array]],
    known: Array,
    labels: Array,
    judged: Array,
    has: Array,
    usual: Choice,
) -> Choice:
    """The choice under which what was held out is likeliest; the usual one where nothing is judged.

    As many classes have no examples, so much counts how examples fare whose class is held out with them. Of each choice
    there is what it changes of the logits by the names, see `lifted`; one at a time, as each takes as much as those.
    """
    if not judged.any():
        return usual
    missing = 1 - has.mean()

    unknown = _without_own(known, labels) if missing else known

    def loss(change: Array) -> float:
        some = labels[judged]
        logits = lifted(base, change, known)[judged]
        # Softened where they are too sure, so that examples are not chosen only to make up for a model that is. Made
        # surer, those that are all right would be equally good.
        heat = max(1.0, fit_temperature(logits, some))
        met = log_loss(logits, some, heat)
        return met if not missing else met + missing * (log_loss(lifted(base, change, unknown), labels, heat) - met)

    losses = {choice: loss(change) for choice, change in tried}
    # The gentlest of those that are about as good: they change the names least where the examples do not tell.
    least = min(losses.values()) + CLOSE
    return min(choice for choice, loss in losses.items() if loss <= least)


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
