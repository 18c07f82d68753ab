"""Pack images and their captions into webdataset shards.

Reads a list (csv, tsv, jsonl, parquet, COCO's json), a folder of images with same-stem .txt or .json, or other shards,
from the disk or from a URL. Each image keeps its own bytes and extension (but see --max-side); several captions of one
image stay together in one sample.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job
from clipkit.options import list_options, out_options


@click.command(cls=Job)
@click.argument("source")
@list_options
@click.option("--shard-samples", type=click.IntRange(1), help="Most samples per shard [default: 10000].")
@click.option("--shard-mib", type=click.IntRange(1), help="Most MiB of the source's images per shard [default: 512].")
@click.option("--shards", type=click.IntRange(1), help="How many shards to make, of equal numbers of samples, instead.")
@click.option(
    "--max-side", type=click.IntRange(1), help="Make larger images smaller: the long side to this many pixels."
)
@click.option(
    "--quality",
    default=95,
    show_default=True,
    type=click.IntRange(1, 100),
    help="Of JPEG and lossy WebP that --max-side writes.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes at work [default: one per core].")
@out_options("the shards")
def main(
    source: str,
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None,
    shard_samples: int | None,
    shard_mib: int | None,
    shards: int | None,
    workers: int | None,
    out: Path,
    **options: Any,
) -> int:
    """Pack SOURCE into webdataset shards: images with their captions, any webdataset reader can read them.

    An image that is missing or no image goes to OUT/ledger.jsonl and the status is 1. Killed and run again, it goes on
    with the shards that are not finished; several processes may share the work of one OUT.
    """
    from clipkit.core import ClipkitError, cores
    from clipkit.data import PackOptions, pack
    from clipkit.data.sources import open_source

    if shards and (shard_samples or shard_mib):
        raise ClipkitError("--shards says how many, --shard-samples and --shard-mib say how large; choose one way")
    opened = open_source(
        source,
        image_column=image_column,
        caption_column=caption_column,
        image_root=image_root,
        captions_required=True,
    )
    sizes = {"shard_samples": shard_samples or 10_000, "shard_bytes": (shard_mib or 512) << 20, "shards": shards}
    manifest = pack(opened, out, PackOptions(**sizes, workers=workers or cores(), **options))
    return report(manifest, out)


def report(manifest: dict[str, Any], out: Path) -> int:
    """Say what was packed; gives the exit status."""
    from clipkit.core import note, warn

    counts = manifest["counts"]
    note(
        f"{out}: {counts['samples']:,} samples with {counts['captions']:,} captions in {counts['shards']:,} shards, "
        f"{counts['bytes'] / 1e6:,.1f} MB"
    )
    if counts["repeated_captions"]:
        note(f"{counts['repeated_captions']:,} captions repeat one of their image's, listed in {out / 'ledger.jsonl'}")
    if counts["left_out"]:
        first = manifest["first_left_out"]
        reason = f"{first['key']}: {first['reason']}"
        warn(f"{counts['left_out']:,} left out, listed in {out / 'ledger.jsonl'}; the first: {reason}")
        return 1
    note(f"next: clipkit train tiny --set data.train={out} --out run/")
    return 0


if __name__ == "__main__":
    main()
