"""Whether a shard as a whole is as it should be: there, a tar to its end, and what its manifest says of it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.artifact import kind_of, read_manifest
from clipkit.errors import ClipkitError
from clipkit.shards import Shards, brace_expand, expand

__all__ = ["named_shards", "shard_problems"]


def named_shards(spec: str) -> list[tuple[Path, dict[str, Any]]]:
    """Every local tar that `spec` names with the manifest's record of it, which is empty where there is none.

    One that the manifest or a pattern names and that is gone is listed too.

    Raises:
        ClipkitError: where there are none.
    """
    folder = Path(spec)
    if folder.is_dir() and kind_of(folder) == "shards":
        tars = [folder / record["name"] for record in read_manifest(folder, "shards")["shards"]]
    else:
        named = [] if folder.is_dir() else [Path(name) for name in brace_expand(spec)]
        tars = named if any(tar.is_file() for tar in named) else expand(spec)
    records: dict[Path, dict[str, Any]] = {}
    for parent in {tar.parent for tar in tars}:
        if kind_of(parent) == "shards":
            records |= {parent / record["name"]: record for record in read_manifest(parent, "shards")["shards"]}
    return [(tar, records.get(tar, {})) for tar in tars]


def shard_problems(tar: Path, record: dict[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """What is wrong with one shard, as kind (see `clipkit.check.scan.KINDS`), key or None, and reason.

    Args:
        tar: the shard.
        record: of it in the manifest: ``bytes``, ``blake2b`` (hex) and ``samples`` are held against it where
            they stand there. The checksum reads the whole file.
    """
    if not tar.is_file():
        yield "shard_missing", None, "it is named, and it is not there"
        return
    size = tar.stat().st_size
    if size != record.get("bytes", size):
        yield "shard_changed", None, f"{size:,} bytes, the manifest says {record['bytes']:,}"
    elif "blake2b" in record:
        with tar.open("rb") as handle:
            found = hashlib.file_digest(handle, "blake2b").hexdigest()
        if found != record["blake2b"]:
            yield "shard_changed", None, f"checksum {found[:12]}, the manifest says {record['blake2b'][:12]}"
    if size == 0:
        yield "shard_empty", None, "the file is empty (0 bytes)"
        return
    try:
        shards = Shards([tar])
    except ClipkitError as error:
        yield "shard_unreadable", None, str(error)
        return
    cut = [problem["reason"] for problem in shards.problems if problem["key"] is None]
    if not len(shards) and not cut:
        yield "shard_empty", None, "it holds no sample"
        return
    for problem in shards.problems:
        if problem["key"] is not None:
            yield "key_twice", problem["key"], problem["reason"]
    for reason in cut:
        yield "shard_truncated", None, reason
    if len(shards) != record.get("samples", len(shards)):
        yield "shard_changed", None, f"{len(shards):,} samples, the manifest says {record['samples']:,}"
