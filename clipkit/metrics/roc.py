"""How well a score tells two kinds of samples apart: figures of the receiver operating characteristic.

A sample is positive where its score had better be high: classified rightly, or of a known class. Equal scores count
with the expected value over random orders, so that a score that tells nothing apart is worth exactly what guessing is.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.core import ClipkitError
from clipkit.metrics.intervals import Statistic
from clipkit.metrics.ranking import refuse_bad_scores

__all__ = ["auroc", "auroc_of", "fpr_at_tpr", "fpr_at_tpr_of"]

Array = np.ndarray
ROUNDING = 1e-9  # a rate that lies no further below what is wanted reaches it


def auroc(positive: Float[Array, " n"], negative: Float[Array, " m"]) -> float:
    """The area under the receiver operating characteristic of a score that tells two kinds of samples apart.

    It is the chance that a positive one scores higher than a negative one, ties counting half (Mann & Whitney 1947).
    For abstention the positive are those classified rightly, or of known classes, and the score is the classifier's.

    Returns:
        0.5 for guessing; NaN where one side is empty.

    Raises:
        ClipkitError: where a score is not finite.
    """
    refuse_bad_scores(positive)
    refuse_bad_scores(negative)
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below, up_to = (np.searchsorted(ordered, positive, side=side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))


def fpr_at_tpr(positive: Float[Array, " n"], negative: Float[Array, " m"], tpr: float = 0.95) -> float:
    """The share of negative samples that pass where such a share of the positive ones passes.

    FPR at 95 % TPR (Liang et al. 2018, section 4.2) at the highest threshold that suffices. Where several samples score
    as much as the threshold, as many of them pass as are needed, in a random order: the curve is straight between two
    thresholds, as for `auroc`.

    Returns:
        `tpr` for guessing; NaN where one side is empty.

    Raises:
        ClipkitError: where a score is not finite, or `tpr` is no share above 0.
    """
    refuse_bad_scores(positive)
    refuse_bad_scores(negative)
    if not 0 < tpr <= 1:
        raise ClipkitError(f"a true positive rate of {tpr} is no share above 0; 0.95 is usual")
    scores, known = np.concatenate([positive, negative]), np.arange(len(positive) + len(negative)) < len(positive)
    if known.all() or not known.any():
        return float("nan")
    return float(fpr_at_tpr_of(scores, known, tpr)(np.ones((1, len(scores)), np.int64))[0])


def auroc_of(scores: Float[Array, " n"] | Int[Array, " n"], positive: Bool[Array, " n"]) -> Statistic:
    """`auroc` as a function of how often each sample counts; NaN in a draw without samples of one side.

    Args:
        scores: of all samples, or their places in the order of the scores.
        positive: which of them are.
    """
    order, starts = _ties(scores)

    def statistic(counts: Array) -> Array:
        hits, misses = _per_tie(counts, order, starts, positive)
        # Scores fall: each positive sample beats the negative ones that come later.
        behind = misses.sum(axis=1, keepdims=True) - misses.cumsum(axis=1)
        won = (hits * (behind + misses / 2)).sum(axis=1)
        return _divided(won, hits.sum(axis=1) * misses.sum(axis=1))

    return statistic


def fpr_at_tpr_of(
    scores: Float[Array, " n"] | Int[Array, " n"], positive: Bool[Array, " n"], tpr: float = 0.95
) -> Statistic:
    """`fpr_at_tpr` as a function of how often each sample counts; NaN in a draw without samples of one side.

    Args:
        scores: of all samples, or their places in the order of the scores.
        positive: which of them are.
        tpr: the share of these that passes.
    """
    order, starts = _ties(scores)

    def statistic(counts: Array) -> Array:
        hits, misses = _per_tie(counts, order, starts, positive)
        passed, wanted = hits.cumsum(axis=1), tpr * hits.sum(axis=1)
        last = (passed < wanted[:, None] - ROUNDING).sum(axis=1).clip(max=hits.shape[1] - 1)
        draw = np.arange(len(counts))
        before = passed[draw, last] - hits[draw, last]
        # Of the samples at the threshold the share that is needed, and nothing where it is reached without them.
        share = np.divide(wanted - before, hits[draw, last], out=np.zeros(len(draw)), where=hits[draw, last] > 0)
        false = misses.cumsum(axis=1)[draw, last] - misses[draw, last] * (1 - share.clip(0, 1))
        total = misses.sum(axis=1)
        return _divided(np.where(hits.any(axis=1), false, np.nan), total)

    return statistic


def _ties(scores: Array) -> tuple[Array, Array]:
    """The order by falling score, and where in it each run of equal ones begins."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    return order, np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _per_tie(counts: Array, order: Array, starts: Array, positive: Array) -> tuple[Array, Array]:
    """How many positive and negative samples each run of equal scores has in each draw."""
    drawn, right = counts[:, order], positive[order]
    return np.add.reduceat(drawn * right, starts, axis=1), np.add.reduceat(drawn * ~right, starts, axis=1)


def _divided(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
