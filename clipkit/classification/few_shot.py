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
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.classification.logistic import CLOSE_LOSS, Linear, SweepOptions, choose_strength, fit_linear
from clipkit.core import ClipkitError
from clipkit.metrics import fit_temperature, inner_products, log_loss, on_grid

__all__ = ["FewShot", "Shots", "lifted", "linear", "prototypes", "tip_adapter"]

Array = np.ndarray
Setting = TypeVar("Setting", float, tuple[float, float])
WEIGHTS = tuple(step / 10 for step in range(1, 11))  # of the examples' means, beside the names' rest
ALPHAS = tuple(float(2**power) for power in range(-3, 8))  # of the cache, beside CLIP's logits
BETAS = (1.0, 2.0, 3.0, 5.5, 8.0, 12.0, 20.0, 40.0)  # how much less a less similar example tells
FEW_SHOT_STRENGTHS = tuple(
    10.0**power for power in range(-2, 6)
)  # weaker ones leave logits as they are: embeddings are short
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


@dataclass(frozen=True)
class Shots:
    """Labelled embeddings, and the class names that they are to improve on.

    Raises:
        ClipkitError: where there is no example, a number is not finite, or a label names no class.
    """

    features: Float[Array, "n dim"]
    """Unit-norm embeddings of the examples."""
    labels: Int[Array, " n"]
    """The class of each."""
    text: Float[Array, "classes dim"]
    """Unit-norm vectors of the classes' names."""
    scale: float
    """The factor on cosines."""
    copies: Int[Array, " n"] | None = None
    """A number for each example; those with the same, such as copies, are left out together."""

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise ClipkitError("there are no examples; give some of one class at least")
        if not (whole := np.isfinite(self.features).all(axis=1)).all():
            row = int(np.argmin(whole))
            raise ClipkitError(f"the examples hold NaN or infinity, first in row {row:,}; leave it out")
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.text):
            classes = len(self.text)
            raise ClipkitError(f"there are {classes} classes; labels are numbers from 0 to {classes - 1}")

    @cached_property
    def groups(self) -> Int[Array, " n"]:
        """Of the copies, as numbers from 0."""
        if self.copies is None:
            return np.arange(len(self.labels))
        return np.unique(self.copies, return_inverse=True)[1].reshape(-1)

    @cached_property
    def by_name(self) -> Float[Array, "n classes"]:
        """Cosines with the names, float64."""
        return self.features.astype(np.float64) @ self.text.T.astype(np.float64)

    @cached_property
    def has(self) -> Bool[Array, " classes"]:
        """Which classes have examples."""
        return np.isin(np.arange(len(self.text)), self.labels)

    @cached_property
    def judged(self) -> Bool[Array, " n"]:
        """Of which examples the class has others beside their own group."""
        of_class = np.bincount(self.labels[np.unique(self.groups, return_index=True)[1]], minlength=len(self.text))
        return of_class[self.labels] > 1

    def known(self) -> Bool[Array, "n classes"]:
        """For each example, which classes have any beside its own group."""
        known = np.repeat(self.has[None], len(self.labels), axis=0)
        known[np.arange(len(self.labels)), self.labels] = self.judged
        return known


def prototypes(shots: Shots) -> FewShot:
    """The nearest class mean (Snell et al. 2017, "Prototypical networks"), mixed with the names.

    The logits are ``scale * ((1 - weight) * cosine with the names + weight * cosine with the mean)``; the weight is the
    one under which the examples, left out one by one, are likeliest, at a temperature of 1 or whatever above suits;
    of weights that are about as good the least. It is 0.3 where no class has two examples.
    """
    labels, text, scale, has = shots.labels, shots.text, shots.scale, shots.has
    features = shots.features.astype(np.float64)
    sums = np.zeros((len(text), features.shape[1]))
    np.add.at(sums, labels, features)
    means = _unit(sums)
    by_mean = features @ means.T
    own = np.zeros((int(shots.groups.max()) + 1, features.shape[1]))
    np.add.at(own, shots.groups, features)
    rest = sums[labels] - own[shots.groups]  # copies are of one class
    by_mean[np.arange(len(labels)), labels] = (features * _unit(rest)).sum(axis=1)

    base, away = scale * shots.by_name, scale * (by_mean - shots.by_name)
    weight = _best(shots, base, ((weight, weight * away) for weight in WEIGHTS), USUAL["weight"])

    def logits(images: Array) -> Array:
        names = inner_products(images, text)
        return lifted(scale * names, scale * weight * (inner_products(images, means) - names), has[None])

    return FewShot(logits, lifted(base, weight * away, shots.known()), shots.judged, {"weight": weight})


def tip_adapter(shots: Shots, *, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS) -> FewShot:
    """Tip-Adapter, training-free (Zhang et al. 2022, equations 4 and 5): a cache of examples beside the names.

    The logits are ``scale * cosine with the names + alpha * sum of exp(-beta * (1 - cosine with the example))`` over
    the class's examples. Where classes have different numbers of them, each sum is brought to the mean number, so that
    an image is not of a class because more examples of it were at hand; with equal numbers it is the paper's. Alpha and
    beta are chosen as in `prototypes`.

    Args:
        shots: the examples.
        alphas, betas: to choose from; 1 and 5.5 where no class has two examples.
    """
    text, scale, has, groups = shots.text, shots.scale, shots.has, shots.groups
    features = shots.features.astype(np.float64)
    cache = _ExampleCache.of(shots)
    base = scale * shots.by_name

    def changes() -> Iterator[tuple[tuple[float, float], Array]]:
        for beta in betas:
            sums = cache.sums(features, beta, groups)
            yield from (((alpha, beta), alpha * sums) for alpha in alphas)

    alpha, beta = _best(shots, base, changes(), (USUAL["alpha"], USUAL["beta"]))
    # Once more: kept, the sums of all choices would be 88 of these.
    held_out = lifted(base, alpha * cache.sums(features, beta, groups), shots.known())

    def logits(images: Array) -> Array:
        return lifted(scale * inner_products(images, text), alpha * cache.sums(images, beta), has[None])

    return FewShot(logits, held_out, shots.judged, {"alpha": alpha, "beta": beta})


class _ExampleCache(NamedTuple):
    """Tip-Adapter's cache."""

    examples: Array
    """``[examples, dim]``, on the grid of `inner_products`."""
    of_class: Array
    """``[examples, classes]``: 1 for the class of each, else 0."""
    groups: Array
    """``[examples]``."""
    usual: float
    """How many examples a class has on the whole."""

    @classmethod
    def of(cls, shots: Shots) -> "_ExampleCache":
        count = len(shots.labels)
        of_class = np.zeros((count, len(shots.text)))
        of_class[np.arange(count), shots.labels] = 1
        return cls(on_grid(shots.features.astype(np.float64)), of_class, shots.groups, count / shots.has.sum())

    def sums(self, images: Array, beta: float, own: Array | None = None) -> Array:
        """``[n, classes]``: what the examples say of images, without those of an image's own group where it has one."""
        count, classes = self.of_class.shape
        parts = []
        rows = max(1, ROWS // count)
        for start in range(0, len(images), rows):
            near = np.exp(-beta * (1 - inner_products(images[start : start + rows], self.examples, gridded=True)))
            counts = np.broadcast_to(self.of_class.sum(axis=0), (len(near), classes))
            if own is not None:
                others = self.groups[None] != own[start : start + rows, None]
                near, counts = near * others, others @ self.of_class
            parts.append(inner_products(near, self.of_class.T) * (self.usual / np.maximum(counts, 1)))
        return np.concatenate(parts) if parts else np.zeros((0, classes))


def linear(shots: Shots) -> FewShot:
    """A linear probe that begins at the names and is pulled back to them: weights ``scale * text``, no bias.

    See `clipkit.classification.fit_linear`; how strongly it fits is chosen over five folds. Text-initialised probes are
    those of Li et al. 2022 ("ELEVATER") and Silva-Rodriguez et al. 2024 ("CLAP"), who show that the pull back is what
    makes them better than names with few examples, too.
    """
    features, labels, classes = shots.features, shots.labels, len(shots.text)
    start = Linear(shots.scale * shots.text.astype(np.float64), np.zeros(classes))
    judged = shots.judged
    if judged.any():
        sweep = SweepOptions(FEW_SHOT_STRENGTHS, missing=1 - len(np.unique(labels)) / classes)
        best = choose_strength(features, labels, classes, sweep, start=start, groups=shots.groups)
        strength, held_out, judged = best.strength, best.logits, best.judged
    else:
        strength, held_out = USUAL["strength"], features.astype(np.float64) @ start.weights.T
    fitted = fit_linear(features, labels, classes, strength=strength, start=start)

    def logits(images: Array) -> Array:
        return inner_products(images, fitted.weights) + fitted.bias

    return FewShot(logits, held_out, judged, {"strength": strength})


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


def _best(shots: Shots, base: Array, changes: Iterable[tuple[Setting, Array]], usual: Setting) -> Setting:
    """The setting under which what was held out is likeliest; the usual one where nothing is judged.

    As many classes have no examples, so much counts how examples fare whose class is held out with them. Of each
    setting there is what it changes of `base`, the logits by the names, see `lifted`; one at a time, as each takes as
    much as those.
    """
    judged, labels = shots.judged, shots.labels
    if not judged.any():
        return usual
    missing = 1 - shots.has.mean()
    known = shots.known()
    unknown = _without_own(known, labels) if missing else known

    def loss(change: Array) -> float:
        logits, truth = lifted(base, change, known)[judged], labels[judged]
        # Softened where they are too sure, so that examples are not chosen only to make up for a model that is. Made
        # surer, those that are all right would be equally good.
        heat = max(1.0, fit_temperature(logits, truth))
        met = log_loss(logits, truth, heat)
        return met if not missing else met + missing * (log_loss(lifted(base, change, unknown), labels, heat) - met)

    losses = {setting: loss(change) for setting, change in changes}
    # The gentlest of those that are about as good: they change the names least where the examples do not tell.
    most = min(losses.values()) + CLOSE_LOSS
    return min(setting for setting, loss in losses.items() if loss <= most)


def _without_own(known: Array, labels: Array) -> Array:
    """The same, as though the class of each example had none at all."""
    others = known.copy()
    others[np.arange(len(labels)), labels] = False
    return others


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
