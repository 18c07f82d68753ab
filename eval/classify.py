"""Classify images by names alone, or with a few examples of each.

Each name becomes a vector through the text tower, each image takes the nearest; examples move the vectors.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job
from clipkit.options import cache_options, format_option, glob_options, list_options, sort_options

LISTED = 20  # unreadable files on the screen
READABLE = 200  # rows of a table on the screen; of more, what each label got


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
@click.option("--background", help='Names for "none of these", with commas between them.')
@click.option("--multi-label", is_flag=True, help="An image may be of several labels: all that reach the threshold.")
@click.option(
    "--threshold", type=float, help="The least probability that is sure [default: 0; with --multi-label 0.5]."
)
@click.option("--min-margin", default=0.0, show_default=True, help="The least distance to the second's probability.")
@click.option(
    "--examples",
    metavar="SOURCE",
    help="Labelled images to learn from: a folder with a sub-folder for each label, called as it or an alias; or a "
    "list, embeddings or an index of images in such folders.",
)
@click.option(
    "--method",
    type=click.Choice(["linear", "tip-adapter", "prototypes", "zero-shot"]),
    help="How to learn from them; zero-shot: not at all, they only serve the options below [default: linear].",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Make probabilities as right as they are sure, as the examples show; without any, as they last showed of the "
    "names alone.",
)
@click.option(
    "--temperature", type=float, help="To divide the logits by, in place of a fitted one; 1: the model's own."
)
@click.option(
    "--precision-wanted",
    type=float,
    metavar="SHARE",
    help="Set the threshold so that of the sure so many are right, as the examples show.",
)
@click.option(
    "--ablate-prompts",
    is_flag=True,
    help="Classify nothing, but tell of each prompt how well images in folders called as labels are classified by it "
    "alone, and by all others.",
)
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
def main(source: str | None, labels: str | None, models: tuple[str, ...], fmt: str, **asked: Any) -> int:
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
    from clipkit.classification import (
        ImageOptions,
        Rule,
        ablate_prompts,
        accuracy,
        cached_prompts,
        classify_images,
        fit_classifiers,
        open_examples,
        open_images,
        parse_labels,
        pictures,
        rows_of,
        summary,
        truth_of,
        wanted_threshold,
        write_report,
    )
    from clipkit.classification.sort import Sorter, undo_sort
    from clipkit.core import ClipkitError, cache_folder, emit, note, warn
    from clipkit.data.sources import Globs
    from clipkit.storage import Cache

    if asked["undo"] is not None:
        if source or labels or asked["sort_into"]:
            raise ClipkitError("--undo DIR takes back what was sorted into DIR; it goes with no SOURCE and no --labels")
        left = undo_sort(asked["undo"])
        if left:
            emit(left, fmt)
        return int(bool(left))
    if source is None or labels is None:
        raise ClipkitError(f"name {'the images' if source is None else 'the labels: --labels NAMES'} to classify")
    into, globs = asked["sort_into"], Globs(asked["include"], asked["exclude"])
    if into and asked["ablate_prompts"]:
        raise ClipkitError("--ablate-prompts classifies nothing, so there is nothing to sort; leave out --sort-into")
    if not into and (asked["how"] or asked["yes"]):
        raise ClipkitError("--how and --yes are of --sort-into DIR; name the folder")
    cache = Cache(None if asked["no_cache"] else asked["cache"] or cache_folder(), asked["cache_size"])
    known = parse_labels(labels)
    if asked["background"] is not None:
        known = known.with_background([name.strip() for name in asked["background"].split(",") if name.strip()])
    prompts = asked["prompts"] or known.prompts or "default"
    templates = cached_prompts(prompts, cache) if isinstance(prompts, str) else prompts
    several = asked["multi_label"]
    threshold = asked["threshold"] if asked["threshold"] is not None else 0.5 * several
    if asked["threshold"] is not None and asked["precision_wanted"] is not None:
        raise ClipkitError("--precision-wanted sets the threshold; leave out --threshold")
    rule = Rule(threshold, asked["min_margin"], known.background, several, list(known.groups.values()))
    sorter = Sorter(into, asked["how"] or "copy", yes=asked["yes"], several=several) if into else None
    columns = {name: asked[name] for name in ("image_column", "caption_column", "image_root")}
    towers = {name: asked[name] for name in ("batch_size", "device", "precision")}
    options = ImageOptions(asked["where"], globs, **columns, **towers, show="classify")
    opened = (sorter.open if sorter else open_images)(source, models, cache, options)
    if opened is None:
        note(f"all that {source} had is sorted into {into}; nothing was left to do")
        return 0
    lazy = opened.models
    examples = None
    if asked["examples"] is not None:
        own = ImageOptions(batch_size=asked["batch_size"], show="examples")
        examples = open_examples(asked["examples"], known, lazy, cache, own)
    learning = {name: asked[name] for name in ("method", "calibrate", "temperature")}
    fit = fit_classifiers(known, templates, lazy, cache, examples=examples, several=several, **learning)
    wanted = None
    if asked["precision_wanted"] is not None:
        wanted = wanted_threshold(fit, known.background, asked["precision_wanted"])
        rule = replace(rule, threshold=wanted.probability)
    images = opened.embed()
    if not len(images) and not (sorter and sorter.before):
        first = {"key": source, "reason": "no image passes", **(images.unreadable[0] if images.unreadable else {})}
        raise ClipkitError(f"nothing in {source} can be used; the first: {first['key']}: {first['reason']}")
    if asked["ablate_prompts"]:
        emit(ablate_prompts(images, known, templates, lazy, cache), fmt)
        tell_unreadable(len(images), images.unreadable)
        return int(bool(images.unreadable))
    decisions = classify_images(images, fit.classifiers, rule, top=asked["top"])
    truth = truth_of(images.paths, known)
    marks = None
    if examples is not None:
        marks = examples.among(images)
        truth = None if truth is None else examples.unseen(truth, marks)
        truth = None if truth is None or (truth < 0).all() else truth
    if asked["report"] is not None:
        more = {"picture": pictures(images), "fit": fit, "threshold": wanted}
        about = f"{source}, by {', '.join(model.spec for model in lazy)}"
        write_report(asked["report"], images, known, decisions, about=about, truth=truth, **more)
        note(f"{asked['report']}: contact sheets, least certain first")
    rows = rows_of(images, known, decisions, marks)
    if sorter:  # after the page, as pictures may be moved, and before the rows, whose reader may leave
        rows = sorter.rows(rows, sorter.sort(images, known, decisions))
    if fmt != "human":
        emit(rows, fmt)
    elif len(images) > READABLE:
        emit(summary(known, decisions), fmt)
        note(f"{len(images):,} images; --format jsonl or csv gives a row for each")
    else:
        shown = ("path", "label", "probability", "margin", "status", *(["to"] if sorter else []))
        emit([{key: row[key] for key in shown} for row in rows], fmt)
        note(", ".join(f"{each['label']} {each['images']}" for each in summary(known, decisions)))
    for line in (*fit.notes(), *([wanted.note()] if wanted else [])):
        note(line)
    if marks is not None and marks.any():
        note(f"{int(marks.sum()):,} of the images are among the examples and do not count for the accuracy")
    if truth is not None:
        (share, low, high), count = accuracy(truth, decisions)
        note(f"{share:.1%} of {count:,} are in the folder of their label (95 % interval {low:.1%} to {high:.1%})")
    if examples is not None and examples.left_out:
        first, count = examples.left_out[0], len(examples.left_out)
        warn(f"{count:,} of the examples cannot be used; the first: {first['key']}: {first['reason']}")
    tell_unreadable(len(images), images.unreadable)
    return int(bool(images.unreadable or (sorter and sorter.failed) or (examples is not None and examples.left_out)))


def tell_unreadable(read: int, unreadable: Sequence[dict[str, Any]]) -> None:
    """Name what cannot be read, the first of many."""
    from clipkit.core import note, warn

    if not unreadable:
        return
    first, count = unreadable[0], len(unreadable)
    warn(f"{count:,} of {read + count:,} cannot be read; the first: {first['key']}: {first['reason']}")
    for line in unreadable[1:LISTED]:
        note(f"  {line['key']}: {line['reason']}")
    if count > LISTED:
        note(f"  and {count - LISTED:,} more; the rows of --format jsonl name each")


if __name__ == "__main__":
    main()
