"""Classify images by names alone, or with a few examples of each.

Each name becomes a vector through the text tower, each image takes the nearest; examples move the vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipkit.cli import Job
from clipkit.options import cache_options, decision_options, format_option, glob_options, list_options, sort_options

if TYPE_CHECKING:
    from clipkit.classification import Classified, Fit, ImageOptions, Images, LabelSet, OpenedImages, Rule, Threshold
    from clipkit.classification.sort import Sorter
    from clipkit.storage import Cache

LISTED = 20  # unreadable files on the screen
READABLE = 200  # rows of a table on the screen; of more, what each label got


@dataclass(frozen=True)
class Options:
    """The command's options, but for the labels, the models and the format."""

    prompts: str | None
    background: str | None
    multi_label: bool
    threshold: float | None
    min_margin: float
    examples: str | None
    method: str | None
    calibrate: bool
    temperature: float | None
    precision_wanted: float | None
    ablate_prompts: bool
    where: str | None
    top: int
    report: Path | None
    batch_size: int
    precision: str
    device: str | None
    sort_into: Path | None
    how: Literal["copy", "link", "move"] | None
    yes: bool
    undo: Path | None
    cache: Path | None
    no_cache: bool
    cache_size: int
    image_column: str | None
    caption_column: str | None
    image_root: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]


@click.command(cls=Job)
@click.argument("source", required=False)
@click.option(
    "--labels",
    help='Names with commas between, "cat,dog,horse"; a text file with one a line; or YAML with all that is known.',
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="Run or model folder, open_clip:NAME/TAG, or hf:ORG/NAME; of several the probabilities are joined [default of "
    "embeddings and an index: the one that made them].",
)
@click.option(
    "--prompts",
    help="default, plain, photo, openai80, or templates of your own: 'a drawing of a {}.|a {}.' [default: those in the "
    "file of labels, else default].",
)
@decision_options
@click.option("--where", metavar="CONDITION", help="Of an index: only images of which this holds, as in search.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="How many classes to list per image.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page: contact sheets, least certain first.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the towers; auto: bf16 where the device is fast at it.",
)
@click.option("--device", help="For the model [default: the GPU where there is one].")
@sort_options
@cache_options
@list_options
@glob_options
@format_option
def main(source: str | None, labels: str | None, models: tuple[str, ...], fmt: str, **given: Any) -> int:
    """Say for every image of SOURCE (a folder, list, shards, embeddings or an index) which of the labels fits best.

    Rows: path, label, score (cosine), probability, margin (to the second), top, status, reason. What is not sure enough
    has the status "unsure", what fits a label for "none of these" best "background". An unreadable image has a row too,
    with status "unreadable", and the exit status is 1. Of embeddings and of an index no image is encoded again; of
    other sources none that was before and has not changed. With examples a row tells whether its image is one of them
    ("example"), by its bytes, wherever it lies; such an image does not count for the accuracy.

    Of a folder, hidden files and folders are passed over; links are followed to files, not to folders. With --sort-into
    rows have "to", the place in DIR. A journal in DIR is written ahead of every step: whatever ends the sort, the same
    command goes on, and --undo DIR (which needs nothing else) restores what was there before.
    """
    from clipkit.classification import Classified, ablate_prompts, classify_images, open_images, write_report
    from clipkit.classification.sort import Sorter, undo_sort
    from clipkit.core import ClipkitError, cache_folder, emit, note
    from clipkit.storage import Cache

    options = Options(**given)
    refuse_contradictions(source, labels, options)
    if options.undo is not None:
        if left := undo_sort(options.undo):
            emit(left, fmt)
        return int(bool(left))
    if source is None or labels is None:
        raise ClipkitError(f"name {'the images' if source is None else 'the labels: --labels NAMES'} to classify")
    cache = Cache(None if options.no_cache else options.cache or cache_folder(), options.cache_size)
    known, prompts, rule = what_to_tell(labels, options, cache)
    into, several = options.sort_into, options.multi_label
    sorter = Sorter(into, options.how or "copy", yes=options.yes, several=several) if into else None
    opened = (sorter.open if sorter else open_images)(source, models, cache, image_options(options))
    if opened is None:
        note(f"all that {source} had is sorted into {into}; nothing was left to do")
        return 0
    fit, threshold = learn(opened, known, prompts, options)
    if threshold is not None:
        rule = replace(rule, threshold=threshold.probability)
    images = opened.embed()
    if not len(images) and not (sorter and sorter.before):
        first = {"key": source, "reason": "no image passes", **(images.unreadable[0] if images.unreadable else {})}
        raise ClipkitError(f"nothing in {source} can be used; the first: {first['key']}: {first['reason']}")
    if options.ablate_prompts:
        emit(ablate_prompts(images, known, prompts, opened.models, cache), fmt)
        tell_unreadable(images)
        return int(bool(images.unreadable))
    decisions = classify_images(images, fit.classifiers, rule, top=options.top)
    classified = Classified.by_folders(images, known, decisions, fit, threshold)
    if options.report is not None:
        write_report(options.report, classified, about=f"{source}, by {', '.join(m.spec for m in opened.models)}")
        note(f"{options.report}: contact sheets, least certain first")
    show(classified, sorter, fmt)
    return int(bool(images.unreadable or classified.unusable_examples or (sorter and sorter.failed)))


def refuse_contradictions(source: str | None, labels: str | None, options: Options) -> None:
    """Refuse options that do not go together."""
    from clipkit.core import ClipkitError

    if options.undo is not None:
        if source or labels or options.sort_into:
            raise ClipkitError("--undo DIR takes back what was sorted into DIR; it goes with no SOURCE and no --labels")
        return
    if options.sort_into and options.ablate_prompts:
        raise ClipkitError("--ablate-prompts classifies nothing, so there is nothing to sort; leave out --sort-into")
    if not options.sort_into and (options.how or options.yes):
        raise ClipkitError("--how and --yes are of --sort-into DIR; name the folder")
    if options.threshold is not None and options.precision_wanted is not None:
        raise ClipkitError("--precision-wanted sets the threshold; leave out --threshold")


def what_to_tell(labels: str, options: Options, cache: "Cache") -> "tuple[LabelSet, Sequence[str], Rule]":
    """The labels, the prompts for them, and when an answer is sure."""
    from clipkit.classification import Rule, cached_prompts, parse_labels

    known = parse_labels(labels).with_background(options.background)
    prompts = cached_prompts(options.prompts or known.prompts or "default", cache)
    threshold = options.threshold if options.threshold is not None else 0.5 * options.multi_label
    groups = list(known.groups.values())
    return known, prompts, Rule(threshold, options.min_margin, known.background, options.multi_label, groups)


def image_options(options: Options) -> "ImageOptions":
    """Which images of the source, and how they are embedded."""
    from clipkit.classification import ImageOptions
    from clipkit.data.sources import Globs

    globs = Globs(options.include, options.exclude)
    columns = options.image_column, options.caption_column, options.image_root
    towers = options.batch_size, options.device, options.precision
    return ImageOptions(options.where, globs, *columns, *towers, show="classify")


def learn(
    opened: "OpenedImages", labels: "LabelSet", prompts: Sequence[str], options: Options
) -> "tuple[Fit, Threshold | None]":
    """Classifiers by the names and the examples, and the threshold that a wanted precision asks for."""
    from clipkit.classification import ImageOptions, Learning, fit_classifiers, open_examples, wanted_threshold

    models, cache, examples = opened.models, opened.cache, None
    if options.examples is not None:
        how = ImageOptions(batch_size=options.batch_size, show="examples")
        examples = open_examples(options.examples, labels, models, cache, how)
    learning = Learning(options.method, options.calibrate, options.temperature, options.multi_label)
    fit = fit_classifiers(labels, prompts, models, cache, learning, examples)
    wanted = options.precision_wanted
    return fit, None if wanted is None else wanted_threshold(fit, labels.background, wanted)


def show(classified: "Classified", sorter: "Sorter | None", fmt: str) -> None:
    """Sort the images where that is asked for, print the rows, and say what is known of them.

    On the screen the rows of many images are counted by label instead.
    """
    from clipkit.classification import label_counts, rows_of
    from clipkit.core import emit, note, warn

    rows, count = rows_of(classified), len(classified.images)
    if sorter:  # after the page, as pictures may be moved, and before the rows, whose reader may leave
        rows = sorter.rows(rows, sorter.sort(classified))
    if fmt != "human":
        emit(rows, fmt)
    elif count > READABLE:
        emit(label_counts(classified), fmt)
        note(f"{count:,} images; --format jsonl or csv gives a row for each")
    else:
        columns = ("path", "label", "probability", "margin", "status", *(["to"] if sorter else []))
        emit([{name: row[name] for name in columns} for row in rows], fmt)
        note(", ".join(f"{each['label']} {each['images']}" for each in label_counts(classified)))
    for line in classified.notes():
        note(line)
    if unusable := classified.unusable_examples:
        count, first = len(unusable), unusable[0]
        warn(f"{count:,} of the examples cannot be used; the first: {first['key']}: {first['reason']}")
    tell_unreadable(classified.images)


def tell_unreadable(images: "Images") -> None:
    """Name what cannot be read, the first of many."""
    from clipkit.core import note, warn

    if not images.unreadable:
        return
    first, count = images.unreadable[0], len(images.unreadable)
    warn(f"{count:,} of {len(images) + count:,} cannot be read; the first: {first['key']}: {first['reason']}")
    for line in images.unreadable[1:LISTED]:
        note(f"  {line['key']}: {line['reason']}")
    if count > LISTED:
        note(f"  and {count - LISTED:,} more; the rows of --format jsonl name each")


if __name__ == "__main__":
    main()
