"""Pack images and their captions into webdataset shards.

Reads a list (csv, tsv, jsonl, parquet), a folder of images with same-stem .txt or .json, or other shards. Each image
keeps its own bytes and extension; several captions of one image stay together in one sample.
"""

from pathlib import Path

import click

from clipkit.cli import Job, list_options, out_options


@click.command(cls=Job)
@click.argument("source")
@list_options
@click.option(
    "--shard-samples",
    default=10_000,
    show_default=True,
    type=click.IntRange(1),
    help="Most samples per shard.",
)
@click.option(
    "--shard-mib",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Most MiB of images per shard.",
)
@out_options("the shards")
def main(
    source: str,
    image_column: str | None,
    caption_column: str | None,
    image_root: Path | None,
    shard_samples: int,
    shard_mib: int,
    out: Path,
    overwrite: bool,
) -> int:
    """Pack SOURCE into webdataset shards: images with their captions, any webdataset reader can read them.

    An image that is missing or no image goes to OUT/ledger.jsonl and the status is 1. Killed and run again, it goes on
    with the shards that are not finished.
    """
    from clipkit.log import note, warn
    from clipkit.pack import pack
    from clipkit.sources import open_source

    opened = open_source(
        source,
        image_column=image_column,
        caption_column=caption_column,
        image_root=image_root,
        captions_required=True,
    )
    manifest = pack(opened, out, shard_samples=shard_samples, shard_bytes=shard_mib << 20, overwrite=overwrite)
    counts = manifest["counts"]
    note(
        f"{out}: {counts['samples']:,} samples with {counts['captions']:,} captions in {counts['shards']:,} shards, "
        f"{counts['bytes'] / 1e6:,.1f} MB"
    )
    if counts["left_out"]:
        first = manifest["first_left_out"]
        reason = f"{first['key']}: {first['reason']}"
        warn(f"{counts['left_out']:,} left out, listed in {out / 'ledger.jsonl'}; the first: {reason}")
        return 1
    note(f"next: clipkit train tiny --set data.train={out} --out run/")
    return 0


if __name__ == "__main__":
    main()
