"""The page that shows what was classified: contact sheets, least certain first, and what was mistaken for what."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.classification.classified import Classified, accuracy
from clipkit.classification.decisions import UNSURE, Decisions
from clipkit.classification.fit import Fit, Threshold, ranked
from clipkit.classification.images import Images
from clipkit.core import BadSample, Report, confusion_figure, reliability_figure
from clipkit.images import decode
from clipkit.metrics import confusion_matrix, reliability

__all__ = ["pictures", "write_report"]

Picture = Callable[[int], Image.Image | None]
"""Gives an image by its number, or None where it is not at hand."""
SHOWN = 24  # pictures of a class; more would not be looked at, and each takes some kilobytes
SIDE = 256  # pixels of a picture that is kept for the sheet, which shows half of it
LISTED = 1000  # unreadable files
NAMED = 30  # classes in the confusion matrix; with more of them nothing could be read, and a table lists the pairs


def pictures(images: Images) -> Picture:
    """Gives an image by its number, or None where it is not at hand."""

    def show(at: int) -> Image.Image | None:
        try:
            return decode(images.read(at))
        except BadSample:
            return None

    return show


def write_report(
    path: Path,
    classified: Classified,
    *,
    about: str,
    picture: Picture | None = None,
) -> None:
    """Write a self-contained page.

    Args:
        path: of the page.
        classified: what it shows.
        about: the model and the source in a line.
        picture: image number `n`, or None where it is not at hand; read from its source when not given.
    """
    page = Report("Classified", about)
    page.figures(_cards(classified))
    if classified.fit is not None:
        _examples(page, classified.fit, classified.threshold)
    if classified.truth is not None:
        _confusion(page, classified.labels.names, classified.truth, classified.decisions)
    for at in range(len(classified.labels.labels)):
        _sheet(page, classified, at, picture or pictures(classified.images))
    unreadable = classified.images.unreadable
    if unreadable:
        page.heading("Unreadable")
        page.table([{"path": line["key"], "reason": line["reason"]} for line in unreadable[:LISTED]], words=True)
        if len(unreadable) > LISTED:
            page.text(f"and {len(unreadable) - LISTED:,} more")
    page.write(path)


def _cards(classified: Classified) -> list[tuple[str, str, str]]:
    images, statuses = classified.images, classified.decisions.statuses
    counts = {name: int((statuses == at).sum()) for at, name in enumerate(("sure", "unsure", "background"))}
    cards = [("images", f"{len(images):,}", f"{len(classified.labels.labels)} labels")]
    cards += [(name, f"{count:,}", f"{count / max(len(images), 1):.1%}") for name, count in counts.items() if count]
    if images.unreadable:
        cards.append(("unreadable", f"{len(images.unreadable):,}", "listed below"))
    for name, sure in (("accuracy", False), ("accuracy of the sure", True)):
        right = accuracy(classified, sure=sure)
        if right is not None and right[1] and (not sure or counts["sure"] < len(images)):
            (share, low, high), count = right
            cards.append((name, f"{share:.1%}", f"95 % interval {low:.1%} to {high:.1%}, {count:,} images"))
    return cards


def _examples(page: Report, fit: Fit, threshold: Threshold | None) -> None:
    notes = [*fit.notes(), *([threshold.note()] if threshold is not None else [])]
    if not notes:
        return
    page.heading("How it was told" if fit.examples is None else "What the examples tell")
    judged, cards = fit.judged, []
    if judged is not None:
        judged_by = "by the names" if fit.method == "zero-shot" else "each by the others"
        cards.append(("examples right", f"{judged.accuracy(judged.shares):.1%}", f"{len(judged.truth):,}, {judged_by}"))
        if fit.method != "zero-shot":
            cards.append(("by the names alone", f"{judged.accuracy(judged.names):.1%}", "the same examples"))
        if fit.calibrated:
            before, after = judged.error(judged.before), judged.error(judged.after)
            cards.append(("calibration error", f"{after:.3f}", f"{before:.3f} before calibration"))
        else:
            cards.append(("calibration error", f"{judged.error(judged.shares):.3f}", "0: as right as it is sure"))
        cards.append(("right above wrong", f"{ranked(judged):.3f}", "AUROC of the probability; 0.5 is chance"))
    if threshold is not None:
        cards.append(("threshold", f"{threshold.probability:.3f}", f"for a precision of {threshold.wanted:g}"))
        cards.append(("precision", f"{threshold.precision:.1%}", f"of the {threshold.coverage:.1%} that are accepted"))
    if cards:
        page.figures(cards)
    for line in notes:
        page.text(line)
    if judged is not None:
        curves = [("before", judged.before), ("after", judged.after)] if fit.calibrated else [("", judged.shares)]
        page.subheading("Reliability")
        diagrams = [(name, reliability(*judged.top(shares))) for name, shares in curves]
        figure = reliability_figure([(name, each.counts, each.probability, each.right) for name, each in diagrams])
        page.plot(figure, "reliability diagram")


def _confusion(page: Report, names: Sequence[str], truth: np.ndarray, decisions: Decisions) -> None:
    known = truth >= 0
    matrix = confusion_matrix(truth[known].astype(np.int64), decisions.classes[known, 0].astype(np.int64), len(names))
    page.heading("What was taken for what", "The truth is the name of the folder that an image stands in.")
    met = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    if len(met) <= NAMED:
        own = matrix[np.ix_(met, met)]
        page.plot(confusion_figure(own, [names[at] for at in met.tolist()], ""), "confusion matrix")
    wrong = matrix * (1 - np.eye(len(names), dtype=matrix.dtype))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:10]
    rows: list[dict[str, Any]] = []
    for row, column in zip(*(part.tolist() for part in np.unravel_index(pairs, wrong.shape)), strict=True):
        if wrong[row, column]:
            share = wrong[row, column] / matrix[row].sum()
            rows.append({"shown": names[row], "said": names[column], "images": int(wrong[row, column])})
            rows[-1]["of its class"] = f"{share:.0%}"
    if rows:
        page.subheading("Most often mistaken")
        page.table(rows)


def _sheet(page: Report, classified: Classified, label: int, picture: Picture) -> None:
    """The images whose first class is this one."""
    decisions, truth, paths = classified.decisions, classified.truth, classified.images.paths
    names = classified.labels.names
    own = np.flatnonzero(decisions.classes[:, 0] == label)
    if not len(own):
        return
    cut = f"; {SHOWN} of them" if len(own) > SHOWN else ""
    page.heading(names[label], f"{len(own):,} images, least certain first{cut}")
    shown: list[tuple[Image.Image | Path, str, bool]] = []
    away = []
    least = own[np.argsort(decisions.probabilities[own, 0], kind="stable")][:SHOWN]
    for at in map(int, least):
        caption = f"{decisions.probabilities[at, 0]:.0%} {paths[at]}"
        if decisions.statuses[at] == UNSURE:
            caption = f"unsure {caption}"
        right = truth is not None and truth[at] == label
        if truth is not None and truth[at] >= 0 and not right:
            caption = f"{caption} (is {names[truth[at]]})"
        image = picture(at)
        if image is None:
            away.append({"image": paths[at], "probability": f"{decisions.probabilities[at, 0]:.0%}"})
        else:
            image.thumbnail((SIDE, SIDE))  # photos take 70 MB each, and the sheet holds all that it shows at once
            shown.append((image, caption, right))
    if shown:
        page.sheet(shown)
    if away:
        page.text("These pictures are not at hand (--image-root says where they are):")
        page.table(away)
