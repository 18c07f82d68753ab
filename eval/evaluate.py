"""Evaluate models on captioned images, images of known classes, or choices between captions.

`retrieval`, `zeroshot`, `choice` and `probe` measure one kind of thing each; a `suite` many models on many data.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit.cli import Job
from clipkit.options import cache_options, format_option, list_options, probe_options, task_options

if TYPE_CHECKING:
    from clipkit.evaluation import Change, Measure, Result, SharedWork, SuiteConfig, Task, TaskOptions


@click.command(cls=Job)
@click.argument("task", type=click.Choice(["retrieval", "zeroshot", "choice", "probe", "suite"]))
@click.argument("source")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A run or model folder, RUN@step-N, open_clip:NAME/TAG, or hf:ORG/NAME; several are put side by side, with "
    "the difference of each from the first [default of embeddings and an index: the one that made them].",
)
@list_options
@task_options
@click.option(
    "--baseline",
    metavar="FILE|MODEL",
    help="An earlier --out .json, or a model: the exit status is 1 where a figure is worse than there.",
)
@click.option(
    "--tolerance",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="How much worse than the baseline is no matter: a fraction; of a median rank a share of the baseline's.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the towers; scores are always float32.",
)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option(
    "--threads", type=click.IntRange(0), help="That decode images; 0: none beside the towers' [default: one per core]."
)
@click.option("--device", help="For the model [default: the GPU where there is one].")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the results: .json (in CLIP_benchmark's form), .md, or .html (a page that refers to nothing else).",
)
@probe_options
@cache_options
@format_option
def main(task: str, source: str, models: tuple[str, ...], **asked: Any) -> int:
    """Run TASK on SOURCE and print the figures: fractions, not per cent, with 95 % intervals (…_low, …_high).

    retrieval, on a list, shards, a folder with captions, a dataset in CLIP_benchmark's layout, embeddings with both
    sides, or an index: image_retrieval_recall@k is the share of captions whose image is among the k nearest,
    text_retrieval_recall@k the share of images with any of their captions among the k nearest; …_mrr the mean of 1 over
    the rank of the first right one (Voorhees 1999), …_median_rank the median of that rank, from 1.

    zeroshot, on a folder with a sub-folder of images per class, embeddings or an index of such, or a dataset in that
    layout: zeroshot_acc@k is the share of images with their class among the k nearest, zeroshot_mean_per_class_recall
    the mean over the classes of the share with it nearest. Where an image has several labels,
    zeroshot_mean_average_precision is the mean over classes of the average precision of the images sorted by score.
    With --unknown, unknown_auroc is the chance that an image of a class has a higher largest probability than one that
    shows none (Hendrycks & Gimpel 2017), unknown_fpr95 the share of those that pass where 95 % of the others do;
    unknown_max_cosine_… the same of the largest cosine.

    choice, on a list or JSON with image, caption and negative (as SugarCrepe has it), or image_0, caption_0, image_1,
    caption_1 (Winoground), or shards in that layout with the right caption in the first line: choice_acc is the share
    of images closer to the right caption; winoground_text, _image and _group as Winoground's paper defines them.

    probe, on a folder with a sub-folder of images per class, a list or shards with --label-column, or a dataset in that
    layout: multinomial logistic regression on the embeddings of images, its strength by cross-validation
    (linear_probe_acc@k); with --text-column also early fusion (one on both embeddings), late fusion (one on each, the
    mean of their log probabilities, plain or weighted) and attention fusion (learned, per sample), each with both sides
    and with one withheld; …_gain is how far it lies above the better side alone. A training sample whose image is in
    the test too, byte by byte, or whose group is, is left out. Chance is the most frequent class.

    suite, on a YAML file with models and datasets (task, source, and the options of these tasks by name).

    Equal scores count with the expected value over random orders, so a model that tells nothing apart scores exactly
    chance_…, what guessing would: of n images the recall k / n, the mean reciprocal rank H(n) / n, the median rank
    (n + 1) / 2. Intervals are Wilson's for shares of independent images, else by a bootstrap over images with their
    captions; models are compared on the same draws.

    With --baseline a figure is worse where the interval of the difference lies wholly beyond 0 and the tolerance; where
    the file does not hold what pairs the two, where this result's own interval lies wholly beyond the file's figure.

    Embeddings are kept, so that it goes on where it was interrupted; a result is taken from the last time where
    model, data, prompts and code are the same. Under torchrun the processes divide the work; the figures are the same.
    """
    from clipkit.core import note, process_group
    from clipkit.evaluation import (
        Task,
        TaskOptions,
        changes_of_all,
        differences_from_first,
        emit_results,
        evaluate_model,
        matches,
        write_results,
    )

    report, compute = taken(Reporting, asked), taken(Computing, asked)
    options = TaskOptions.of(**{**asked, "compat": asked["compat"] is not None})
    data = open_data(task, source, models, options)
    names = [(task, source)] if isinstance(data, Task) else data.names()
    baseline = report.earlier_results()
    matched = {} if baseline is None else matches(names, baseline)  # what is wrong there is said before measuring
    with process_group() as (rank, world_size):
        work = compute.work(f"evaluate {task}", rank, world_size)
        measure = functools.partial(evaluate_model, work=work, device=compute.device, precision=compute.precision)
        results, failures = results_of(data, source, models, measure, options.compat)
        if report.baseline is not None and baseline is None:
            baseline, failed = results_of(data, source, [report.baseline], measure, options.compat)
            matched = matches(names, baseline)
            failures += [line for line in failed if line not in failures]
    changes: list[Change] = []
    if rank == 0:
        differences = differences_from_first(results)
        changes = changes_of_all(results, matched, report.tolerance)
        alone = isinstance(data, Task) and len(results) == 1
        emit_results(results, differences, changes, report.fmt, baseline=report.baseline, alone=alone)
        if report.out is not None:
            write_results(report.out, results, differences, changes=changes, failures=failures)
            note(f"wrote {report.out}")
    return exit_status(task, results, failures, changes)


@dataclass(frozen=True)
class Reporting:
    """How results are shown, and what they are held against."""

    fmt: str
    out: Path | None
    baseline: str | None
    tolerance: float

    def __post_init__(self) -> None:
        from clipkit.core import ClipkitError
        from clipkit.evaluation import check_name

        if self.out is not None:
            check_name(self.out)
        if self.tolerance and self.baseline is None:
            raise ClipkitError("--tolerance says how much worse than a baseline is no matter; name one with --baseline")

    def earlier_results(self) -> "list[Result] | None":
        """Those of the baseline's file; None where it is a model, or there is none."""
        from clipkit.evaluation import from_clip_benchmark

        if self.baseline is None or not Path(self.baseline).is_file():
            return None
        return from_clip_benchmark(Path(self.baseline))


@dataclass(frozen=True)
class Computing:
    """What embeds, and where embeddings and results are kept."""

    device: str | None
    precision: str
    batch_size: int
    threads: int | None
    cache: Path | None
    no_cache: bool
    cache_size: int

    def work(self, show: str, rank: int, world_size: int) -> "SharedWork":
        """The part of one of the processes, without a model."""
        from clipkit.core import cache_folder
        from clipkit.evaluation import SharedWork
        from clipkit.storage import Cache

        cache = Cache(None if self.no_cache else self.cache or cache_folder(), self.cache_size)
        return SharedWork(None, self.batch_size, self.threads, show, cache, rank, world_size)


def taken(kind: type, asked: dict[str, Any]) -> Any:
    """The options of one kind, taken out of all that are asked."""
    return kind(**{field.name: asked.pop(field.name) for field in fields(kind)})


def open_data(task: str, source: str, models: Sequence[str], options: "TaskOptions") -> "Task | SuiteConfig":
    """What is to be measured on: a task's data, or a suite."""
    from clipkit.core import ClipkitError
    from clipkit.embedding import stored_kind
    from clipkit.evaluation import load_suite, open_task

    if task == "suite":
        if given := options.given():
            raise ClipkitError(f"{', '.join(given)}: a suite says so for each of its datasets; write it into {source}")
        return load_suite(Path(source), models)
    if not models and stored_kind(source) is None:
        raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    if task == "probe" and options.compat:
        raise ClipkitError("--compat: a linear probe is the same in CLIP_benchmark; leave it out")
    return open_task(task, source, options)


def results_of(
    data: "Task | SuiteConfig", source: str, models: Sequence[str], measure: "Measure", compat: bool
) -> "tuple[list[Result], list[str]]":
    """Those of all models, or those that a suite names where none are given, and a line for each that failed."""
    from clipkit.evaluation import Task, run_suite, run_task

    if isinstance(data, Task):
        return run_task(data, source, models, measure), []
    return run_suite(data, measure, models, compat=compat)


def exit_status(task: str, results: "Sequence[Result]", failures: Sequence[str], changes: "Sequence[Change]") -> int:
    """Say what failed, became worse or could not be used: then it is 1."""
    from clipkit.core import warn

    for line in failures:
        warn(f"not measured: {line}")
    worse = [change for change in changes if change.worse]
    for change in worse:
        warn(f"regression: {change.line()}")
    left_out = {result.name: result.found.left_out for result in results if result.found.left_out}
    for name, lines in left_out.items():
        where = f"{name}: " if task == "suite" else ""
        warn(f"{where}{len(lines)} could not be used; the first: {lines[0]['key']}: {lines[0]['reason']}")
    return int(bool(failures or worse or left_out))


if __name__ == "__main__":
    main()
