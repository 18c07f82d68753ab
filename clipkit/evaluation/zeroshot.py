"""Zero-shot classification evaluated: one function for training, the command and notebooks, so that figures agree."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clipkit.classification import class_folders, class_vectors, prompt_set
from clipkit.core import ClipkitError, note
from clipkit.data.sources import FolderSource, Source, open_source
from clipkit.evaluation.embedder import SharedWork, nothing_usable, samples_hash
from clipkit.evaluation.measuring import (
    Evaluation,
    Further,
    measure_classes,
    measure_labels,
)
from clipkit.evaluation.stored import Stored
from clipkit.storage import digest

__all__ = ["ZEROSHOT_KS", "evaluate_stored_classes", "evaluate_zeroshot", "open_classes", "tell_clamped"]
ZEROSHOT_KS = (1, 5)


def evaluate_zeroshot(
    ranks: SharedWork,
    source: Source,
    classes: Sequence[str] | None = None,
    templates: str | Sequence[str] = "plain",
    ks: Sequence[int] = ZEROSHOT_KS,
    *,
    truth: np.ndarray | None = None,
    intervals: bool = False,
    compat: bool = False,
) -> Evaluation:
    """Zero-shot accuracy on images whose classes are known (`clipkit.metrics.accuracy.zeroshot_accuracy`).

    Of images that may be of several classes each it is the mean average precision
    (`clipkit.metrics.mean_average_precision`).

    Args:
        ranks: see `evaluate_retrieval`.
        source: see `open_classes`; any other where the truth is given.
        classes: the names to choose among; those of the sub-folders when not given.
        templates: with ``{}``, or the name of a set (see `clipkit.classification.prompt_set`); used as in
            `class_vectors`.
        ks: list lengths; of no use for several classes.
        truth: int64 ``[rows]``, places in `classes`, -1 where it is not known; by the sub-folders when not given. Or
            ``[rows, classes]``: 1 for each class that an image is of, 0 for the others, -1 where it is not known.
        intervals, compat: see `evaluate_retrieval`.

    Raises:
        ClipkitError: where there are no two classes, or no image can be used, on all ranks also where one fails.
    """
    prompts = prompt_set(templates) if isinstance(templates, str) else templates
    names, labels = class_folders(source, classes) if truth is None or classes is None else (list(classes), truth)
    vectors = class_vectors(names, prompts, ranks.texts)
    images = ranks.images(source)
    label = labels[images.rows]
    known = label >= 0 if label.ndim == 1 else (label >= 0).all(axis=1)
    reason = "stands in no class's folder" if truth is None else "its class is not told"
    left_out = images.left_out + [
        {"row": row, "key": source.key(row), "reason": reason} for row in np.array(images.rows)[~known].tolist()
    ]
    if not known.any():
        raise nothing_usable(
            source, left_out, f"no image {'stands in a class folder' if truth is None else 'has a class'}"
        )
    further = Further(samples_hash(source, images, names, label) if intervals else None, compat)
    if label.ndim == 2:
        several = label[known] == 1
        if not several.any():
            raise ClipkitError(f"no image of {source.spec} is of any class, so there is no precision to be measured")
        found = ranks.by_the_first(lambda: measure_labels(images.vectors[known], vectors, several, further))
    else:
        of = images.vectors[known], vectors, label[known], ks, names, further
        found = ranks.by_the_first(lambda: measure_classes(*of))
    return replace(found, left_out=left_out)


def evaluate_stored_classes(
    ranks: SharedWork,
    stored: Stored,
    classes: Sequence[str],
    labels: np.ndarray,
    prompts: Sequence[str],
    ks: Sequence[int],
    compat: bool,
) -> Evaluation:
    """As `evaluate_zeroshot`, of embeddings on the disk.

    Args:
        ranks: that embed the prompts; the first does the rest.
        stored: with images.
        classes, labels: see `classes_of`; an image of none is left out.
        prompts: with ``{}``, see `class_vectors`.
        ks: list lengths.
        compat: see `evaluate_retrieval`.
    """
    vectors = class_vectors(classes, prompts, ranks.texts)
    known = labels >= 0

    def work() -> Evaluation:
        images = stored.image
        if not known.all():
            ends = np.cumsum([len(part) for part in images])[:-1]
            images = [part[own] for part, own in zip(images, np.split(known, ends), strict=True) if own.any()]
        further = Further(digest([stored.of(), list(classes), labels.tolist()]), compat)
        return measure_classes(images, vectors, labels[known], ks, classes, further)

    found = ranks.by_the_first(work)
    strays = [{"key": key, "reason": "stands in no class's folder"} for key in _keys(stored, ~known)]
    return replace(found, left_out=[*(line for line in stored.left_out if "row" in line), *strays])


def _keys(stored: Stored, wanted: np.ndarray) -> list[str]:
    return [path for path, own in zip(stored.paths(), wanted, strict=True) if own] if wanted.any() else []


def open_classes(folder: str, ks: Sequence[int] = ZEROSHOT_KS) -> Source:
    """Open a folder with a sub-folder of images per class, and say so where there are fewer classes than `ks` ask for.

    Raises:
        ClipkitError: where it is something else, or has no two such sub-folders.
    """
    source = open_source(folder)
    if not isinstance(source, FolderSource):
        raise ClipkitError(f"{folder} is no folder of images; zero-shot needs one with a sub-folder per class")
    names, _ = class_folders(source)
    tell_clamped(folder, len(names), ks)
    return source


def tell_clamped(where: str, classes: int, ks: Sequence[int]) -> None:
    """Say so where lists are longer than there are classes."""
    for k in ks:
        if k > classes:
            note(f"{where} has {classes} classes; zeroshot_acc@{k} counts all of them")
