"""Probes on an image's and a text's embedding together: what both tell that neither tells alone.

The two classic ways (Baltrušaitis, Ahuja & Morency 2019, section 6.1), as pure functions over arrays: early fusion, one
linear head on both embeddings side by side; and late fusion, a head on each and their answers joined. The third, a
learned attention, is `clipkit.evaluation.probe.attention`.

Any sample may lack a side. What stands in that row is never used, not even multiplied by zero. The answer is then that
of the head on the side that is there: a head for each pattern of what there is does better than one for all of them
with something put in for what is missing (Saar-Tsechansky & Provost 2007). Of a sample with no side it is how frequent
the classes are.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.classification import Linear, SweepOptions, choose_strength, fit_linear
from clipkit.core import ClipkitError
from clipkit.metrics import fit_temperature, log_loss

__all__ = [
    "IMAGE",
    "TEXT",
    "FusionHeads",
    "Head",
    "PairedEmbeddings",
    "choose_weight",
    "early_fusion",
    "fit_head",
    "fit_heads",
    "late_fusion",
    "pooled",
    "prior_of",
    "side_alone",
]

Array = np.ndarray
IMAGE, TEXT = 0, 1
STRENGTH_FOLDS = 3
JUDGES, PER_CLASS = 2000, 20  # samples that choose a strength: so many, or so many of each class where that is more
SWEPT = 20_000_000  # logits that these may have: 160 MB for each strength
IMAGE_WEIGHTS = np.linspace(0, 1, 41)  # of the image in late fusion


class PairedEmbeddings(NamedTuple):
    """Embeddings of both sides, row by row of one sample."""

    image: Float[Array, "n image_dim"]
    text: Float[Array, "n text_dim"]
    there: Bool[Array, "n 2"]
    """Whether a sample has an image, and a text; anything may stand in the row of what it lacks."""

    def only(self, side: int) -> "PairedEmbeddings":
        """The same with the other side missing everywhere."""
        return self._replace(there=self.there & (np.arange(2) == side))

    def take(self, rows: Array) -> "PairedEmbeddings":
        """Some of them, by their places."""
        return PairedEmbeddings(self.image[rows], self.text[rows], self.there[rows])

    def side(self, number: int) -> Array:
        """The embeddings of the images (0) or the texts (1)."""
        return self.text if number == TEXT else self.image


class Head(NamedTuple):
    """A linear head, and what it is worth on samples that it was not fitted to."""

    linear: Linear
    strength: float
    """That was chosen; see `clipkit.classification.fit_linear`."""
    fitted: int
    """Of the samples that it was fitted to."""
    judged: Int[Array, " judged"]
    """The samples that the strength was chosen by; none where nothing could be held out."""
    logits: Float[Array, "judged classes"]
    """Of these, each by a head that was fitted to others."""

    def log_shares(self, logits: Float[Array, "n classes"]) -> Float[Array, "n classes"]:
        """Logarithms of the probabilities. Of a class that it has never met it is 1 in so many samples, and not 0,
        which would overrule whatever the other side says."""
        with np.errstate(invalid="ignore"):
            shares = _log_shares(logits)
        return _log_shares(np.where(np.isneginf(shares), -np.log(self.fitted + 1), shares))

    def __call__(self, features: Float[Array, "n dim"]) -> Float[Array, "n classes"]:
        """Logarithms of the probabilities of samples."""
        return self.log_shares(self.linear.logits(features))


class FusionHeads(NamedTuple):
    """What early and late fusion need."""

    image: Head
    text: Head
    joint: Head
    """On both embeddings side by side."""
    weight: float
    """Of the image in late fusion, see `choose_weight`; that of the text is 1 less it."""
    prior: Float[Array, " classes"]
    """See `prior_of`."""


def prior_of(labels: Int[Array, " n"], classes: int) -> Float[Array, " classes"]:
    """The logarithms of the classes' shares of the samples. A class without samples counts as if it had one."""
    return _log_shares(np.log(np.maximum(np.bincount(labels, minlength=classes), 1)))


def _log_shares(logits: Float[Array, "*n classes"]) -> Float[Array, "*n classes"]:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def fit_head(
    features: Float[Array, "n dim"],
    labels: Int[Array, " n"],
    classes: int,
    *,
    rows: Int[Array, " fitted"] | None = None,
    groups: Int[Array, " n"] | None = None,
    seed: int = 0,
) -> Head:
    """Fit a linear head at the strength that cross-validation finds best (Radford et al. 2021, appendix A.3).

    As there, the last fit is to all samples. Of many samples a part chooses the strength, which hardly depends on their
    number; where none can be held out, as of one sample per class, it is 1.

    Args:
        features: of the samples; those of others than `rows` are not used.
        labels: the class of each.
        classes: how many there are.
        rows: which samples to fit to; all of them when not given.
        groups: a number for each sample; those with the same are held out together.
        seed: of the folds.

    Raises:
        ClipkitError: where there is no sample, or a number is not finite.
    """
    rows = np.arange(len(labels)) if rows is None else rows
    if not len(rows):
        raise ClipkitError("no training sample has what the probe is to be fitted to")
    most = max(JUDGES, min(PER_CLASS * classes, SWEPT // classes))
    some = rows if len(rows) <= most else np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    strength, judged, logits = 1.0, some[:0], np.zeros((0, classes))
    try:
        of = None if groups is None else groups[some]
        sweep = SweepOptions(folds=STRENGTH_FOLDS, seed=seed)
        best = choose_strength(features[some], labels[some], classes, sweep, groups=of)
        strength, judged, logits = best.strength, some[best.judged], best.logits[best.judged]
    except ClipkitError:
        pass  # no class has two samples, or what is wrong otherwise the fit says too
    linear = fit_linear(features[rows], labels[rows], classes, strength=strength)
    return Head(linear, strength, len(rows), judged, logits)


def fit_heads(
    samples: PairedEmbeddings,
    labels: Int[Array, " n"],
    classes: int,
    *,
    groups: Int[Array, " n"] | None = None,
    seed: int = 0,
) -> FusionHeads:
    """Fit a head to each side, of the samples that have it, and one to both, of those that have both.

    Args:
        samples: to be fitted to, each side of unit norm.
        labels, classes, groups, seed: see `fit_head`.

    Raises:
        ClipkitError: where no sample has an image, a text, or both.
    """
    has_image, has_text = samples.there.T
    fitted = []
    for what, side, has in (
        ("an image", samples.image, has_image),
        ("a text", samples.text, has_text),
        ("both an image and a text", _joined(samples), has_image & has_text),
    ):
        if not has.any():
            raise ClipkitError(f"no training sample has {what}, so nothing can be learned from it")
        fitted.append(fit_head(side, labels, classes, rows=np.flatnonzero(has), groups=groups, seed=seed))
    image, text, joint = fitted
    # Where both sides were judged on a sample.
    _, of_image, of_text = np.intersect1d(image.judged, text.judged, assume_unique=True, return_indices=True)
    weight = choose_weight(
        image.log_shares(image.logits[of_image]),
        text.log_shares(text.logits[of_text]),
        labels[image.judged[of_image]],
    )
    return FusionHeads(image, text, joint, weight, prior_of(labels, classes))


def _joined(samples: PairedEmbeddings) -> Float[Array, "n dim"]:
    return np.concatenate([samples.image, samples.text], axis=1)


def side_alone(heads: FusionHeads, samples: PairedEmbeddings, side: int) -> Float[Array, "n classes"]:
    """What one side says, whatever else there is: logarithms of probabilities, the prior where the side is missing."""
    found = np.tile(heads.prior, (len(samples.there), 1))
    has = samples.there[:, side]
    found[has] = (heads.text if side == TEXT else heads.image)(samples.side(side)[has])
    return found


def early_fusion(heads: FusionHeads, samples: PairedEmbeddings) -> Float[Array, "n classes"]:
    """What the head on both embeddings says where both are there, else what the side says that is left."""
    found = np.where(samples.there[:, [IMAGE]], side_alone(heads, samples, IMAGE), side_alone(heads, samples, TEXT))
    both = np.flatnonzero(samples.there.all(axis=1))
    found[both] = heads.joint(_joined(samples.take(both)))
    return found


def late_fusion(heads: FusionHeads, samples: PairedEmbeddings, weight: float = 0.5) -> Float[Array, "n classes"]:
    """The weighted mean of the logarithms of both sides' probabilities, else what the side says that is left.

    A logarithmic opinion pool (Genest & Zidek 1986, section 3); with equal weights it decides as the product rule for
    sides that are independent given the class, with equal priors (Kittler et al. 1998, equation 8).

    Args:
        heads: of the sides.
        samples: to decide.
        weight: of the image, 0 to 1; ``heads.weight`` is the one that was chosen.
    """
    image, text = side_alone(heads, samples, IMAGE), side_alone(heads, samples, TEXT)
    found = np.where(samples.there[:, [IMAGE]], image, text)
    both = samples.there.all(axis=1)
    found[both] = pooled(image[both], text[both], weight)
    return found


def pooled(
    image: Float[Array, "n classes"], text: Float[Array, "n classes"], weight: float
) -> Float[Array, "n classes"]:
    """The logarithms of probabilities proportional to ``image ** weight * text ** (1 - weight)``, all as logarithms."""
    return _log_shares(weight * image + (1 - weight) * text)


def choose_weight(image: Float[Array, "n classes"], text: Float[Array, "n classes"], labels: Int[Array, " n"]) -> float:
    """The weight of the image in late fusion under which held-out samples are likeliest.

    How sure the two are together is no matter of the weight, so each is judged at its own best temperature.

    Args:
        image, text: logarithms of probabilities by heads that were not fitted to the samples.
        labels: the class of each.

    Returns:
        0 to 1; 0.5 where there are no samples to choose by.
    """
    if not len(labels):
        return 0.5
    losses = []
    for weight in IMAGE_WEIGHTS:
        shares = pooled(image, text, weight)
        losses.append(log_loss(shares, labels, fit_temperature(shares, labels)))
    best = np.flatnonzero(np.isclose(losses, min(losses), rtol=0, atol=1e-9))
    return float(IMAGE_WEIGHTS[best[np.argmin(np.abs(IMAGE_WEIGHTS[best] - 0.5))]])  # of equal ones the evenest
