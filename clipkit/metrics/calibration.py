"""Whether a classifier's probabilities are to be believed, and the temperature that mends them: functions over
arrays."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.core import ClipkitError
from clipkit.metrics.ranking import refuse_bad_scores

__all__ = ["Reliability", "calibration_error", "fit_temperature", "log_loss", "reliability"]

Array = np.ndarray
BINS = 15  # of Guo et al. 2017
COLDEST, HOTTEST = 1e-5, 1e5  # temperatures: beyond them softmax decides, or tells nothing, whatever the logits
NEWTON = 200  # steps; halving alone needs 60
CHUNK = 1 << 20  # logits at a time, in float64


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
