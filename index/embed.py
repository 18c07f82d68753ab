"""Embed images and their captions with a model.

Reads a folder of images, a list or shards; writes clip-retrieval's exchange layout (npy and parquet), part by part.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit.cli import Job
from clipkit.options import glob_options, list_options, model_option, out_options

if TYPE_CHECKING:
    from clipkit.embedding import EmbedOptions, Outcome


@click.command(cls=Job)
@click.argument("source")
@model_option
@list_options
@glob_options
@click.option(
    "--sides",
    default="both",
    show_default=True,
    type=click.Choice(["both", "image", "text"]),
    help="What to embed.",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the towers; auto: bf16 where the device is fast at it.",
)
@click.option("--batch-size", type=click.IntRange(1), help="Images at a time [default: found once, kept in the plan].")
@click.option(
    "--decode",
    "decoding",
    default="fast",
    show_default=True,
    type=click.Choice(["fast", "exact", "gpu"]),
    help="fast: large JPEGs to little more than is needed; exact: open_clip's pixels; gpu: JPEGs on the GPU.",
)
@click.option(
    "--compile/--no-compile",
    default=None,
    help="The image tower, by torch.compile [default: from 10,000 images on, where that is found to be faster].",
)
@click.option("--part-size", default=10_000, show_default=True, type=click.IntRange(1), help="Samples per part.")
@click.option("--threads", type=click.IntRange(1), help="That decode images [default: one per core].")
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode in place of threads [default: on more than 4 cores all but 2, else none].",
)
@click.option(
    "--device", help="Such as cpu, cuda, cuda:1 [default: a GPU where there is one; each process of a launch its own]."
)
@click.option("--update", is_flag=True, help="Bring OUT up to date: embed what is new or changed, drop what is gone.")
@out_options("the embeddings")
def main(
    source: str,
    model: str | None,
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    sides: str,
    device: str | None,
    out: Path,
    **options: Any,
) -> int:
    """Embed the images, and the captions where there are any, of SOURCE (a folder, a list, or shards).

    An image that cannot be used goes to OUT/ledger.jsonl and the status is 1. Killed and run again, it goes on with
    the part where it stood; several processes may share the work of one OUT. With --update, images that have not
    changed since OUT was made (by name, size and time, or their shard's checksum) are not read again, and what could
    not be read is tried again; OUT stays as it is until the new one, which is made beside it, takes its place.
    """
    from clipkit.core import SIDES, ClipkitError, pick_device
    from clipkit.data.sources import Globs, open_source
    from clipkit.embedding import EmbedOptions, embed
    from clipkit.models import load_model, model_reference

    chosen = EmbedOptions(sides=[side for side in SIDES if sides in (side, "both")], **options)
    refuse_contradictions(chosen)
    if model is None:
        raise ClipkitError("name the model to embed with: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    opened = open_source(
        source,
        image_column=image_column,
        caption_column=caption_column,
        image_root=image_root,
        globs=Globs(include, exclude),
    )
    towers = load_model(model, pick_device(device))
    outcome = embed(opened, towers, out, chosen, model_reference=model_reference(towers, model, out))
    report(outcome, out, chosen)
    return int(outcome.manifest["counts"]["left_out"] > 0)


def refuse_contradictions(options: "EmbedOptions") -> None:
    """Options that do not go together."""
    from clipkit.core import ClipkitError

    if options.workers and (options.threads or options.decoding == "gpu"):
        raise ClipkitError("--workers are processes that decode on the CPU; leave out --threads and --decode gpu")
    if options.update and options.overwrite:
        raise ClipkitError("--update keeps what has not changed, --overwrite makes all of it anew; say one of them")


def report(outcome: "Outcome", out: Path, options: "EmbedOptions") -> None:
    """Say what was made, and by whom."""
    from clipkit.core import note, warn

    manifest, counts = outcome.manifest, outcome.manifest["counts"]
    if outcome.made_by == "this":
        # Whatever its rank: of several that share the work, the one that came last has the figures.
        as_before = f" ({outcome.taken:,} as they were)" if options.update else ""
        note(
            f"{out}: {counts['images']:,} images{as_before} and {counts['captions']:,} captions in {counts['parts']} "
            f"parts, dimension {manifest['dim']}, model {manifest['model']['fingerprint'][:12]}",
            everywhere=True,
        )
        note(f"next: clipkit build {out} --out index/", everywhere=True)
    elif outcome.made_by == "another":
        note(f"{out}: another process finished it", everywhere=True)
    else:
        note(f"{out}: finished before, of the same input; nothing was done", everywhere=True)
    if counts["left_out"] and outcome.made_by != "another":
        warn(f"{counts['left_out']:,} could not be used, listed in {out / 'ledger.jsonl'}", everywhere=True)


if __name__ == "__main__":
    main()
