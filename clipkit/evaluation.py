"""Evaluations of a model on a source: one function for training, the command and notebooks, so that figures agree."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipkit.classification import class_folders, class_vectors, prompt_set
from clipkit.core import ClipkitError, meter, note
from clipkit.data.sources import FolderSource, Source, open_source
from clipkit.instances import Instances
from clipkit.measuring import (
    Evaluation,
    Further,
    measure_choice,
    measure_classes,
    measure_labels,
    measure_retrieval,
)
from clipkit.served import served_hits
from clipkit.shared_work import SharedImages, SharedWork
from clipkit.storage import digest
from clipkit.stored import Stored

__all__ = [
    "RETRIEVAL_KS",
    "ZEROSHOT_KS",
    "evaluate_choice",
    "evaluate_retrieval",
    "evaluate_stored_classes",
    "evaluate_stored_retrieval",
    "evaluate_zeroshot",
    "open_classes",
    "tell_clamped",
]

RETRIEVAL_KS, ZEROSHOT_KS = (1, 5, 10), (1, 5)


def evaluate_retrieval(
    ranks: SharedWork,
    source: Source,
    ks: Sequence[int] = RETRIEVAL_KS,
    *,
    intervals: bool = False,
    compat: bool = False,
) -> Evaluation:
    """Recall, reciprocal and median ranks both ways between images and captions (`clipkit.metrics.retrieval_figures`).

    Args:
        ranks: the model at work, alone or shared; scores are float32 whatever it embeds in.
        source: with captions.
        ks: list lengths.
        intervals: also say how far each figure may be off, and keep what pairs this model with another.
        compat: also give the figures of CLIP_benchmark's definitions.

    Raises:
        ClipkitError: where no sample can be used, on all ranks also where one of them fails.
    """
    images = ranks.images(source)
    captions = [caption for of_image in images.captions for caption in of_image]
    if not captions:
        raise _nothing(source, images.left_out, "no sample has a caption")
    text = ranks.texts(captions)
    image_of_text = np.repeat(np.arange(len(images.rows)), [len(of_image) for of_image in images.captions])
    further = Further(_of(source, images, captions, image_of_text) if intervals else None, compat)
    found = ranks.by_the_first(lambda: measure_retrieval(images.vectors, text, image_of_text, ks, further))
    return replace(found, left_out=images.left_out)


def _of(source: Source, images: SharedImages, *more: Any) -> str:
    """A hash of which samples were used, by their keys; not of where they are, so that results can be carried about."""
    plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in more]
    return digest([[source.key(row) for row in images.rows], plain])


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
        raise _nothing(source, left_out, f"no image {'stands in a class folder' if truth is None else 'has a class'}")
    further = Further(_of(source, images, names, label) if intervals else None, compat)
    if label.ndim == 2:
        several = label[known] == 1
        if not several.any():
            raise ClipkitError(f"no image of {source.spec} is of any class, so there is no precision to be measured")
        found = ranks.by_the_first(lambda: measure_labels(images.vectors[known], vectors, several, further))
    else:
        of = images.vectors[known], vectors, label[known], ks, names, further
        found = ranks.by_the_first(lambda: measure_classes(*of))
    return replace(found, left_out=left_out)


def evaluate_choice(
    ranks: SharedWork,
    instances: Instances,
    *,
    intervals: bool = False,
    compat: bool = False,
) -> Evaluation:
    """Whether a model tells a true caption from a false one (`clipkit.metrics.choice`).

    Args:
        ranks: see `evaluate_retrieval`.
        instances: images with captions to choose among; one whose image cannot be used is left out.
        intervals, compat: see `evaluate_retrieval`.

    Raises:
        ClipkitError: where no instance can be used, on all ranks also where one fails.
    """
    images = ranks.images(instances.source)
    place = np.full(len(instances.source), -1)
    place[images.rows] = np.arange(len(images.rows))
    at = place[instances.images]
    usable = (at >= 0).all(axis=1)
    told = {line["row"] for line in images.left_out if "row" in line}  # a sample whose words are at fault is no image
    left_out = [*images.left_out, *(line for line in instances.problems if line.get("row") not in told)]
    if not usable.any():
        raise _nothing(instances.source, left_out, "no instance has its images")
    captions = [instances.captions[row] for row in np.flatnonzero(usable)]
    text = ranks.texts([caption for of_instance in captions for caption in of_instance])
    of = _of(instances.source, images, captions, at[usable]) if intervals else None
    both = images.vectors[at[usable]], text.reshape(len(captions), -1, text.shape[1])
    found = ranks.by_the_first(lambda: measure_choice(*both, Further(of, compat)))
    return replace(found, left_out=left_out)


def evaluate_stored_retrieval(
    ranks: SharedWork,
    stored: Stored,
    ks: Sequence[int] = RETRIEVAL_KS,
    *,
    through_index: bool = False,
    compat: bool = False,
) -> Evaluation:
    """As `evaluate_retrieval`, of embeddings on the disk, which are read in blocks: memory does not grow with them.

    Args:
        ranks: of which the first does it; no model is needed.
        stored: with both sides.
        ks: list lengths.
        through_index: of an index; also what it answers, see `clipkit.served`.
        compat: see `evaluate_retrieval`.
    """

    def work() -> Evaluation:
        served = served_hits(stored.both(), ks) if through_index else None
        both, further = stored.both(), Further(stored.of(), compat)
        with meter(ranks.show or "", len(stored.image_of_text), "captions") as advance:
            told = advance if ranks.show else None
            return measure_retrieval(
                both.image, both.text, both.image_of_text, ks, further, served=served, advance=told
            )

    return replace(ranks.by_the_first(work), left_out=stored.left_out)


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


def _nothing(source: Source, left_out: list[dict[str, Any]], reason: str) -> ClipkitError:
    first = left_out[0] if left_out else {"key": source.spec, "reason": reason}
    return ClipkitError(f"nothing in {source.spec} can be evaluated; the first: {first['key']}: {first['reason']}")


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
