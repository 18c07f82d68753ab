"""Classify images by names alone.

Each name becomes a vector through the text tower, each image takes the nearest. No training, no examples.
"""

from pathlib import Path

import click

from clipkit.cli import Job, format_option, list_options, model_option


@click.command(cls=Job)
@click.argument("source")
@click.option(
    "--labels",
    required=True,
    help='Names with commas between, "cat,dog,horse", or a text file with one a line.',
)
@click.option(
    "--prompts",
    default="default",
    show_default=True,
    help="default, plain, photo, openai80, or templates of your own: 'a drawing of a {}.|a {}.'",
)
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="How many classes to list per image.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--device", help="For the model [default: the GPU where there is one].")
@model_option
@list_options
@format_option
def main(
    source: str,
    labels: str,
    prompts: str,
    top: int,
    batch_size: int,
    device: str | None,
    model: str | None,
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None,
    fmt: str,
) -> int:
    """Say for every image of SOURCE (a folder, a list, shards, or embeddings) which of the labels fits best.

    Rows: path, label, score (cosine), probability, margin (to the second), top, status, reason. An unreadable image
    has a row too, with status "unreadable", and the exit status is 1.
    """
    from clipkit.artifact import kind_of
    from clipkit.embeddings import Embeddings
    from clipkit.errors import ClipkitError
    from clipkit.log import emit, note, warn
    from clipkit.sources import open_source
    from clipkit.towers import load_model, pick_device
    from clipkit.zeroshot import classify, prompt_set

    names = _labels(labels)
    templates = prompt_set(prompts)
    if model is None:
        raise ClipkitError("name the model to classify with: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    towers = load_model(model, pick_device(device))
    if kind_of(Path(source)) == "embeddings":
        opened = Embeddings.open(source)
    else:
        opened = open_source(source, image_column=image_column, caption_column=caption_column, image_root=image_root)
    rows = classify(opened, names, towers, prompts=templates, top=top, batch_size=batch_size, show="classify")
    unreadable = [row for row in rows if row["status"] != "ok"]
    if len(unreadable) == len(rows):
        raise ClipkitError(
            f"nothing in {source} can be used; the first: {unreadable[0]['path']}: {unreadable[0]['reason']}"
        )
    if fmt == "human":
        shown = ("path", "label", "probability", "margin", "status")
        emit([{key: row[key] for key in shown} for row in rows], fmt)
        counts = {name: sum(row["label"] == name for row in rows) for name in names}
        note(", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])))
    else:
        emit(rows, fmt)
    if unreadable:
        first = unreadable[0]
        warn(f"{len(unreadable)} of {len(rows)} cannot be read; the first: {first['path']}: {first['reason']}")
        return 1
    return 0


def _labels(given: str) -> list[str]:
    """Names from a comma-separated string, or from a file, one a line."""
    from clipkit.errors import ClipkitError

    path = Path(given)
    try:
        is_file = path.is_file()
    except OSError:  # a long list of names is no file name
        is_file = False
    if is_file:
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ClipkitError(f"{given} is not UTF-8 text: {error}") from error
    if "," not in given and (path.suffix in (".txt", ".csv", ".yaml") or "/" in given):
        raise ClipkitError(f"no such file of labels: {given}")
    return [name.strip() for name in given.split(",") if name.strip()]


if __name__ == "__main__":
    main()
