"""When a classifier had better abstain: risk against coverage, and thresholds that promise a precision."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.core import ClipkitError
from clipkit.metrics.calibration import Array
from clipkit.metrics.ranking import refuse_bad_scores

__all__ = ["Acceptance", "precision_threshold", "risk_coverage"]


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
        enough = np.flatnonzero(hits >= (wanted - SHARE_TOLERANCE) * accepted)
        return _acceptance(scores, right, float(values[enough[-1]]) if len(enough) else np.inf)
    from scipy.special import bdtrc  # the chance of more than so many; only here, as it takes a while to import

    tried = _tried(len(scores), wanted, level)
    for count in reversed(tried):
        # What scores above the next sample, so that this one is none of those counted.
        at = int(np.searchsorted(accepted, count, side="right")) - 1
        if at >= 0 and bdtrc(hits[at] - 1, accepted[at], wanted) <= (1 - level) / len(tried):
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
        numbers.append(min(int(numbers[-1] / COUNT_GROWTH), numbers[-1] - 1))
    return numbers[-2::-1]


def _acceptance(scores: Array, right: Array, threshold: float) -> Acceptance:
    passed = scores >= threshold
    share = float(right[passed].mean()) if passed.any() else float("nan")
    return Acceptance(threshold, share, float(passed.mean()) if len(scores) else 0.0)


COUNT_GROWTH = 1.25  # from one number of accepted samples that is tried to the next
SHARE_TOLERANCE = 1e-9  # a share that lies no further below what is wanted reaches it
