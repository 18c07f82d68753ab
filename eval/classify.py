"""Classify images by names alone.

Each name becomes a vector through the text tower, each image takes the nearest. No training, no examples.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job, cache_options, format_option, glob_options, list_options, sort_options

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
    other sources none that was before and has not changed.

    Of a folder, hidden files and folders are passed over; links are followed to files, not to folders. With --sort-into
    rows have "to", the place in DIR. A journal in DIR is written ahead of every step: whatever ends the sort, the same
    command goes on, and --undo DIR (which needs nothing else) restores what was there before.
    """
    from clipkit.artifact import kind_of, read_manifest
    from clipkit.cache import Cache, cache_folder
    from clipkit.cached import cached_prompts
    from clipkit.classification import classify_images, open_images, rows_of, summary, zero_shot
    from clipkit.classify_report import accuracy, pictures, write_report
    from clipkit.classify_sort import Sorter, undo_sort
    from clipkit.decisions import Rule
    from clipkit.errors import ClipkitError
    from clipkit.labels import parse_labels, truth_of
    from clipkit.lazy_model import LazyModel
    from clipkit.log import emit, note, warn
    from clipkit.model_specs import spec_of
    from clipkit.sources import Globs, open_source

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
    rule = Rule(threshold, asked["min_margin"], known.background, several, list(known.groups.values()))
    sorter = Sorter(into, asked["how"] or "copy", yes=asked["yes"], several=several) if into else None
    kind = kind_of(Path(source))
    if not models and kind in ("embeddings", "index"):
        models = (spec_of(read_manifest(Path(source), kind), Path(source)),)
    if not models:
        raise ClipkitError("name the model to classify with: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    lazy = [LazyModel(spec, cache, device=asked["device"], precision=asked["precision"]) for spec in models]
    columns = {name: asked[name] for name in ("image_column", "caption_column", "image_root")}
    opened: Any = source
    if kind not in ("embeddings", "index"):
        opened = (sorter.open if sorter else open_source)(source, **columns, globs=globs)
        if opened is None:
            note(f"all that {source} had is sorted into {into}; nothing was left to do")
            return 0
    elif sorter:
        sorter.refuse_without_files(source, asked["image_root"])
    classifiers = [zero_shot(known, templates, model, cache, several=several) for model in lazy]
    how = {"where": asked["where"], "globs": globs, "batch_size": asked["batch_size"], "show": "classify"}
    images = open_images(opened, lazy, cache, **how)
    if not len(images) and not (sorter and sorter.before):
        first = {"key": source, "reason": "no image passes", **(images.unreadable[0] if images.unreadable else {})}
        raise ClipkitError(f"nothing in {source} can be used; the first: {first['key']}: {first['reason']}")
    decisions = classify_images(images, classifiers, rule, top=asked["top"])
    truth = truth_of(images.paths, known)
    if asked["report"] is not None:
        picture = pictures(images, opened, Path(asked["image_root"] or ""))
        about = f"{source}, by {', '.join(models)}"
        write_report(asked["report"], images, known, decisions, about=about, truth=truth, picture=picture)
        note(f"{asked['report']}: contact sheets, least certain first")
    rows = rows_of(images, known, decisions)
    if sorter:  # after the page, as pictures may be moved, and before the rows, whose reader may leave
        rows = sorter.rows(rows, sorter.sort(images, opened, asked["image_root"], known, decisions))
    if fmt != "human":
        emit(rows, fmt)
    elif len(images) > READABLE:
        emit(summary(known, decisions), fmt)
        note(f"{len(images):,} images; --format jsonl or csv gives a row for each")
    else:
        shown = ("path", "label", "probability", "margin", "status", *(["to"] if sorter else []))
        emit([{key: row[key] for key in shown} for row in rows], fmt)
        note(", ".join(f"{each['label']} {each['images']}" for each in summary(known, decisions)))
    if truth is not None:
        (share, low, high), count = accuracy(truth, decisions)
        note(f"{share:.1%} of {count:,} are in the folder of their label (95 % interval {low:.1%} to {high:.1%})")
    if images.unreadable:
        first, count = images.unreadable[0], len(images.unreadable)
        warn(f"{count:,} of {len(images) + count:,} cannot be read; the first: {first['key']}: {first['reason']}")
        for line in images.unreadable[1:LISTED]:
            note(f"  {line['key']}: {line['reason']}")
        if count > LISTED:
            note(f"  and {count - LISTED:,} more; the rows of --format jsonl name each")
    return int(bool(images.unreadable or (sorter and sorter.failed)))


if __name__ == "__main__":
    main()
