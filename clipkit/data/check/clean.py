"""A clean copy of a set: its samples packed anew, without those that a check leaves out."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import ClipkitError, cores
from clipkit.data.check.findings import Verdict
from clipkit.data.check.scanning import Scan
from clipkit.data.packing import PackOptions, pack
from clipkit.data.sources import Sample, Stamp
from clipkit.storage import digest, hash_of, write_ledger

__all__ = ["CleanSource", "pack_clean"]


class CleanSource:
    """The samples of a scan without some rows: a `clipkit.data.sources.Source`.

    Args:
        scanned: what was checked; shards that cannot be read are no part of it.
        left_out: rows of it.
    """

    has_captions = True

    def __init__(self, scanned: Scan, left_out: Collection[int]):
        self.spec = scanned.spec
        self.problems: list[dict[str, Any]] = []  # findings of the check, which writes them down itself
        self.remote = any(part.source.remote for part in scanned.parts)
        self._scan = scanned
        self._rows = np.setdiff1d(np.arange(len(scanned)), np.fromiter(left_out, np.int64))
        # A key that several shards use goes with the shard's name, as `clipkit.data.shards.Shards` tells them apart.
        places = [scanned.place(int(row)) for row in self._rows]
        several = len({key for _, key in places}) < len(places)
        self._keys = [f"{shard.removesuffix('.tar')}/{key}" if several and shard else key for shard, key in places]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        return replace(self._scan.sample(int(self._rows[i])), key=self._keys[i])

    def without_image(self, i: int) -> Sample:
        part, row = self._scan.locate(int(self._rows[i]))
        return replace(part.source.without_image(row), key=self._keys[i])

    def stamp(self, i: int) -> Stamp:
        part, row = self._scan.locate(int(self._rows[i]))
        image, words = part.source.stamp(row)
        return Stamp(image, words and hash_of(self._keys[i], words))

    def key(self, i: int) -> str:
        return self._keys[i]

    def name(self, i: int) -> str:
        part, row = self._scan.locate(int(self._rows[i]))
        return part.source.name(row)

    def place(self, i: int) -> Path | str | None:
        part, row = self._scan.locate(int(self._rows[i]))
        return part.source.place(row)

    def size(self, i: int) -> int:
        part, row = self._scan.locate(int(self._rows[i]))
        return part.source.size(row)

    def identity(self) -> str:
        return digest([[part.source.identity() for part in self._scan.parts], digest(self._rows.tolist())])


def pack_clean(scanned: Scan, verdict: Verdict, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Pack what is good into shards of its own; ``ledger.jsonl`` there says what was left out and why.

    Killed and run again, it goes on; the check before it gives the same rows again.

    Args:
        scanned: what was checked.
        verdict: what was found in it.
        out: the new shards' folder.
        overwrite: replace another artifact there.

    Returns:
        The manifest of the new shards.

    Raises:
        ClipkitError: where nothing is left, or the folder holds something else.
    """
    source = CleanSource(scanned, verdict.left_out)
    if not len(source):
        raise ClipkitError(f"nothing in {scanned.spec} is left for a clean copy; see what was found")
    manifest = pack(source, out, PackOptions(workers=cores(), overwrite=overwrite))
    shards = [finding for finding in scanned.findings if finding.row < 0 and finding.key is None]
    lines = [{"shard": f.shard, "key": None, "kind": f.kind, "reason": f.reason} for f in shards]
    for row, line in sorted(verdict.left_out.items()):
        lines.append({"shard": scanned.place(row)[0], **line})
    write_ledger(out, [*lines, *_by_pack(out)])
    return manifest


def _by_pack(out: Path) -> list[dict[str, Any]]:
    """What `pack` itself left out: the lines of its ledger, which know no kind."""
    path = out / "ledger.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "kind" not in line]
