"""From any source to webdataset shards, shard by shard; see `clipkit.artifact` for what a kill leaves."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.artifact import Stage, read_manifest, write_ledger
from clipkit.decode import IMAGE_SUFFIXES, identify
from clipkit.errors import BadSample, ClipkitError
from clipkit.log import progress
from clipkit.shards import write_shard
from clipkit.sources import Sample, Source, check_ids, sample_id

__all__ = ["pack", "shard_keys"]


def pack(
    source: Source,
    out: Path,
    *,
    shard_samples: int = 10_000,
    shard_bytes: int = 512 << 20,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the samples of a source into shards, in source order.

    Which sample goes into which shard is settled before anything is written, from the files' sizes alone; what turns
    out unusable leaves a gap. So shards can be made in any order, by several processes, and the bytes are the same.

    Args:
        source: with captions.
        out: the shards' folder.
        shard_samples: most samples in a shard.
        shard_bytes: most bytes of images in a shard.
        overwrite: replace another artifact there.

    Returns:
        The manifest.

    Raises:
        ClipkitError: where nothing can be used, or the folder holds something else.
    """
    made_from = {"source": source.identity(), "shard_samples": shard_samples, "shard_bytes": shard_bytes}
    stage = Stage(out, "shards", made_from, inputs=[source.spec], overwrite=overwrite)
    if stage.done:
        return read_manifest(out, "shards")
    keys = shard_keys([source.key(row) for row in range(len(source))])
    check_ids(keys, [sample_id(key) for key in keys])
    cuts = _cuts(source, shard_samples, shard_bytes)
    digits = max(6, len(str(len(cuts))))
    names = [f"{number:0{digits}d}" for number in range(len(cuts))]
    for name in stage.pending(names):
        rows = cuts[names.index(name)]
        record: dict[str, Any] = {"captions": 0, "bytes": 0, "left_out": []}
        title = f"pack {int(name) + 1}/{len(names)}"
        samples = _members(source, progress(rows, title, len(rows), "samples"), keys, record)
        record["samples"] = write_shard(out / f"{name}.tar", samples)
        stage.finish_part(name, record)
    records = stage.records(names)
    if records is None:
        return read_manifest(out, "shards")
    left_out = [line for record in records for line in record["left_out"]]
    total = {key: sum(record[key] for record in records) for key in ("samples", "captions", "bytes")}
    if not total["samples"]:
        first = left_out[0]
        raise ClipkitError(f"nothing in {source.spec} can be used; the first: {first['key']}: {first['reason']}")
    write_ledger(out, left_out)
    return stage.commit(
        source=source.spec,
        counts={**total, "shards": len(names), "left_out": len(left_out)},
        shards=[{"name": f"{n}.tar", "samples": r["samples"]} for n, r in zip(names, records, strict=True)],
        first_left_out=left_out[0] if left_out else None,
    )


def _cuts(source: Source, most_samples: int, most_bytes: int) -> list[range]:
    cuts, start, size = [], 0, 0
    for row in range(len(source)):
        weight = source.size(row)
        if row > start and (row - start == most_samples or size + weight > most_bytes):
            cuts.append(range(start, row))
            start, size = row, 0
        size += weight
    return [*cuts, range(start, len(source))]


def _members(
    source: Source, rows: Iterator[int], keys: list[str], record: dict[str, Any]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for row in rows:
        try:
            sample = source[row]
            members = _one(sample)
        except BadSample as error:
            record["left_out"].append({"row": row, "key": source.key(row), "reason": str(error)})
            continue
        record["captions"] += len(sample.captions)
        record["bytes"] += len(next(iter(members.values())))
        yield keys[row], members


def _one(sample: Sample) -> dict[str, bytes]:
    data = sample.read()
    kind, _, _ = identify(data)
    if not sample.captions:
        raise BadSample("the sample has no caption")
    about = {"captions": list(sample.captions), **sample.columns}
    # The file's own ending where it is an image's, else what its bytes say.
    known = f".{sample.extension}" in IMAGE_SUFFIXES
    return {
        sample.extension if known else {"jpeg": "jpg", "mpo": "jpg"}.get(kind.lower(), kind.lower()): data,
        "txt": sample.captions[0].encode("utf-8", "replace"),
        "json": json.dumps(about, ensure_ascii=False, default=str).encode("utf-8", "replace"),
    }


def shard_keys(names: list[str]) -> list[str]:
    """Keys for webdataset from source-relative paths: no extension, no dot in the last part, none twice.

    A key is the path itself wherever that is possible. Where paths would share one, each carries a hash of its own.
    """
    plain = [_plain_key(name) for name in names]
    count = Counter(plain)
    return [key if count[key] == 1 else f"{key}~{sample_id(name):016x}" for key, name in zip(plain, names, strict=True)]


def _plain_key(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    suffix = path.suffix if len(path.suffix) <= 6 else ""
    stem = path.name.removesuffix(suffix) if suffix else path.name
    parts = [part for part in path.parent.parts if part not in ("/", ".", "..")]
    return "/".join([*parts, re.sub(r"[.\s]", "_", stem) or "_"]).encode("utf-8", "replace").decode()
