"""What came of a classification: images, decisions and what is known of them, as rows and as figures."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit.classification.decisions import OK, STATUSES, Decisions
from clipkit.classification.fit import Fit, Threshold
from clipkit.classification.folder_classes import truth_of
from clipkit.classification.images import Images
from clipkit.classification.labels import LabelSet
from clipkit.metrics import Interval, wilson_interval

__all__ = ["Classified", "accuracy", "label_counts", "rows_of"]

NOTHING = {"label": None, "score": None, "probability": None, "margin": None, "top": []}


@dataclass(frozen=True)
class Classified:
    """Images with what was decided of each, and what is known of it."""

    images: Images
    labels: LabelSet
    decisions: Decisions
    truth: np.ndarray | None = None
    """int64 ``[n]``: the class of each where it is known, else -1; None where nothing is."""
    among_examples: np.ndarray | None = None
    """bool ``[n]``: which images are examples too; None where there are no examples."""
    fit: Fit | None = None
    """That the decisions are by, where it is to be told of."""
    threshold: Threshold | None = None
    """That was set so that a wanted precision is reached."""

    @classmethod
    def by_folders(
        cls, images: Images, labels: LabelSet, decisions: Decisions, fit: Fit, threshold: Threshold | None = None
    ) -> "Classified":
        """With the truth that the images' folders name (see `truth_of`).

        Of images that are among the examples it is not counted: how they are classified says nothing of others.
        """
        truth, among = truth_of(images.paths, labels), None
        if fit.examples is not None:
            among = fit.examples.among(images)
            truth = None if truth is None else np.where(among, -1, truth)
            truth = None if truth is None or (truth < 0).all() else truth
        return cls(images, labels, decisions, truth, among, fit, threshold)

    @property
    def unusable_examples(self) -> list[dict[str, Any]]:
        """Examples that could not be used: ``key`` and ``reason``."""
        return self.fit.examples.left_out if self.fit is not None and self.fit.examples is not None else []

    def notes(self) -> Iterator[str]:
        """What examples told, and how many images are right where that is known, a line each."""
        if self.fit is not None:
            yield from self.fit.notes()
        if self.threshold is not None:
            yield self.threshold.note()
        if self.among_examples is not None and self.among_examples.any():
            count = int(self.among_examples.sum())
            yield f"{count:,} of the images are among the examples and do not count for the accuracy"
        right = accuracy(self)
        if right is not None:
            (share, low, high), count = right
            yield f"{share:.1%} of {count:,} are in the folder of their label (95 % interval {low:.1%} to {high:.1%})"


def rows_of(classified: Classified) -> Iterator[dict[str, Any]]:
    """A row for each image and for each that has no embedding, in source order; see `clipkit.classify`.

    With groups there is ``groups`` too: those of the first class, the widest first, with the probability of each. Where
    an image may be of several classes ``labels`` names all that it is of. Where there are examples, ``example`` says
    whether the image is one of them.
    """
    images, labels, decisions = classified.images, classified.labels, classified.decisions
    among = classified.among_examples
    names, groups = labels.names, {name: at for at, name in enumerate(labels.groups)}
    rows = range(len(images)) if images.rows is None else images.rows
    # Embeddings tell of what they left out, but no more where in the source it and they were.
    places = [len(images) if images.rows is None else line.get("row", -1) for line in images.unreadable]
    lines = sorted((place, 0, number) for number, place in enumerate(places))
    for _, is_image, at in heapq.merge(lines, ((row, 1, at) for at, row in enumerate(rows))):
        row = _row(images.paths[at], names, decisions, at) if is_image else _unreadable(images.unreadable[at])
        if groups:
            own = labels.labels[int(decisions.classes[at, 0])].groups if is_image else ()
            row["groups"] = [[name, float(decisions.groups[at, groups[name]])] for name in own]
        if decisions.present.shape[1]:
            row["labels"] = [names[c] for c in np.flatnonzero(decisions.present[at])] if is_image else []
        if among is not None:
            row["example"] = bool(is_image and among[at])
        yield row


def label_counts(classified: Classified) -> list[dict[str, Any]]:
    """For each label that any image got: how many did, how many of these surely, and their mean probability."""
    decisions, counts = classified.decisions, []
    first = decisions.classes[:, 0]
    for at, name in enumerate(classified.labels.names):
        own = first == at
        if own.any():
            sure = int((decisions.statuses[own] == OK).sum())
            mean = float(decisions.probabilities[own, 0].mean())
            counts.append({"label": name, "images": int(own.sum()), "sure": sure, "mean_probability": mean})
    return sorted(counts, key=lambda row: -row["images"])


def accuracy(classified: Classified, *, sure: bool = False) -> tuple[Interval, int] | None:
    """Share of images whose first class is theirs with its 95 % interval (Wilson 1927), and how many were counted.

    Args:
        classified: of whose images the truth counts; None where it is not known of any.
        sure: count those with the status ``ok`` only.
    """
    truth, decisions = classified.truth, classified.decisions
    if truth is None:
        return None
    counted = truth >= 0
    if sure:
        counted = counted & (decisions.statuses == OK)
    right = int((decisions.classes[counted, 0] == truth[counted]).sum())
    count = int(counted.sum())
    return wilson_interval(right, count), count


def _row(path: str, names: Sequence[str], decisions: Decisions, at: int) -> dict[str, Any]:
    classes, shares = decisions.classes[at].tolist(), decisions.probabilities[at].tolist()
    cosine = float(decisions.cosines[at, 0])
    return {
        "path": path,
        "label": names[classes[0]],
        "score": None if np.isnan(cosine) else cosine,
        "probability": shares[0],
        "margin": float(decisions.margins[at]),
        "top": [[names[c], share] for c, share in zip(classes, shares, strict=True)],
        "status": STATUSES[decisions.statuses[at]],
        "reason": None,
    }


def _unreadable(line: dict[str, Any]) -> dict[str, Any]:
    return {"path": line["key"], **NOTHING, "status": "unreadable", "reason": line["reason"]}
