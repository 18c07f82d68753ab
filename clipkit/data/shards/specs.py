"""Which shards a string names, and what they are called: folders, tars, brace patterns, URLs."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError
from clipkit.images import IMAGE_SUFFIXES
from clipkit.storage import WORK, kind_of, list_files, read_manifest

__all__ = ["brace_expand", "expand", "is_shard_spec", "manifest_records", "named_tars", "remote_tars", "shard_names"]


def is_shard_spec(spec: str) -> bool:
    """Whether `spec` names shards: a tar, a brace pattern of tars, or a folder of tars.

    A folder of pictures stays one when somebody put an archive among them.
    """
    if spec.endswith(".tar"):
        return True
    folder = Path(spec)
    if not folder.is_dir():
        return False
    if kind_of(folder) == "shards" or (folder / WORK).is_dir():
        return True
    names = [path.suffix.lower() for path in folder.iterdir()]
    return ".tar" in names and not IMAGE_SUFFIXES & set(names)


def named_tars(spec: str) -> list[Path]:
    """The tar files that `spec` names, in name order; those of a pattern or a manifest need not be there.

    Raises:
        ClipkitError: where it is a folder that `clipkit pack` has not finished, or an artifact of another kind.
    """
    folder = Path(spec)
    if not folder.is_dir():
        return [Path(name) for name in brace_expand(spec)]
    if (folder / WORK).is_dir() or kind_of(folder):
        return [folder / shard["name"] for shard in read_manifest(folder, "shards")["shards"]]
    return sorted(folder.glob("*.tar"))


def expand(spec: str) -> list[Path]:
    """The tar files that `spec` names (`named_tars`), all of which are there.

    Raises:
        ClipkitError: where one does not exist, a folder holds none, or it is one that `clipkit pack` has not finished.
    """
    tars = named_tars(spec)
    for path in tars:
        if not path.is_file():
            raise ClipkitError(f"no such shard: {path}")
    if not tars:
        raise ClipkitError(f"no shards (*.tar) in {spec}")
    return tars


def manifest_records(tars: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """What our manifests beside these tars say of shards: ``name, samples, bytes, blake2b``."""
    return {
        folder / record["name"]: record
        for folder in {tar.parent for tar in tars}
        if kind_of(folder) == "shards"
        for record in read_manifest(folder, "shards")["shards"]
    }


def brace_expand(spec: str) -> list[str]:
    """The names that a brace pattern such as ``{000..012}.tar`` stands for."""
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(spec))
    except UnbalancedBracesError as error:
        raise ClipkitError(f"{spec}: its braces do not match: {error}") from error


def shard_names(tars: Sequence[Path]) -> list[str]:
    """What each of several shards is called: its file's name, with the folders that differ where two have one name."""
    names = [tar.name for tar in tars]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([tar.parent for tar in tars])
    return [Path(os.path.relpath(tar, root)).as_posix() for tar in tars]


def remote_tars(spec: str) -> list[str]:
    """URLs of the tars that a URL names: one, a brace pattern, or a folder of them.

    Raises:
        ClipkitError: where there are none.
    """
    named = spec.partition("?")[0].endswith(".tar")
    urls = brace_expand(spec) if named else list_files(spec, ".tar")
    if not urls:
        raise ClipkitError(f"no shards (*.tar) in {spec}")
    return urls
