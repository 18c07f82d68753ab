"""Whether a classifier's probabilities are to be believed, and when it had better abstain: functions over arrays."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.confidence import binomial_tail
from clipkit.core import ClipkitError
from clipkit.ranking import refuse_bad_scores

__all__ = [
    "Acceptance",
    "Reliability",
    "auroc",
    "calibration_error",
    "fit_temperature",
    "fpr_at_tpr",
    "log_loss",
    "precision_threshold",
    "reliability",
    "risk_coverage",
]

Array = np.ndarray
BINS = 15  # of Guo et al. 2017
COLDEST, HOTTEST = 1e-5, 1e5  # temperatures: beyond them softmax decides, or tells nothing, whatever the logits
NEWTON = 200  # steps; halving alone needs 60
CHUNK = 1 << 20  # logits at a time, in float64
GROWTH = 1.25  # from one number of accepted samples that is tried to the next
CLOSE = 1e-9  # a share that lies no further below what is wanted reaches it


class Reliability(NamedTuple):
    """The bins of a reliability diagram, from the least probability to the largest; ``[bins]`` each."""

    counts: Int[Array, " bins"]
    """Samples in the bin."""
    probability: Float[Array, " bins"]
    """The mean probability of what was predicted; NaN in an empty bin."""
    right: Float[Array, " bins"]
    """The share that was predicted rightly; NaN in an empty bin."""


def reliability(
    probability: Float[Array, " n"], right: Bool[Array, " n"], bins: int = BINS, *, equal_mass: bool = False
) -> Reliability:
    """Sort samples into bins by the probability of the predicted class.

    Args:
        probability: 0 to 1.
        right: whether the prediction was.
        bins: how many.
        equal_mass: bins of about as many samples each (Nguyen & O'Connor 2015), in place of equal widths. Samples of
            one probability stand in one bin, so that their order does not matter.

    Raises:
        ClipkitError: where a probability lies outside, or there is no bin.
    """
    if bins < 1:
        raise ClipkitError(f"{bins} bins hold nothing; {BINS} are usual")
    if len(probability) and not (probability.min() >= 0 and probability.max() <= 1):
        raise ClipkitError("a probability lies outside 0 and 1; give those of the predicted classes")
    probability = probability.astype(np.float64)
    if equal_mass:
        ends = np.ceil(len(probability) * np.arange(1, bins) / bins).astype(np.int64) - 1
        edges = np.sort(probability)[np.maximum(ends, 0)] if len(probability) else np.zeros(bins - 1)
        bin_of = np.searchsorted(edges, probability, side="left")
    else:
        # Open below, as in the paper; a probability of 0 goes into the first.
        bin_of = np.clip(np.ceil(probability * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    means = (
        np.divide(
            np.bincount(bin_of, weights=values, minlength=bins), counts, out=np.full(bins, np.nan), where=counts > 0
        )
        for values in (probability, right)
    )
    return Reliability(counts, *means)


def calibration_error(
    probability: Float[Array, " n"], right: Bool[Array, " n"], bins: int = BINS, *, equal_mass: bool = False
) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): how far probability and share of right ones lie apart.

    Per bin, weighted by its samples; arguments as in `reliability`. Few samples look miscalibrated by chance: figures
    are to be compared on equal numbers.

    Returns:
        0 to 1; NaN where there are no samples.

    Raises:
        ClipkitError: see `reliability`.
    """
    if not len(probability):
        return float("nan")
    found = reliability(probability, right, bins, equal_mass=equal_mass)
    apart = np.nan_to_num(np.abs(found.probability - found.right))
    return float((found.counts * apart).sum() / len(probability))


def log_loss(logits: Float[Array, "n classes"], labels: Int[Array, " n"], temperature: float = 1.0) -> float:
    """The mean negative log-likelihood of the labels, in nats, under ``softmax(logits / temperature)``; float64.

    Returns:
        NaN where there are no samples.

    Raises:
        ClipkitError: where a logit is not finite, or a label names no class.
    """
    _refuse(logits, labels)
    if not len(labels):
        return float("nan")
    return _losses(logits, labels, 1 / temperature)[0] / len(labels)


def _refuse(logits: Array, labels: Array) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ClipkitError(f"there are {logits.shape[1]} classes; labels are columns from 0 to {logits.shape[1] - 1}")
    refuse_bad_scores(logits)


def _losses(logits: Array, labels: Array, scale: float) -> tuple[float, float, float]:
    """The summed loss of ``softmax(scale * logits)``, and its first and second derivative by the scale."""
    total = np.zeros(3)
    rows = max(1, CHUNK // logits.shape[1])
    for start in range(0, len(logits), rows):
        some = logits[start : start + rows].astype(np.float64)
        some -= some.max(axis=1, keepdims=True)
        own = some[np.arange(len(some)), labels[start : start + rows]]
        powers = np.exp(scale * some)
        sums = powers.sum(axis=1)
        first, second = ((powers * some**power).sum(axis=1) / sums for power in (1, 2))
        total += (np.log(sums) - scale * own).sum(), (first - own).sum(), (second - first**2).sum()
    return float(total[0]), float(total[1]), float(total[2])


def fit_temperature(logits: Float[Array, "n classes"], labels: Int[Array, " n"]) -> float:
    """The temperature under which labelled samples are likeliest (temperature scaling, Guo et al. 2017, section 4.2).

    ``softmax(logits / temperature)`` predicts what ``softmax(logits)`` does, as it is positive. The loss is convex in
    1 / temperature; Newton's steps find its least, halving where they would leave the interval that it lies in. One
    chunk of logits at a time is held in float64.

    Args:
        logits: of images and classes; for cosines the temperature is the whole 1 / scale.
        labels: the column of each image's class.

    Returns:
        1 where the logits are calibrated. From 1e-5 (all samples are right, and the surer the likelier) to 1e5 (the
        logits tell nothing of the classes, or worse).

    Raises:
        ClipkitError: where there is no sample, a logit is not finite, or a label names no class.
    """
    if not len(logits):
        raise ClipkitError("a temperature cannot be fitted to no samples; give labelled ones")
    _refuse(logits, labels)
    low, high = 1 / HOTTEST, 1 / COLDEST
    if _losses(logits, labels, low)[1] >= 0:
        return HOTTEST
    if _losses(logits, labels, high)[1] <= 0:
        return COLDEST
    scale = 1.0
    for _ in range(NEWTON):
        _, slope, bend = _losses(logits, labels, scale)
        low, high = (low, scale) if slope > 0 else (scale, high)
        step = scale - slope / bend if bend > 0 else 0.0
        # Scales of many sizes are possible, so half-way is meant by their logarithms.
        after = step if low <= step <= high else (low * high) ** 0.5
        if abs(after - scale) <= 1e-12 * scale:
            break
        scale = after
    return 1 / scale


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
    """The share of negative samples that pass the highest threshold that such a share of the positive ones passes.

    FPR at 95 % TPR (Liang et al. 2018, section 4.2); what scores as much as the threshold passes.

    Returns:
        About `tpr` for guessing; NaN where one side is empty.

    Raises:
        ClipkitError: where a score is not finite, or `tpr` is no share above 0.
    """
    refuse_bad_scores(positive)
    refuse_bad_scores(negative)
    if not 0 < tpr <= 1:
        raise ClipkitError(f"a true positive rate of {tpr} is no share above 0; 0.95 is usual")
    if not len(positive) or not len(negative):
        return float("nan")
    needed = max(1, int(np.ceil(tpr * len(positive) - CLOSE)))
    return float((negative >= np.sort(positive)[-needed]).mean())


def risk_coverage(
    scores: Float[Array, " n"], right: Bool[Array, " n"]
) -> tuple[Float[Array, " t"], Int[Array, " t"], Int[Array, " t"]]:
    """What is accepted from each threshold on, and how much of it is right (El-Yaniv & Wiener 2010).

    Coverage is ``accepted / n``, the selective risk ``1 - hits / accepted``.

    Args:
        scores: the surer the higher.
        right: whether each sample was classified rightly.

    Returns:
        The different scores, falling; how many samples score as much or more; how many of them are right.

    Raises:
        ClipkitError: where a score is not finite.
    """
    refuse_bad_scores(scores)
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    return ordered[ends], ends + 1, np.cumsum(right[order])[ends]


class Acceptance(NamedTuple):
    """From which score on a classifier's answer is accepted."""

    threshold: float
    """Accept where ``score >= threshold``; exact in the precision of the scores. Infinite where nothing may be
    accepted, minus infinity where everything may."""
    precision: float
    """Share of right ones among the accepted labelled samples; NaN where none is."""
    accepted: float
    """Share of the labelled samples that are accepted."""


def precision_threshold(
    scores: Float[Array, " n"], right: Bool[Array, " n"], wanted: float, level: float | None = None
) -> Acceptance:
    """The score from which on answers are accepted, so that of those accepted a wanted share is right.

    Without a level it is the lowest with that precision on the labelled samples. As it has been picked among many on
    the very samples, the precision on others tends to be lower.

    With a level it holds for others, too: for samples drawn alike, in at least this share of all sets of labelled
    samples, whatever classifier and scores. Some 10 to 40 thresholds are tried that are fixed beforehand by how many
    labelled samples score above them, each by the exact binomial test (Clopper & Pearson 1934) at its share of
    1 - level (Bonferroni), as above a sample's score the others are independent of it. It needs at least
    ln(1 - level) / ln(wanted) right ones: 29 for 0.9 and 299 for 0.99, at 0.95, and some more for the several tests.

    Args:
        scores: of labelled samples, the surer the higher.
        right: whether each was classified rightly.
        wanted: precision, a fraction.
        level: how sure it is to be reached on others, such as 0.95.

    Raises:
        ClipkitError: where a score is not finite, or `wanted` or `level` is no share.
    """
    if not 0 < wanted <= 1:
        raise ClipkitError(f"a precision of {wanted} cannot be had; give one above 0, up to 1")
    if level is not None and not 0 < level < 1:
        raise ClipkitError(f"a level of {level} is no share between 0 and 1; 0.95 is usual")
    values, accepted, hits = risk_coverage(scores, right)
    if level is None:
        enough = np.flatnonzero(hits >= (wanted - CLOSE) * accepted)
        return _acceptance(scores, right, float(values[enough[-1]]) if len(enough) else np.inf)
    tried = _tried(len(scores), wanted, level)
    for count in reversed(tried):
        # What scores above the next sample, so that this one is none of those counted.
        at = int(np.searchsorted(accepted, count, side="right")) - 1
        if at >= 0 and binomial_tail(int(hits[at]), int(accepted[at]), wanted) <= (1 - level) / len(tried):
            if at == len(values) - 1:
                return _acceptance(scores, right, -np.inf)
            return _acceptance(scores, right, float(np.nextafter(values[at + 1], values.dtype.type(np.inf))))
    return _acceptance(scores, right, np.inf)


def _tried(count: int, wanted: float, level: float) -> list[int]:
    """Numbers of accepted samples, rising to all, of which the fewest could do if all were right."""
    if wanted == 1:
        return []
    numbers = [count]
    while numbers[-1] >= np.log((1 - level) / len(numbers)) / np.log(wanted):
        numbers.append(min(int(numbers[-1] / GROWTH), numbers[-1] - 1))
    return numbers[-2::-1]


def _acceptance(scores: Array, right: Array, threshold: float) -> Acceptance:
    passed = scores >= threshold
    share = float(right[passed].mean()) if passed.any() else float("nan")
    return Acceptance(threshold, share, float(passed.mean()) if len(scores) else 0.0)
