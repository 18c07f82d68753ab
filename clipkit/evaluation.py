"""Evaluations of a model on a source: one function for training, the command and notebooks, so that figures agree.

Ranks divide the work: each embeds some blocks of the source's rows and of its captions, and all of them get every
block. What is embedded together does not depend on how many ranks there are, so neither do the figures.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from clipkit.encoding import embed_source
from clipkit.errors import ClipkitError, did_you_mean
from clipkit.inference import cast_for_inference, evaluating
from clipkit.log import note, warn
from clipkit.metrics import retrieval_chance, retrieval_recall, zeroshot_accuracy, zeroshot_chance
from clipkit.settings import ValidationConfig
from clipkit.sources import Source, open_source
from clipkit.sources.folder import FolderSource
from clipkit.towers import DualEncoder
from clipkit.zeroshot import class_vectors, prompt_set

__all__ = [
    "Evaluation",
    "Gather",
    "Validation",
    "class_folders",
    "evaluate_retrieval",
    "evaluate_zeroshot",
    "gather_objects",
    "open_classes",
    "open_validation",
    "process_group",
    "validate",
]

Value = TypeVar("Value")
Gather = Callable[[Any], list[Any]]
"""Called on every rank with a value of its own, gives all ranks' values in rank order."""
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


def gather_objects(value: Any) -> list[Any]:
    """What each rank of the process group gives, in rank order; what stands in for it where there is no group: itself.

    Values are pickled; with NCCL they pass through the GPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started, for what a command computes: gives rank and number of ranks.

    Over gloo, as embeddings are gathered in main memory whatever the towers run on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


class _Ranks:
    """Who does what of an evaluation, and the exchange of what was done."""

    def __init__(self, rank: int, world_size: int, gather: Gather | None):
        self.rank, self.world_size = rank, world_size
        self.gather = gather or (gather_objects if world_size > 1 else lambda value: [value])

    def own(self, count: int, block: int) -> range:
        """This rank's part of so many items, in whole blocks; the ranks' parts follow each other."""
        blocks = -(-count // block)
        first, last = (min(blocks * r // self.world_size * block, count) for r in (self.rank, self.rank + 1))
        return range(first, last)

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """What the work gives on each rank. Where one fails, all raise its error, so that none waits in vain."""
        value, failure = None, None
        try:
            value = work()
        except ClipkitError as error:
            failure = error
        found = self.gather((value, failure and str(failure)))
        for _, reason in found:
            if reason is not None:
                raise ClipkitError(reason) from failure
        return [value for value, _ in found]

    def by_the_first(self, work: Callable[[], Value]) -> Value:
        """What the work gives on rank 0: processors that differ might differ in a last digit."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def images(self, model: DualEncoder, source: Source, batch_size: int, show: str | None) -> "_Images":
        """Embed all images of a source."""

        def work() -> _Images:
            rows = self.own(len(source), batch_size)
            found = embed_source(source, model, sides=["image"], rows=rows, batch_size=batch_size, show=show)
            return _Images(found.image, found.rows, [s.captions for s in found.samples], found.left_out)

        parts = self.together(work)
        return _Images(
            np.concatenate([part.vectors for part in parts]),
            [row for part in parts for row in part.rows],
            [captions for part in parts for captions in part.captions],
            [*source.problems, *(line for part in parts for line in part.left_out)],
        )

    def texts(self, model: DualEncoder, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed all texts, float32 ``[n, dim]``."""
        own = self.own(len(texts), batch_size)
        return np.concatenate(self.together(lambda: model.embed_texts(texts[own.start : own.stop], batch_size)))


@dataclass
class _Images:
    vectors: np.ndarray  # float32 [images, dim]
    rows: list[int]  # of the source
    captions: list[tuple[str, ...]]
    left_out: list[dict[str, Any]]


def evaluate_retrieval(
    model: DualEncoder,
    source: Source,
    ks: Sequence[int] = RETRIEVAL_KS,
    *,
    batch_size: int = 64,
    show: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Evaluation:
    """Recall at k in both directions between a source's images and captions (`clipkit.metrics.retrieval_recall`).

    Args:
        model: in the precision that is wanted; scores are float32. The same on all ranks.
        source: with captions.
        ks: list lengths.
        batch_size: images at a time; captions go four times as many at a time.
        show: title of a progress bar.
        rank, world_size: whose part of the work to do.
        gather: brings the ranks' parts together; `gather_objects` where not given and there are several.

    Raises:
        ClipkitError: where no sample can be used, on all ranks also where one of them fails.
    """
    ranks = _Ranks(rank, world_size, gather)
    with evaluating(model):
        images = ranks.images(model, source, batch_size, show)
        captions = [caption for of_image in images.captions for caption in of_image]
        if not captions:
            raise _nothing(source, images.left_out, "no sample has a caption")
        text = ranks.texts(model, captions, 4 * batch_size)
    image_of_text = np.repeat(np.arange(len(images.rows)), [len(of_image) for of_image in images.captions])
    figures = ranks.by_the_first(lambda: retrieval_recall(images.vectors, text, image_of_text, ks))
    return Evaluation(
        figures,
        retrieval_chance(len(images.rows), image_of_text, ks),
        {"images": len(images.rows), "captions": len(captions)},
        images.left_out,
    )


def evaluate_zeroshot(
    model: DualEncoder,
    source: Source,
    classes: Sequence[str] | None = None,
    templates: str = "plain",
    ks: Sequence[int] = ZEROSHOT_KS,
    *,
    batch_size: int = 64,
    show: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Evaluation:
    """Zero-shot accuracy on images in a sub-folder per class (`clipkit.metrics.zeroshot_accuracy`).

    Args:
        model: in the precision that is wanted; scores are float32. The same on all ranks.
        source: see `open_classes`.
        classes: the names to choose among; those of the sub-folders when not given.
        templates: puts classes into words, see `clipkit.zeroshot.prompt_set`; their vectors are as in `class_vectors`.
        ks: list lengths.
        batch_size, show, rank, world_size, gather: see `evaluate_retrieval`.

    Raises:
        ClipkitError: where there are no two classes, or no image can be used, on all ranks also where one fails.
    """
    prompts = prompt_set(templates)
    names, labels = class_folders(source, classes)
    ranks = _Ranks(rank, world_size, gather)
    with evaluating(model):
        vectors = class_vectors(model, names, prompts, lambda texts: ranks.texts(model, texts, 4 * batch_size))
        images = ranks.images(model, source, batch_size, show)
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
    for k in ks:
        if k > len(names):
            note(f"{folder} has {len(names)} classes; zeroshot_acc@{k} counts all of them")
    return source


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
    name_of = {folder: _plain(folder) for folder in sorted(set(folders)) if folder}
    folder_of = {name: folder for folder, name in name_of.items()}
    for folder, name in name_of.items():
        if folder_of[name] != folder:
            raise ClipkitError(f"{source.spec}: folders {folder!r} and {folder_of[name]!r} are both called {name!r}")
    names = list(folder_of) if classes is None else [_plain(name) for name in classes]
    for name in name_of.values():
        if name not in names:
            raise ClipkitError(f"{source.spec}: folder {name!r} is none of the classes{did_you_mean(name, names)}")
    if len(names) < 2:
        held = f"one sub-folder of images, {names[0]!r}" if names else "no sub-folders of images"
        raise ClipkitError(f"{source.spec} has {held}; name the folder that holds one per class, and two or more")
    place = {name: at for at, name in enumerate(names)}
    return names, np.array([place[name_of[folder]] if folder else -1 for folder in folders], np.int64)


def _plain(folder: str) -> str:
    return " ".join(folder.replace("_", " ").split())


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    # Nothing here draws, but towers and tokenizers are other libraries', and a run must not depend on being measured.
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@dataclass
class Validation:
    """What a training run is measured on, opened once."""

    config: ValidationConfig
    retrieval: Source | None
    zeroshot: Source | None

    def run(
        self, model: DualEncoder, *, rank: int = 0, world_size: int = 1, gather: Gather | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Measure a model, all ranks together.

        Neither the modes of its modules change nor any random generator, but the weights are cast in place to
        `ValidationConfig.precision`: give a copy where they are to be trained on.

        Args:
            model: the same on all ranks.
            rank, world_size, gather: see `evaluate_retrieval`.

        Returns:
            The figures, named as `clipkit evaluate` does, and ledger lines of what could not be used.
        """
        among: dict[str, Any] = {"rank": rank, "world_size": world_size, "gather": gather}
        found: list[Evaluation] = []
        with _generators_kept(model.device), evaluating(model):
            cast_for_inference(model, self.config.precision)
            if self.retrieval is not None:
                found.append(evaluate_retrieval(model, self.retrieval, **among))
            if self.zeroshot is not None:
                found.append(evaluate_zeroshot(model, self.zeroshot, templates=self.config.templates, **among))
        figures = {name: value for each in found for name, value in each.figures.items()}
        return figures, [line for each in found for line in each.left_out]


def open_validation(config: ValidationConfig) -> Validation | None:
    """Open what a run is measured on; None where it names nothing.

    Raises:
        ClipkitError: where something cannot be opened, or `best` is none of the figures.
    """
    names = [*retrieval_chance(1, np.zeros(1, np.int64), RETRIEVAL_KS)] if config.retrieval is not None else []
    names += zeroshot_chance(1, ZEROSHOT_KS) if config.zeroshot is not None else []
    if config.best is not None and config.best not in names:
        known = f"there are {', '.join(names)}" if names else "set validation.retrieval or validation.zeroshot too"
        raise ClipkitError(f"validation.best={config.best} is no figure{did_you_mean(config.best, names)}; {known}")
    if not names:
        return None
    return Validation(
        config,
        None if config.retrieval is None else open_source(config.retrieval, captions_required=True),
        None if config.zeroshot is None else open_classes(config.zeroshot),
    )


def validate(validation: Validation, model: DualEncoder, share: dict[str, Any]) -> dict[str, float]:
    """The figures of a run in the middle of its training, which what it is measured on must not end.

    What cannot be used is told in a warning, and so is a source that is gone: then there are no figures.

    Args:
        validation: what is measured.
        model: a copy, as in `Validation.run`.
        share: this rank and how many there are.
    """
    try:
        figures, left_out = validation.run(model, **share)
    except ClipkitError as error:  # the same on all ranks
        warn(f"no validation: {error}")
        return {}
    if left_out:
        warn(f"{len(left_out)} samples cannot be used for validation; the first: {left_out[0]['reason']}")
    return figures
