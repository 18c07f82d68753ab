"""From probabilities to decisions: which class, how far before the next, and whether that is sure enough.

Pure functions over arrays, in chunks, so that a million images take no more memory than their answers do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float

from clipkit.core import ClipkitError

__all__ = ["BACKGROUND", "CHUNK", "OK", "STATUSES", "UNSURE", "Decisions", "Rule", "decide", "joined"]

STATUSES = ("ok", "unsure", "background")
OK, UNSURE, BACKGROUND = range(3)
CHUNK = 4096


@dataclass(frozen=True)
class Rule:
    """What makes a decision sure.

    Raises:
        ClipkitError: where a number is out of its range.
    """

    threshold: float = 0.0
    """The least probability of the first class."""
    min_margin: float = 0.0
    """The least difference between the probabilities of the first class and the second."""
    background: Sequence[int] = ()
    """Places of classes that stand for "none of these"."""
    several: bool = False
    """Whether an image may be of several classes at once: each that reaches the threshold counts, margins do not."""
    groups: Sequence[Sequence[int]] = ()
    """Places of the classes of each group."""

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("margin", self.min_margin)):
            if not 0 <= value <= 1:
                raise ClipkitError(f"a {name} is a probability between 0 and 1, got {value:g}")


@dataclass(frozen=True)
class Decisions:
    """One for each image, in order."""

    classes: np.ndarray
    """int32 ``[n, top]``: the most probable classes, best first; equal ones in the order of the labels."""
    cosines: np.ndarray
    """float32 ``[n, top]``: of these; NaN where models of which each has its own were joined."""
    probabilities: np.ndarray
    """float32 ``[n, top]``: of these."""
    margins: np.ndarray
    """float32 ``[n]``: from the first probability to the second; 1 where there is one class only."""
    statuses: np.ndarray
    """uint8 ``[n]``: places in `STATUSES`; with several classes ``background`` where none reaches the threshold."""
    present: np.ndarray
    """bool ``[n, classes]``: which classes reach the threshold; ``[n, 0]`` where an image is of one class."""
    groups: np.ndarray
    """float32 ``[n, groups]``: the probability of each group, which is that of its classes together."""

    def __len__(self) -> int:
        return len(self.classes)


def decide(
    shares: Float[np.ndarray, "n classes"], cosines: Float[np.ndarray, "n classes"] | None, rule: Rule, top: int = 5
) -> Decisions:
    """What the probabilities say.

    Args:
        shares: probabilities.
        cosines: beside them; None where there are none of their own.
        rule: what is sure.
        top: how many classes to keep of each image.
    """
    count, classes = shares.shape
    kept = min(top, classes)
    # The two best are needed for the margin, whatever is kept. Stable: equal ones stay in the order of the labels.
    order = np.argsort(-shares, axis=1, kind="stable")[:, : max(kept, min(2, classes))]
    best = np.take_along_axis(shares, order, 1)
    margins = (best[:, 0] - best[:, 1] if classes > 1 else np.ones(count)).astype(np.float32)
    best = best.astype(np.float32)  # what is told is what is compared: a threshold that was read off a row lets it pass
    reached = best[:, 0] >= np.float32(rule.threshold)
    if rule.several:
        present = shares.astype(np.float32) >= np.float32(rule.threshold)
        present[:, list(rule.background)] = False
        statuses = np.where(present.any(1), OK, BACKGROUND)
    else:
        present = np.zeros((count, 0), bool)
        statuses = np.where(reached & (margins >= np.float32(rule.min_margin)), OK, UNSURE)
        statuses[np.isin(order[:, 0], rule.background)] = BACKGROUND
    order = order[:, :kept]
    near = np.full(order.shape, np.nan) if cosines is None else np.take_along_axis(cosines, order, 1)
    groups = [np.take(shares, members, axis=1).sum(axis=1) for members in rule.groups]
    return Decisions(
        order.astype(np.int32),
        near.astype(np.float32),
        best[:, :kept],
        margins,
        statuses.astype(np.uint8),
        present,
        np.stack(groups, 1).astype(np.float32) if groups else np.zeros((count, 0), np.float32),
    )


def joined(parts: Sequence[Decisions]) -> Decisions:
    """Decisions on some images, then on others."""
    return Decisions(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))


_FIELDS = tuple(field.name for field in fields(Decisions))
