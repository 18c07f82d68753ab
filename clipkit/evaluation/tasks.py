"""Tasks of `clipkit evaluate`: data opened for one of them, and a model's result on it.

A task is a function that opens data for it (`OPENERS`) and gives a `Task`: what a result depends on, and how to come by
one. Everything else (the cache, models side by side, intervals, baselines, reports) takes any task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.classification import class_folders, classes_of, prompt_set
from clipkit.core import ClipkitError, gathering, note, on_each
from clipkit.data.sources import Source, open_source
from clipkit.embedding import stored_kind
from clipkit.evaluation.benchmark_data import Benchmark, is_benchmark, open_benchmark
from clipkit.evaluation.choice import evaluate_choice, open_instances
from clipkit.evaluation.embedder import SharedWork
from clipkit.evaluation.measuring import Evaluation
from clipkit.evaluation.probe import PROBE_KS, evaluate_probe, open_probe
from clipkit.evaluation.results import known_or_new
from clipkit.evaluation.retrieval import RETRIEVAL_KS, evaluate_retrieval, evaluate_stored_retrieval
from clipkit.evaluation.stored import Stored, open_stored
from clipkit.evaluation.zeroshot import (
    ZEROSHOT_KS,
    evaluate_stored_classes,
    evaluate_zeroshot,
    open_classes,
    tell_clamped,
)
from clipkit.metrics import clamped
from clipkit.models import LazyModel, refuse_another, spec_of
from clipkit.storage import Cache

__all__ = ["OPENERS", "Asked", "Task", "evaluate", "measure", "open_task"]


PROBE = ("train", "train_split", "test_share", "label_column", "text_column", "group_column", "shots", "seed")


@dataclass(frozen=True)
class Asked:
    """What a user asks of a task; None where nothing is said."""

    ks: tuple[int, ...] = ()
    split: str = "test"
    """Of a dataset in CLIP_benchmark's layout."""
    templates: str | None = None
    """See `prompt_set`."""
    image_column: str | None = None
    caption_column: str | None = None
    image_root: str | None = None
    compat: bool = False
    """Also the figures of CLIP_benchmark's definitions."""
    through_index: bool = False
    """Of an index: also what it answers."""
    train: str | None = None
    train_split: str | None = None
    test_share: float | None = None
    label_column: str | None = None
    text_column: str | None = None
    group_column: str | None = None
    shots: int | None = None
    seed: int | None = None
    """This and those above: of a probe, see `clipkit.evaluation.probe.open_probe`."""

    def columns(self) -> dict[str, Any]:
        """What is said of a list."""
        return {name: getattr(self, name) for name in ("image_column", "caption_column", "image_root")}

    def probe(self) -> dict[str, Any]:
        """What is said of a probe."""
        return {name: value for name in PROBE if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Task:
    """What is to be measured on what."""

    name: str
    about: list[object]
    """All that a result depends on, beside the model and the code."""
    work: Callable[[SharedWork], Evaluation]
    """Measures a model at work."""
    stored: Stored | None = None
    """Embeddings on the disk, which know their model."""
    sources: tuple[Source, ...] = ()
    """Otherwise: where the images come from."""

    def lasts(self, found: Evaluation) -> bool:
        """Whether the same model would give this result again, as long as what it depends on stays the same.

        Not where something could not be read, which may be there another time, and not where a server tells nothing
        by which a new content of a file would be known.
        """
        if not self.sources:
            return True
        if any(line.get("unread") for line in found.left_out):
            return False
        # On the disk a file always has a size and a time, or it is missing, and so is unread.
        remote = [source for source in self.sources if source.remote]
        return all(None not in source.stamp(row) for source in remote for row in range(len(source)))

    def own_model(self) -> str | None:
        """The name of the model that made the embeddings; None where images are embedded now."""
        if self.stored is None:
            return None
        try:
            return spec_of(self.stored.manifest, self.stored.folder)
        except ClipkitError:
            if self.name != "retrieval":  # which asks the model nothing
                raise
            return self.stored.manifest["model"]["fingerprint"][:12]


def open_task(name: str, source: str, ks: Sequence[int] = (), **asked: Any) -> Task:
    """Open data for a task.

    Args:
        name: ``retrieval``, ``zeroshot``, ``choice`` or ``probe``.
        source: for retrieval images with captions; for zeroshot a folder with a sub-folder of images per class; for
            choice see `clipkit.evaluation.choice`, for a probe `clipkit.evaluation.probe.data`; a dataset in
            CLIP_benchmark's layout for each; embeddings or an index for retrieval and zeroshot.
        ks: list lengths; the task's usual ones where there are none.
        asked: see `Asked`.

    Raises:
        ClipkitError: where the data do not suit the task, or an option does not.
    """
    wanted = Asked(tuple(sorted(set(ks))), **asked)
    kind = stored_kind(source)
    if name != "zeroshot" and wanted.templates is not None:
        raise ClipkitError(f"--templates is of zeroshot; {name} takes the captions as they are")
    if name == "zeroshot" and any(value is not None for value in wanted.columns().values()):
        raise ClipkitError("--image-column, --caption-column and --image-root are of lists; zeroshot takes a folder")
    if name != "probe" and wanted.probe():
        given = ", ".join(f"--{each.replace('_', '-')}" for each in wanted.probe())
        raise ClipkitError(f"{given}: of probe, which learns from examples; {name} does not")
    if asked.get("split") is not None and not is_benchmark(Path(source)):
        raise ClipkitError(f"--split is of a dataset in CLIP_benchmark's layout; {source} is none")
    if kind and any(value is not None for value in wanted.columns().values()):
        raise ClipkitError(f"--image-column, --caption-column and --image-root are of lists; {source} is {kind}")
    if wanted.through_index and not (name == "retrieval" and kind == "index"):
        raise ClipkitError(f"--through-index is of retrieval on an index; {source} is none, or the task is another")
    opened = open_stored(source) if kind else None
    return OPENERS[name](source, wanted, opened)


def _benchmark(source: str, asked: Asked, suits: Sequence[str], name: str) -> Benchmark | None:
    """A dataset in CLIP_benchmark's layout, where it is one."""
    if not is_benchmark(Path(source)):
        return None
    found = open_benchmark(Path(source), asked.split)
    if found.kind not in suits:
        what = found.kind if found.kind in ("retrieval", "choice") else "zeroshot"
        raise ClipkitError(f"{source} is a dataset for {what}, not for {name}")
    return found


def _open_retrieval(source: str, asked: Asked, stored: Stored | None) -> Task:
    ks = asked.ks or RETRIEVAL_KS
    if stored is not None:
        more = {"through_index": asked.through_index, "compat": asked.compat}
        about = ["stored retrieval", stored.both().identity(), ks, more]
        return Task("retrieval", about, lambda ranks: evaluate_stored_retrieval(ranks, stored, ks, **more), stored)
    found = _benchmark(source, asked, ["retrieval"], "retrieval")
    opened = found.source if found else open_source(source, **asked.columns(), captions_required=True)
    about = ["retrieval", opened.identity(), ks, asked.compat]

    def work(ranks: SharedWork) -> Evaluation:
        return evaluate_retrieval(ranks, opened, ks, intervals=True, compat=asked.compat)

    return Task("retrieval", about, work, sources=(opened,))


def _open_zeroshot(source: str, asked: Asked, stored: Stored | None) -> Task:
    ks, prompts = asked.ks or ZEROSHOT_KS, prompt_set(asked.templates or "plain")
    if stored is not None:
        return _stored_zeroshot(source, stored, prompts, ks, asked.compat)
    found = _benchmark(source, asked, ["classification", "multilabel"], "zeroshot")
    if found is not None:
        names, opened, truth = found.classes, found.source, found.truth()
        prompts = found.prompts if asked.templates is None and found.prompts else prompts
        if found.kind == "multilabel" and asked.ks:
            raise ClipkitError(f"{source} has several labels for an image, whose figure is mAP; leave -k out")
        if found.kind == "classification":
            tell_clamped(source, len(names), ks)
    else:
        opened = open_classes(source, ks)
        names, truth = class_folders(opened)

    def work(ranks: SharedWork) -> Evaluation:
        more = {"truth": truth, "compat": asked.compat}
        return evaluate_zeroshot(ranks, opened, names, prompts, ks, intervals=True, **more)

    about = ["zeroshot", opened.identity(), ks, names, prompts, truth.tolist(), asked.compat]
    return Task("zeroshot", about, work, sources=(opened,))


def _stored_zeroshot(source: str, stored: Stored, prompts: list[str], ks: Sequence[int], compat: bool) -> Task:
    names, truth = classes_of(source, stored.paths())
    tell_clamped(source, len(names), ks)

    def work(ranks: SharedWork) -> Evaluation:
        return evaluate_stored_classes(ranks, stored, names, truth, prompts, ks, compat)

    return Task("zeroshot", ["stored zeroshot", stored.identity(), ks, names, prompts, compat], work, stored)


def _open_choice(source: str, asked: Asked, stored: Stored | None) -> Task:
    if asked.ks:
        raise ClipkitError("-k is of retrieval and zeroshot; a choice is between two")
    if stored is not None:
        raise ClipkitError(f"{source} poses no choices; name the list of them, or a dataset in CLIP_benchmark's layout")
    opened = open_instances(source, split=asked.split, **asked.columns())
    about = ["choice", opened.identity(), asked.compat]

    def work(ranks: SharedWork) -> Evaluation:
        return evaluate_choice(ranks, opened, intervals=True, compat=asked.compat)

    return Task("choice", about, work, sources=(opened.source,))


def _open_probe(source: str, asked: Asked, stored: Stored | None) -> Task:
    if stored is not None:
        raise ClipkitError(f"{source} holds embeddings; a probe needs the images: name what they were made from")
    opened = open_probe(source, split=asked.split, **asked.probe(), **asked.columns())
    for k in asked.ks:
        if k > len(opened.classes):
            note(f"{source} has {len(opened.classes)} classes; acc@{k} counts all of them")
    ks, seed = asked.ks or PROBE_KS, asked.seed or 0
    about = ["probe", ks, seed, *opened.identity()]

    def work(ranks: SharedWork) -> Evaluation:
        return evaluate_probe(ranks, opened, ks, seed=seed, intervals=True)

    return Task("probe", about, work, sources=(opened.train.source, opened.test.source))


OPENERS: dict[str, Callable[[str, Asked, Stored | None], Task]] = {
    "retrieval": _open_retrieval,
    "zeroshot": _open_zeroshot,
    "choice": _open_choice,
    "probe": _open_probe,
}


def evaluate(task: Task, ranks: SharedWork) -> Evaluation:
    """A model's result; the one of the last time where model, data, prompts and code are the same.

    Args:
        task: what to measure on what.
        ranks: with a `LazyModel`; with none for the one that embeddings were made with, where nothing is asked of it.

    Raises:
        ClipkitError: where it cannot be measured, embeddings were made with another model, or the ranks have different
            models.
    """
    model: LazyModel | None = ranks.model

    def known_of_it() -> list[object]:
        if model is None:
            return []
        if task.stored is not None:
            refuse_another(task.stored.manifest, task.stored.folder, model.spec, model.facts.fingerprint)
        return [model.facts.fingerprint, model.facts.precision, ranks.batch_size]

    facts = ranks.together(known_of_it)
    if any(of_rank != facts[0] for of_rank in facts):
        raise ClipkitError(
            f"the processes have different models under the name {model.spec if model else ''}, or another precision; "
            "give all of them the same files"
        )
    found = known_or_new([*facts[0], *task.about], lambda: task.work(ranks), ranks, task.lasts)
    if task.name == "retrieval":
        for k in clamped(_lengths(found), min(found.counts["images"], found.counts["captions"])):
            note(
                f"there are {found.counts['images']:,} images and {found.counts['captions']:,} captions; recall@{k} "
                "counts all of the side that is shorter"
            )
    return found


def _lengths(found: Evaluation) -> list[int]:
    return sorted({int(name.rpartition("@")[2]) for name in found.figures if "recall@" in name})


def measure(
    task: Task, spec: str | None, cache: Cache, *, device: str | None = None, precision: str = "fp32", **how: Any
) -> tuple[str, str, Evaluation]:
    """A model's result by its name.

    Args:
        task: what to measure on what.
        spec: see `clipkit.models.load_model`; None for the model that embeddings were made with, which is not loaded
            where nothing is asked of it.
        cache: of results and embeddings.
        device, precision: of the model, see `LazyModel`.
        how: see `SharedWork`.

    Returns:
        What the model is called, its fingerprint, and the result.

    Raises:
        ClipkitError: see `evaluate`; or where no model is named and the data know none.
    """
    if spec is None and task.stored is not None and task.name == "retrieval":
        found = evaluate(task, SharedWork(None, cache=cache, **how))
        return task.own_model() or "", task.stored.manifest["model"]["fingerprint"], found

    def opened() -> LazyModel:
        named = spec or task.own_model()
        if named is None:
            raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
        return LazyModel(named, cache, device=device, precision=precision)

    lazy = on_each(opened, gathering(how.get("world_size", 1), how.get("gather")))
    found = evaluate(task, SharedWork(lazy, cache=cache, **how))
    return lazy.spec, lazy.facts.fingerprint, found
