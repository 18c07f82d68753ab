"""Zero-shot classification evaluated: one function for training, the command and notebooks, so that figures agree."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from clipkit.evaluation.unknown import UnknownImages, with_unknown
from clipkit.storage import digest

__all__ = [
    "ZEROSHOT_KS",
    "ClassLabels",
    "LabelledEmbeddings",
    "LabelledImages",
    "evaluate_stored_zeroshot",
    "evaluate_zeroshot",
    "open_classes",
    "tell_clamped",
]
ZEROSHOT_KS = (1, 5)


@dataclass(frozen=True)
class ClassLabels:
    """Classes, and which of them each image shows."""

    names: list[str]
    labels: np.ndarray
    """int64 ``[rows]``, places in the names, -1 where it is not known. Or ``[rows, classes]``: 1 for each class that an
    image is of, 0 for the others, -1 where it is not known."""
    by_folder: bool = True
    """Whether the folder that an image stands in says it, or something else; for what is said of images without one."""

    @property
    def known(self) -> np.ndarray:
        """Whether the class of each image is known, bool ``[rows]``."""
        known = self.labels >= 0
        return known if known.ndim == 1 else np.all(known, axis=1)

    @property
    def missing(self) -> str:
        """What is wrong with an image whose class is not known."""
        return "stands in no class's folder" if self.by_folder else "its class is not told"


@dataclass(frozen=True)
class LabelledImages:
    """Images of known classes."""

    source: Source
    classes: ClassLabels
    unknown: UnknownImages | None = None
    """Others that show none of the classes, to be told from these."""

    @classmethod
    def in_folders(cls, source: Source, names: Sequence[str] | None = None) -> "LabelledImages":
        """Images whose classes their folders name, see `clipkit.classification.class_folders`.

        Raises:
            ClipkitError: where there are no two classes.
        """
        return cls(source, ClassLabels(*class_folders(source, names)))


def evaluate_zeroshot(
    work: SharedWork,
    images: LabelledImages,
    templates: str | Sequence[str] = "plain",
    ks: Sequence[int] = ZEROSHOT_KS,
    *,
    intervals: bool = False,
    compat: bool = False,
) -> Evaluation:
    """Zero-shot accuracy on images whose classes are known (`clipkit.metrics.zeroshot_figures`).

    Of images that may be of several classes each it is the mean average precision
    (`clipkit.metrics.mean_average_precision`). With images that show none of the classes also how well the scores tell
    them apart (`clipkit.evaluation.unknown`).

    Args:
        work: see `evaluate_retrieval`.
        images: with their classes, see `open_classes`.
        templates: with ``{}``, or the name of a set (see `clipkit.classification.prompt_set`); used as in
            `class_vectors`.
        ks: list lengths; of no use for several classes.
        intervals, compat: see `evaluate_retrieval`.

    Raises:
        ClipkitError: where no image can be used, on all ranks also where one fails.
    """
    source, names = images.source, images.classes.names
    prompts = prompt_set(templates) if isinstance(templates, str) else templates
    vectors = class_vectors(names, prompts, work.texts)
    embedded = work.images(source)
    labels, known = images.classes.labels[embedded.rows], images.classes.known[embedded.rows]
    left_out = embedded.left_out + [
        {"row": row, "key": source.key(row), "reason": images.classes.missing}
        for row in np.array(embedded.rows)[~known].tolist()
    ]
    if not known.any():
        reason = "no image stands in a class folder" if images.classes.by_folder else "no image has a class"
        raise nothing_usable(source, left_out, reason)
    further = Further(samples_hash(source, embedded, names, labels) if intervals else None, compat)
    if labels.ndim == 2:
        several = labels[known] == 1
        if not several.any():
            raise ClipkitError(f"no image of {source.spec} is of any class, so there is no precision to be measured")
        result = work.by_the_first(lambda: measure_labels(embedded.vectors[known], vectors, several, further))
    else:
        labelled = embedded.vectors[known], vectors, labels[known], ks, names, further
        unknown = None if images.unknown is None else images.unknown.embed(work)

        def measured() -> Evaluation:
            result = measure_classes(*labelled)
            if unknown is None:
                return result
            return with_unknown(result, labelled[0], unknown, vectors, work.facts.scale, further.of)

        result = work.by_the_first(measured)
        left_out += [] if unknown is None else unknown.left_out
    return replace(result, left_out=left_out)


@dataclass(frozen=True)
class LabelledEmbeddings:
    """As `LabelledImages`, of embeddings on the disk."""

    stored: Stored
    """With images."""
    classes: ClassLabels
    unknown: UnknownImages | None = None


def evaluate_stored_zeroshot(
    work: SharedWork,
    images: LabelledEmbeddings,
    prompts: Sequence[str],
    ks: Sequence[int],
    *,
    compat: bool = False,
) -> Evaluation:
    """As `evaluate_zeroshot`, of embeddings on the disk.

    Args:
        work: whose ranks embed the prompts; the first does the rest.
        images: an image of no class is left out.
        prompts: with ``{}``, see `class_vectors`.
        ks: list lengths.
        compat: see `evaluate_retrieval`.
    """
    stored, names, labels = images.stored, images.classes.names, images.classes.labels
    vectors = class_vectors(names, prompts, work.texts)
    known = images.classes.known
    unknown = None if images.unknown is None else images.unknown.embed(work)

    def measured() -> Evaluation:
        blocks = stored.image
        if not known.all():
            ends = np.cumsum([len(block) for block in blocks])[:-1]
            blocks = [block[own] for block, own in zip(blocks, np.split(known, ends), strict=True) if own.any()]
        further = Further(digest([stored.of(), names, labels.tolist()]), compat)
        result = measure_classes(blocks, vectors, labels[known], ks, names, further)
        if unknown is None:
            return result
        return with_unknown(result, blocks, unknown, vectors, work.facts.scale, further.of)

    result = work.by_the_first(measured)
    strays = [{"key": key, "reason": images.classes.missing} for key in _keys(stored, ~known)]
    left_out = [*(line for line in stored.left_out if "row" in line), *strays]
    return replace(result, left_out=left_out + ([] if unknown is None else unknown.left_out))


def _keys(stored: Stored, wanted: np.ndarray) -> list[str]:
    return [path for path, own in zip(stored.paths(), wanted, strict=True) if own] if wanted.any() else []


def open_classes(folder: str, ks: Sequence[int] = ZEROSHOT_KS) -> LabelledImages:
    """Open a folder with a sub-folder of images per class, and say so where there are fewer classes than `ks` ask for.

    Raises:
        ClipkitError: where it is something else, or has no two such sub-folders.
    """
    source = open_source(folder)
    if not isinstance(source, FolderSource):
        raise ClipkitError(f"{folder} is no folder of images; zero-shot needs one with a sub-folder per class")
    images = LabelledImages.in_folders(source)
    tell_clamped(folder, len(images.classes.names), ks)
    return images


def tell_clamped(where: str, classes: int, ks: Sequence[int]) -> None:
    """Say so where lists are longer than there are classes."""
    for k in ks:
        if k > classes:
            note(f"{where} has {classes} classes; zeroshot_acc@{k} counts all of them")
