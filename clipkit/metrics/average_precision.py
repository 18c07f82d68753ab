"""Mean average precision of images with any number of classes each, with ties resolved as if in random order.

Average precision is the mean, over a class's positives, of the precision among all images that score no lower. That is
CLIP_benchmark's and torchnet's definition and, without ties, scikit-learn's ``average_precision_score``: the sum over
thresholds of (recall gained) × (precision). With ties scikit-learn lets equal scores pass together, which gives a model
that tells nothing apart the share of the positives, and guessing gives more; CLIP_benchmark takes them as its sort
leaves them. Here it is the expected value over all orders of the tied, in closed form, so such a model scores exactly
what guessing would. `clipkit.metrics.clip_benchmark` has the latter.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.metrics.ranking import TIE_WIDTH, mean, refuse_bad_scores

__all__ = ["average_precision", "chance_of", "mean_average_precision", "mean_average_precision_of"]

Array = np.ndarray
FEW = 1000  # below this, harmonic numbers come from a table; above it from their series, to more digits of a difference


def average_precision(scores: Float[Array, "n classes"], labels: Bool[Array, "n classes"]) -> Float[Array, " classes"]:
    """Average precision of each class; NaN for one without a positive.

    Scores are compared as float32. Equal are those of a run without a gap over 1e-6; a run that is longer than that is
    cut into such from its top, so that many images do not all become one tie.

    Args:
        scores: of each image for each class, such as cosines.
        labels: which classes it has.

    Raises:
        ClipkitError: where a score is not finite.
    """
    refuse_bad_scores(scores)
    once = np.ones((1, len(scores)), np.int64)
    found = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(labels.any(axis=0)):
        found[column] = _expected(once, *_sorted(scores[:, column], labels[:, column]))[0]
    return found


def mean_average_precision(scores: Float[Array, "n classes"], labels: Bool[Array, "n classes"]) -> float:
    """The mean of `average_precision` over the classes that have a positive; NaN where none has."""
    found = average_precision(scores, labels)
    return mean(found[~np.isnan(found)])


def chance_of(labels: Bool[Array, "n classes"]) -> float:
    """What guessing scores as `mean_average_precision`.

    For a class with r positives among n images it is (H + (n - H) (r - 1) / (n - 1)) / n, where H is the n-th harmonic
    number (Bestgen 2015): somewhat more than r / n.
    """
    return mean_average_precision(np.zeros(labels.shape, np.float32), labels)


def mean_average_precision_of(
    scores: Float[Array, "n classes"], labels: Bool[Array, "n classes"]
) -> Callable[[Int[Array, "draws n"]], Float[Array, " draws"]]:
    """`mean_average_precision` as a function of how often each image counts; see `clipkit.metrics.bootstrap`.

    A class is left out of a draw without a positive of it; a draw without any is NaN. Every class keeps its order,
    which takes 9 bytes per score.

    Raises:
        ClipkitError: where a score is not finite.
    """
    refuse_bad_scores(scores)
    of_classes = [_sorted(scores[:, column], labels[:, column]) for column in np.flatnonzero(labels.any(axis=0))]

    def statistic(counts: Array) -> Array:
        total, classes = np.zeros(len(counts)), np.zeros(len(counts))
        for of_class in of_classes:
            found = _expected(counts, *of_class)
            total += np.nan_to_num(found)
            classes += ~np.isnan(found)
        return np.divide(total, classes, out=np.full(len(counts), np.nan), where=classes > 0)

    return statistic


def _sorted(scores: Array, positive: Array) -> tuple[Array, Array, Array]:
    """The order by falling score, where in it each tie begins, and which are positive in that order."""
    order = np.argsort(-scores.astype(np.float32), kind="stable")
    ordered = scores[order].astype(np.float32)
    begins = np.append(True, ordered[:-1] - ordered[1:] > TIE_WIDTH)
    tops = ordered[begins][np.cumsum(begins) - 1]
    stretch = np.floor((tops - ordered) / TIE_WIDTH)
    begins[1:] |= stretch[1:] != stretch[:-1]
    return order, np.flatnonzero(begins), positive[order]


def _expected(counts: Array, order: Array, starts: Array, positive: Array) -> Array:
    """Average precision of one class in each draw, where an image counts so often; NaN without a positive.

    Of t tied images with r positives, with b images and p positives before them, the j-th in a random order is positive
    with the chance r / t. If it is, p + 1 + (j - 1)(r - 1) / (t - 1) of the b + j up to it are.
    """
    drawn = counts[:, order]
    tied = np.add.reduceat(drawn, starts, axis=1)
    hits = np.add.reduceat(drawn * positive, starts, axis=1)
    before, hits_before = tied.cumsum(axis=1) - tied, hits.cumsum(axis=1) - hits
    slope = (hits - 1) / np.maximum(tied - 1, 1)
    # The sum over j of (p + 1 + (j - 1) slope) / (b + j), where j - 1 = (b + j) - (b + 1).
    level = hits_before + 1 - slope * (before + 1)
    gained = hits / np.maximum(tied, 1) * (level * _inverses(before, tied) + slope * tied)
    total = hits.sum(axis=1)
    return np.divide(gained.sum(axis=1), total, out=np.full(len(counts), np.nan), where=total > 0)


def _inverses(before: Array, count: Array) -> Array:
    """1 / (before + 1) + … + 1 / (before + count): the difference of two harmonic numbers."""
    last = before + count
    table = np.append(0.0, np.cumsum(1.0 / np.arange(1, int(last.max(initial=0)) + 1)))
    b = np.maximum(before, FEW).astype(np.float64)
    e = b + count
    # From the asymptotic series of ln, 1 / 2n and -1 / 12n².
    series = np.log1p(count / b) - count / (2 * b * e) + count * (b + e) / (12 * b**2 * e**2)
    return np.where(before < FEW, table[last] - table[before], series)
