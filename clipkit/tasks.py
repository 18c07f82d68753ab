"""Tasks of `clipkit evaluate`: a dataset opened for one of them, and a model's result on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.benchmarks import is_benchmark, open_benchmark
from clipkit.cache import Cache
from clipkit.errors import ClipkitError
from clipkit.evaluation import (
    RETRIEVAL_KS,
    ZEROSHOT_KS,
    Evaluation,
    class_folders,
    evaluate_retrieval,
    evaluate_zeroshot,
    open_classes,
    tell_clamped,
)
from clipkit.lazy_model import LazyModel
from clipkit.results import known_or_new
from clipkit.shared_work import Gather, SharedWork, towers_of
from clipkit.sources import Source, open_source
from clipkit.zeroshot import prompt_set

__all__ = ["Task", "evaluate", "open_task"]


@dataclass(frozen=True)
class Task:
    """What is to be measured on what."""

    name: str
    source: Source
    ks: tuple[int, ...]
    classes: list[str]
    """Empty for retrieval."""
    prompts: list[str]
    truth: np.ndarray | None
    """See `evaluate_zeroshot`."""

    def identity(self) -> list[object]:
        """All that a result depends on, beside the model and the code."""
        truth = None if self.truth is None else self.truth.tolist()
        return [self.name, self.source.identity(), self.ks, self.classes, self.prompts, truth]


def open_task(
    name: str, source: str, ks: Sequence[int] = (), *, split: str = "test", templates: str | None = None, **columns: Any
) -> Task:
    """Open a source for a task.

    Args:
        name: ``retrieval`` or ``zeroshot``.
        source: for retrieval images with captions; for zeroshot a folder with a sub-folder of images per class; or a
            dataset in CLIP_benchmark's layout for either.
        ks: list lengths; the task's usual ones where there are none.
        split: of such a dataset.
        templates: see `prompt_set`; those of the dataset where it has any, else bare names, when not given.
        columns: of a list, see `open_source`.

    Raises:
        ClipkitError: where the source does not suit the task, or an option does not.
    """
    retrieval = name == "retrieval"
    lengths = tuple(sorted(set(ks))) or (RETRIEVAL_KS if retrieval else ZEROSHOT_KS)
    if retrieval and templates is not None:
        raise ClipkitError("--templates is of zeroshot; retrieval takes the captions as they are")
    if not retrieval and any(value is not None for value in columns.values()):
        raise ClipkitError("--image-column, --caption-column and --image-root are of lists; zeroshot takes a folder")
    prompts = prompt_set(templates or "plain")
    if is_benchmark(Path(source)):
        found = open_benchmark(Path(source), split)
        if (found.kind == "retrieval") != retrieval:
            suits = "retrieval" if found.kind == "retrieval" else "zeroshot"
            raise ClipkitError(f"{source} is a dataset for {suits}, not for {name}")
        if retrieval:
            return Task(name, found.source, lengths, [], [], None)
        if found.kind == "multilabel":
            raise ClipkitError(f"{source} has several labels for an image; zeroshot takes one")
        tell_clamped(source, len(found.classes), lengths)
        prompts = found.prompts if templates is None and found.prompts else prompts
        return Task(name, found.source, lengths, found.classes, prompts, found.truth())
    if retrieval:
        return Task(name, open_source(source, **columns, captions_required=True), lengths, [], [], None)
    opened = open_classes(source, lengths)
    names, truth = class_folders(opened)
    return Task(name, opened, lengths, names, prompts, truth)


def evaluate(
    task: Task,
    model: LazyModel,
    cache: Cache,
    *,
    batch_size: int = 64,
    show: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Evaluation:
    """A model's result; the one of the last time where model, data, prompts and code are the same.

    Args:
        task: what to measure on what.
        model: the same on all ranks.
        cache: of results and embeddings; where ranks do not share it, it must hold the same for each.
        batch_size, show, rank, world_size, gather: see `evaluate_retrieval`.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "show": show, "rank": rank, "world_size": world_size}
    how |= {"gather": gather, "cache": cache}

    def work() -> Evaluation:
        if task.name == "retrieval":
            return evaluate_retrieval(model, task.source, task.ks, **how)
        return evaluate_zeroshot(model, task.source, task.classes, task.prompts, task.ks, truth=task.truth, **how)

    about = [model.facts.fingerprint, model.facts.precision, batch_size, *task.identity()]
    return known_or_new(cache, about, work, SharedWork(towers_of(model, cache), rank, world_size, gather))
