"""Whether a shard as a whole is as it should be: there, a tar to its end, and what its manifest says of it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.data.shards import Shards, expand, manifest_records, named_tars
from clipkit.storage import kind_of

__all__ = ["Problem", "index_problems", "named_shards", "open_shard"]

Problem = tuple[str, str | None, str]  # kind (see `clipkit.data.check.FINDING_KINDS`), key or None, reason


def named_shards(spec: str) -> list[tuple[Path, dict[str, Any]]]:
    """Every local tar that `spec` names with the manifest's record of it, which is empty where there is none.

    One that the manifest or a pattern names and that is gone is listed too.

    Raises:
        ClipkitError: where there are none.
    """
    tars = named_tars(spec)
    if kind_of(Path(spec)) != "shards" and not any(tar.is_file() for tar in tars):
        expand(spec)  # says what is wrong
    records = manifest_records(tars)
    return [(tar, records.get(tar, {})) for tar in tars]


def open_shard(tar: Path, record: dict[str, Any]) -> tuple[Shards | None, list[Problem]]:
    """Open one shard and say what is wrong with it as a whole.

    Args:
        tar: the shard.
        record: of it in the manifest: ``bytes``, ``blake2b`` (hex) and ``samples`` are held against it where
            they stand there. The checksum reads the whole file.

    Returns:
        The shard, None where it cannot be read at all, and the problems.
    """
    if not tar.is_file():
        return None, [("shard_missing", None, "it is named, and it is not there")]
    problems: list[Problem] = []
    size = tar.stat().st_size
    if size != record.get("bytes", size):
        problems.append(("shard_changed", None, f"{size:,} bytes, the manifest says {record['bytes']:,}"))
    elif "blake2b" in record:
        with tar.open("rb") as handle:
            digest = hashlib.file_digest(handle, "blake2b").hexdigest()
        if digest != record["blake2b"]:
            reason = f"checksum {digest[:12]}, the manifest says {record['blake2b'][:12]}"
            problems.append(("shard_changed", None, reason))
    if size == 0:
        return None, [*problems, ("shard_empty", None, "the file is empty (0 bytes)")]
    try:
        shards = Shards([tar])
    except ClipkitError as error:
        return None, [*problems, ("shard_unreadable", None, str(error))]
    inside = [problem for _, problem in index_problems(shards)]
    problems += inside
    known_empty = any(kind == "shard_empty" for kind, _, _ in inside)
    if len(shards) != record.get("samples", len(shards)) and not known_empty:
        problems.append(("shard_changed", None, f"{len(shards):,} samples, the manifest says {record['samples']:,}"))
    return shards, problems


def index_problems(shards: Shards) -> Iterator[tuple[str, Problem]]:
    """What the indexes of shards know to be wrong: the shard's name and the problem."""
    cut = {problem["shard"] for problem in shards.problems if problem["key"] is None}
    for name, count in zip(shards.names, np.diff(shards.ends, prepend=0).tolist(), strict=True):
        if not count and name not in cut:
            yield name, ("shard_empty", None, "it holds no sample")
    for problem in shards.problems:
        kind = "shard_truncated" if problem["key"] is None else "key_twice"
        yield problem["shard"], (kind, problem["key"], problem["reason"])
