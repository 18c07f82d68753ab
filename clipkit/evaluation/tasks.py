"""Tasks of `clipkit evaluate`: data opened for one of them, and a model's result on it.

A task is a function that opens data for it (`OPENERS`) and gives a `Task`: what a result depends on, and how to come by
one. Everything else (the cache, models side by side, intervals, baselines, reports) takes any task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipkit.classification import classes_of, prompt_set
from clipkit.core import ClipkitError, gathering, note, on_each
from clipkit.data.sources import Source, open_source
from clipkit.embedding import stored_kind
from clipkit.evaluation.benchmark_data import Benchmark, is_benchmark, open_benchmark
from clipkit.evaluation.choice import evaluate_choice, open_instances
from clipkit.evaluation.embedder import SharedWork
from clipkit.evaluation.measuring import Evaluation
from clipkit.evaluation.options import TaskOptions, flags
from clipkit.evaluation.probe import PROBE_KS, evaluate_probe, open_probe
from clipkit.evaluation.results import known_or_new
from clipkit.evaluation.retrieval import RETRIEVAL_KS, evaluate_retrieval, evaluate_stored_retrieval
from clipkit.evaluation.stored import Stored, open_stored
from clipkit.evaluation.unknown import open_unknown
from clipkit.evaluation.zeroshot import (
    ZEROSHOT_KS,
    ClassLabels,
    LabelledEmbeddings,
    LabelledImages,
    evaluate_stored_zeroshot,
    evaluate_zeroshot,
    open_classes,
    tell_clamped,
)
from clipkit.metrics import clamped
from clipkit.models import LazyModel, refuse_another, spec_of

__all__ = ["OPENERS", "Task", "evaluate", "evaluate_model", "open_task"]


@dataclass(frozen=True)
class Task:
    """What is to be measured on what."""

    name: str
    about: list[object]
    """All that a result depends on, beside the model and the code."""
    evaluate: Callable[[SharedWork], Evaluation]
    """Measures a model at work."""
    stored: Stored | None = None
    """Embeddings on the disk, which know their model."""
    sources: tuple[Source, ...] = ()
    """Otherwise: where the images come from."""

    def lasts(self, result: Evaluation) -> bool:
        """Whether the same model would give this result again, as long as what it depends on stays the same.

        Not where something could not be read, which may be there another time, and not where a server tells nothing
        by which a new content of a file would be known.
        """
        if not self.sources:
            return True
        if any(line.get("unread") for line in result.left_out):
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


def open_task(name: str, source: str, options: TaskOptions = TaskOptions()) -> Task:
    """Open data for a task.

    Args:
        name: ``retrieval``, ``zeroshot``, ``choice`` or ``probe``.
        source: for retrieval images with captions; for zeroshot a folder with a sub-folder of images per class; for
            choice see `clipkit.evaluation.choice`, for a probe `clipkit.evaluation.probe.open_probe`; a dataset in
            CLIP_benchmark's layout for each; embeddings or an index for retrieval and zeroshot.
        options: of the task.

    Raises:
        ClipkitError: where the data do not suit the task, or an option does not.
    """
    kind = stored_kind(source)
    _refuse_options(name, source, kind, options)
    return OPENERS[name](source, options, open_stored(source) if kind else None)


def _refuse_options(name: str, source: str, kind: str | None, options: TaskOptions) -> None:
    """Raise for the first option that does not suit the task or the data."""
    if name != "zeroshot" and options.templates is not None:
        raise ClipkitError(f"--templates is of zeroshot; {name} takes the captions as they are")
    if name != "zeroshot" and options.unknown is not None:
        raise ClipkitError(f"--unknown is of zeroshot, which names what an image shows; {name} does not")
    if name == "zeroshot" and flags(options.columns):
        raise ClipkitError("--image-column, --caption-column and --image-root are of lists; zeroshot takes a folder")
    if name != "probe" and flags(options.probe):
        given = ", ".join(flags(options.probe))
        raise ClipkitError(f"{given}: of probe, which learns from examples; {name} does not")
    if options.split is not None and not is_benchmark(Path(source)):
        raise ClipkitError(f"--split is of a dataset in CLIP_benchmark's layout; {source} is none")
    if kind and flags(options.columns):
        raise ClipkitError(f"--image-column, --caption-column and --image-root are of lists; {source} is {kind}")
    if options.through_index and not (name == "retrieval" and kind == "index"):
        raise ClipkitError(f"--through-index is of retrieval on an index; {source} is none, or the task is another")


def _benchmark(source: str, options: TaskOptions, suits: Sequence[str], name: str) -> Benchmark | None:
    """A dataset in CLIP_benchmark's layout, where it is one."""
    if not is_benchmark(Path(source)):
        return None
    dataset = open_benchmark(Path(source), options.split or "test")
    if dataset.kind not in suits:
        what = dataset.kind if dataset.kind in ("retrieval", "choice") else "zeroshot"
        raise ClipkitError(f"{source} is a dataset for {what}, not for {name}")
    return dataset


def _open_retrieval(source: str, options: TaskOptions, stored: Stored | None) -> Task:
    ks, compat = options.lengths(RETRIEVAL_KS), options.compat
    if stored is not None:
        more = {"through_index": options.through_index, "compat": compat}
        about = ["stored retrieval", stored.both().identity(), ks, more]
        return Task("retrieval", about, lambda work: evaluate_stored_retrieval(work, stored, ks, **more), stored)
    dataset = _benchmark(source, options, ["retrieval"], "retrieval")
    opened = dataset.source if dataset else open_source(source, **vars(options.columns), captions_required=True)
    about = ["retrieval", opened.identity(), ks, compat]
    return Task(
        "retrieval",
        about,
        lambda work: evaluate_retrieval(work, opened, ks, intervals=True, compat=compat),
        sources=(opened,),
    )


def _open_zeroshot(source: str, options: TaskOptions, stored: Stored | None) -> Task:
    ks, compat = options.lengths(ZEROSHOT_KS), options.compat
    prompts = prompt_set(options.templates or "plain")
    unknown = None if options.unknown is None else open_unknown(options.unknown)
    more = [] if unknown is None else ["unknown", unknown.identity()]
    own = () if unknown is None else unknown.sources()
    if stored is not None:
        labelled = LabelledEmbeddings(stored, ClassLabels(*classes_of(source, stored.paths())), unknown)
        names = labelled.classes.names
        tell_clamped(source, len(names), ks)
        about = ["stored zeroshot", stored.identity(), ks, names, prompts, compat, *more]
        return Task(
            "zeroshot",
            about,
            lambda work: evaluate_stored_zeroshot(work, labelled, prompts, ks, compat=compat),
            stored,
            own,
        )
    dataset = _benchmark(source, options, ["classification", "multilabel"], "zeroshot")
    if dataset is None:
        images = open_classes(source, ks)
    else:
        images = LabelledImages(dataset.source, ClassLabels(dataset.classes, dataset.truth(), by_folder=False))
        if options.templates is None and dataset.prompts:
            prompts = dataset.prompts
        if dataset.kind == "multilabel" and options.ks:
            raise ClipkitError(f"{source} has several labels for an image, whose figure is mAP; leave -k out")
        if dataset.kind == "multilabel" and unknown is not None:
            raise ClipkitError(f"{source} has several labels for an image, or none; --unknown asks for one each")
        if dataset.kind == "classification":
            tell_clamped(source, len(dataset.classes), ks)
    images = replace(images, unknown=unknown)
    names, labels = images.classes.names, images.classes.labels
    about = ["zeroshot", images.source.identity(), ks, names, prompts, labels.tolist(), compat, *more]
    return Task(
        "zeroshot",
        about,
        lambda work: evaluate_zeroshot(work, images, prompts, ks, intervals=True, compat=compat),
        sources=(images.source, *own),
    )


def _open_choice(source: str, options: TaskOptions, stored: Stored | None) -> Task:
    if options.ks:
        raise ClipkitError("-k is of retrieval and zeroshot; a choice is between two")
    if stored is not None:
        raise ClipkitError(f"{source} poses no choices; name the list of them, or a dataset in CLIP_benchmark's layout")
    instances = open_instances(source, split=options.split or "test", **vars(options.columns))
    return Task(
        "choice",
        ["choice", instances.identity(), options.compat],
        lambda work: evaluate_choice(work, instances, intervals=True, compat=options.compat),
        sources=(instances.source,),
    )


def _open_probe(source: str, options: TaskOptions, stored: Stored | None) -> Task:
    if stored is not None:
        raise ClipkitError(f"{source} holds embeddings; a probe needs the images: name what they were made from")
    samples = open_probe(source, options.probe, split=options.split or "test", columns=options.columns)
    for k in options.ks:
        if k > len(samples.classes):
            note(f"{source} has {len(samples.classes)} classes; acc@{k} counts all of them")
    ks, seed = options.lengths(PROBE_KS), options.probe.seed or 0
    return Task(
        "probe",
        ["probe", ks, seed, *samples.identity()],
        lambda work: evaluate_probe(work, samples, ks, seed=seed, intervals=True),
        sources=(samples.train.source, samples.test.source),
    )


OPENERS: dict[str, Callable[[str, TaskOptions, Stored | None], Task]] = {
    "retrieval": _open_retrieval,
    "zeroshot": _open_zeroshot,
    "choice": _open_choice,
    "probe": _open_probe,
}


def evaluate(task: Task, work: SharedWork) -> Evaluation:
    """A model's result; the one of the last time where model, data, prompts and code are the same.

    Args:
        task: what to measure on what.
        work: with a `LazyModel`; with none for the one that embeddings were made with, where nothing is asked of it.

    Raises:
        ClipkitError: where it cannot be measured, embeddings were made with another model, or the ranks have different
            models.
    """
    model: LazyModel | None = work.model

    def known_of_model() -> list[object]:
        if model is None:
            return []
        if task.stored is not None:
            refuse_another(task.stored.manifest, task.stored.folder, model.spec, model.facts.fingerprint)
        return [model.facts.fingerprint, model.facts.precision, work.batch_size]

    facts = work.together(known_of_model)
    if any(of_rank != facts[0] for of_rank in facts):
        raise ClipkitError(
            f"the processes have different models under the name {model.spec if model else ''}, or another precision; "
            "give all of them the same files"
        )
    result = known_or_new([*facts[0], *task.about], lambda: task.evaluate(work), work, task.lasts)
    if task.name == "retrieval":
        for k in clamped(_lengths(result), min(result.counts["images"], result.counts["captions"])):
            note(
                f"there are {result.counts['images']:,} images and {result.counts['captions']:,} captions; recall@{k} "
                "counts all of the side that is shorter"
            )
    return result


def _lengths(result: Evaluation) -> list[int]:
    return sorted({int(name.rpartition("@")[2]) for name in result.figures if "recall@" in name})


def evaluate_model(
    task: Task, spec: str | None, work: SharedWork, *, device: str | None = None, precision: str = "fp32"
) -> tuple[str, str, Evaluation]:
    """A model's result by its name.

    Args:
        task: what to measure on what.
        spec: see `clipkit.models.load_model`; None for the model that embeddings were made with, which is not loaded
            where nothing is asked of it.
        work: how it is divided, without a model.
        device, precision: of the model, see `LazyModel`.

    Returns:
        What the model is called, its fingerprint, and the result.

    Raises:
        ClipkitError: see `evaluate`; or where no model is named and the data know none.
    """
    if spec is None and task.stored is not None and task.name == "retrieval":
        result = evaluate(task, work)
        return task.own_model() or "", task.stored.manifest["model"]["fingerprint"], result

    def opened() -> LazyModel:
        named = spec or task.own_model()
        if named is None:
            raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
        return LazyModel(named, work.cache, device=device, precision=precision)

    model = on_each(opened, gathering(work.world_size, work.gather))
    result = evaluate(task, replace(work, model=model))
    return model.spec, model.facts.fingerprint, result
