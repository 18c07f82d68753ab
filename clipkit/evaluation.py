"""Evaluations of a model on a source: one function for training, the command and notebooks, so that figures agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit.cache import Cache
from clipkit.errors import ClipkitError, did_you_mean
from clipkit.labels import plain_name
from clipkit.log import note
from clipkit.metrics import retrieval_chance, retrieval_recall, zeroshot_accuracy, zeroshot_chance
from clipkit.shared_work import Gather, SharedWork, towers_of
from clipkit.sources import Source, open_source
from clipkit.sources.folder import FolderSource
from clipkit.zeroshot import class_vectors, prompt_set

__all__ = [
    "RETRIEVAL_KS",
    "ZEROSHOT_KS",
    "Evaluation",
    "class_folders",
    "evaluate_retrieval",
    "evaluate_zeroshot",
    "open_classes",
    "tell_clamped",
]

RETRIEVAL_KS, ZEROSHOT_KS = (1, 5, 10), (1, 5)


@dataclass
class Evaluation:
    """Figures of an evaluation, and what they were measured on; the same on every rank."""

    figures: dict[str, float]
    """Fractions, as `clipkit.metrics` names them."""
    chance: dict[str, float]
    """What guessing scores, under the same names."""
    counts: dict[str, int]
    """How many ``images`` were used, and ``captions`` or ``classes``."""
    left_out: list[dict[str, Any]]
    """Ledger lines of what could not be used, with ``key`` and ``reason``."""


def evaluate_retrieval(
    model: Any,
    source: Source,
    ks: Sequence[int] = RETRIEVAL_KS,
    *,
    batch_size: int = 64,
    show: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    cache: Cache | None = None,
) -> Evaluation:
    """Recall at k in both directions between a source's images and captions (`clipkit.metrics.retrieval_recall`).

    Args:
        model: see `towers_of`, in the precision that is wanted; scores are float32. The same on all ranks.
        source: with captions.
        ks: list lengths.
        batch_size: images at a time; captions go four times as many at a time.
        show: title of a progress bar.
        rank, world_size: whose part of the work to do.
        gather: brings the ranks' parts together; `gather_objects` where not given and there are several.
        cache: of what was embedded before, see `towers_of`.

    Raises:
        ClipkitError: where no sample can be used, on all ranks also where one of them fails.
    """
    ranks = SharedWork(towers_of(model, cache), rank, world_size, gather)
    images = ranks.images(source, batch_size, show)
    captions = [caption for of_image in images.captions for caption in of_image]
    if not captions:
        raise _nothing(source, images.left_out, "no sample has a caption")
    text = ranks.texts(captions, 4 * batch_size)
    image_of_text = np.repeat(np.arange(len(images.rows)), [len(of_image) for of_image in images.captions])
    figures = ranks.by_the_first(lambda: retrieval_recall(images.vectors, text, image_of_text, ks))
    return Evaluation(
        figures,
        retrieval_chance(len(images.rows), image_of_text, ks),
        {"images": len(images.rows), "captions": len(captions)},
        images.left_out,
    )


def evaluate_zeroshot(
    model: Any,
    source: Source,
    classes: Sequence[str] | None = None,
    templates: str | Sequence[str] = "plain",
    ks: Sequence[int] = ZEROSHOT_KS,
    *,
    truth: np.ndarray | None = None,
    batch_size: int = 64,
    show: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    cache: Cache | None = None,
) -> Evaluation:
    """Zero-shot accuracy on images whose classes are known (`clipkit.metrics.zeroshot_accuracy`).

    Args:
        model: see `towers_of`, in the precision that is wanted; scores are float32. The same on all ranks.
        source: see `open_classes`; any other where the truth is given.
        classes: the names to choose among; those of the sub-folders when not given.
        templates: with ``{}``, or the name of a set (see `clipkit.zeroshot.prompt_set`); used as in `class_vectors`.
        ks: list lengths.
        truth: int64 ``[rows]``, places in `classes`, -1 where it is not known; by the sub-folders when not given.
        batch_size, show, rank, world_size, gather, cache: see `evaluate_retrieval`.

    Raises:
        ClipkitError: where there are no two classes, or no image can be used, on all ranks also where one fails.
    """
    prompts = prompt_set(templates) if isinstance(templates, str) else templates
    names, labels = class_folders(source, classes) if truth is None or classes is None else (list(classes), truth)
    ranks = SharedWork(towers_of(model, cache), rank, world_size, gather)
    vectors = class_vectors(names, prompts, lambda texts: ranks.texts(texts, 4 * batch_size))
    images = ranks.images(source, batch_size, show)
    label = labels[images.rows]
    known = label >= 0
    left_out = images.left_out + [
        {"row": row, "key": source.key(row), "reason": "stands in no class's folder"}
        for row in np.array(images.rows)[~known].tolist()
    ]
    if not known.any():
        raise _nothing(source, left_out, "no image stands in a class's folder")
    figures = ranks.by_the_first(lambda: zeroshot_accuracy(images.vectors[known], vectors, label[known], ks))
    counts = {"images": int(known.sum()), "classes": len(names)}
    return Evaluation(figures, zeroshot_chance(len(names), ks), counts, left_out)


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


def class_folders(source: Source, classes: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """The classes of a source, and which one each row belongs to.

    A class is called as the first folder in its keys, with spaces for underscores.

    Args:
        source: with a folder per class.
        classes: their names in the order that is wanted, or more; sorted when not given.

    Returns:
        Names, and int64 ``[rows]`` of places in them, -1 for a row that stands in no folder.

    Raises:
        ClipkitError: where there are no two classes, two folders have one name, or a folder is none of `classes`.
    """
    folders = [source.key(row).rpartition("/")[0].partition("/")[0] for row in range(len(source))]
    name_of = {folder: plain_name(folder) for folder in sorted(set(folders)) if folder}
    folder_of = {name: folder for folder, name in name_of.items()}
    for folder, name in name_of.items():
        if folder_of[name] != folder:
            raise ClipkitError(f"{source.spec}: folders {folder!r} and {folder_of[name]!r} are both called {name!r}")
    names = list(folder_of) if classes is None else [plain_name(name) for name in classes]
    for name in name_of.values():
        if name not in names:
            raise ClipkitError(f"{source.spec}: folder {name!r} is none of the classes{did_you_mean(name, names)}")
    if len(names) < 2:
        held = f"one sub-folder of images, {names[0]!r}" if names else "no sub-folders of images"
        raise ClipkitError(f"{source.spec} has {held}; name the folder that holds one per class, and two or more")
    place = {name: at for at, name in enumerate(names)}
    return names, np.array([place[name_of[folder]] if folder else -1 for folder in folders], np.int64)
