"""Webdataset shards read by seeking (see `clipkit.data.shards.tar_index`), any sample by its number."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import ClipkitError, progress, warn
from clipkit.data.shards.download_cache import Spool
from clipkit.data.shards.specs import expand, manifest_records, remote_tars, shard_names
from clipkit.data.shards.tar_index import (
    Member,
    TarIndex,
    index_tar,
    load_index,
    read_defects,
    stamp_of,
    write_defects,
    write_index,
)
from clipkit.storage import digest, is_remote

__all__ = ["Shards", "keys_repeat"]

MAX_OPEN = 4096  # memory-mapped indexes at a time; Linux allows a process 65,530 mappings


class Shards(Sequence[dict[str, bytes]]):
    """Random access to the samples of many shards, in shard order and tar order.

    ``shards[i]`` reads sample `i`: extension to bytes. Memory is a few numbers per shard: the indexes of the samples
    are memory-mapped and opened when they are needed. Safe from several threads and after a fork.

    Args:
        tars: the shards.
        spool: where they come from, when that is not the local disk.
    """

    def __init__(self, tars: Sequence[Path], spool: Spool | None = None):
        self.tars = list(tars)
        self.names = shard_names(self.tars)
        """What each shard is called in keys, ledgers and reports: its file's name, with folders where two have one."""
        self.spool = spool
        self._indexes: OrderedDict[int, TarIndex] = OrderedDict()
        self._lock = threading.Lock()
        self.problems: list[dict[str, Any]] = []
        """What was passed over when the tars were indexed: ``shard, key, reason``."""
        counts = []
        self._stamps: list[str] = []
        self._digests: list[str] = []
        self.key_ranges: list[tuple[str, str]] = []
        """The smallest and the largest key of each shard that has any."""
        self.extensions: set[str] = set()
        """Every extension that a member has."""
        for number in progress(range(len(self.tars)), "index", len(self.tars), "shards"):
            self._stamps.append(self._stamp(number))
            index = self.index_of(number)
            if not len(index):
                warn(f"{self.tars[number]} is empty")
            for problem in index.problems:
                self.problems.append({"shard": self.names[number], **problem})
                if problem["key"] is None:
                    warn(f"{self.tars[number]}: {problem['reason']}; what stands before it is used")
            counts.append(len(index))
            self._digests.append(index.digest)
            self.extensions |= index.extensions
            if len(index):
                self.key_ranges.append(index.key_range)
        self.ends = np.cumsum(counts, dtype=np.int64)
        """For each shard, how many samples stand in it and in those before it; int64 ``[shards]``."""
        self._identity = digest(self._digests)
        # Shards that number their samples from zero, each anew, are common: there the shard is part of the key.
        self._named_by_shard = keys_repeat([self])

    def index_of(self, number: int) -> TarIndex:
        """The index of one shard, made and kept beside it where there is none yet.

        Raises:
            ClipkitError: where other samples stand in it than when it was opened.
        """
        with self._lock:
            index = self._indexes.get(number)
            if index is not None:
                self._indexes.move_to_end(number)
                return index
        tar = self.tars[number]
        stamp = self._stamp(number)
        index = self.spool.index(tar) if self.spool else load_index(tar, stamp)
        if index is None:
            index = index_tar(self.local(number))
            write_index(tar, index, stamp)
        if number < len(self._digests) and index.digest != self._digests[number]:
            raise self._changed(number)
        with self._lock:
            self._indexes[number] = index
            if len(self._indexes) > MAX_OPEN:
                self._indexes.popitem(last=False)
        return index

    def _stamp(self, number: int) -> str:
        return self.spool.stamp(self.tars[number]) if self.spool else stamp_of(self.tars[number])

    def _changed(self, number: int) -> ClipkitError:
        return ClipkitError(f"{self.tars[number]} was changed while it was read; run this again")

    def contents(self) -> list[str]:
        """For each shard what tells one content from another: our manifest's checksum, else the stamp of the file.

        Raises:
            ClipkitError: where a shard has changed since it was opened, and its samples are not those.
        """
        records = manifest_records(self.tars)
        contents = []
        for number, tar in enumerate(self.tars):
            if (stamp := self._stamp(number)) != self._stamps[number]:
                raise self._changed(number)
            record = records.get(tar, {})
            # One that was changed behind the manifest's back has another size, or is found by a check.
            if "blake2b" in record and record["bytes"] == tar.stat().st_size:
                contents.append(f"{record['bytes']} {record['blake2b']}")
            else:
                contents.append(stamp)
        return contents

    def defects(self, number: int) -> dict[str, str]:
        """What a check found in one shard: key in the shard to reason; empty where it was not checked or is clean."""
        return read_defects(self.tars[number], self._stamp(number))

    def keep_defects(self, number: int, defects: dict[str, str]) -> None:
        """Keep what a check found in one shard; training leaves these samples out of its plan."""
        write_defects(self.tars[number], defects, self._stamp(number))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @classmethod
    def open(cls, spec: str, cache_bytes: int | None = None) -> "Shards":
        """Open what `expand` finds, or what stands at a URL.

        Args:
            spec: a folder, a tar, a brace pattern; all of them may be URLs.
            cache_bytes: most bytes of remote shards that are kept on the local disk at a time.

        Raises:
            ClipkitError: where there are no shards or they hold no sample.
        """
        if is_remote(spec):
            spool = Spool(remote_tars(spec), cache_bytes)
            shards = cls(spool.tars, spool)
        else:
            shards = cls(expand(spec))
        if not len(shards):
            raise ClipkitError(f"the shards in {spec} hold no samples")
        return shards

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the shard that sample `i` stands in, and its row there.

        Raises:
            IndexError: where there is no such sample.
        """
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, i - (int(self.ends[number - 1]) if number else 0)

    def key(self, i: int) -> str:
        """The key of sample `i`; with the shard's name before it where several shards use one key."""
        number, row = self.locate(i)
        key = self.index_of(number).key(row)
        return f"{self.names[number].removesuffix('.tar')}/{key}" if self._named_by_shard else key

    def identity(self) -> str:
        """A hash over every member's key, extension and size: the same samples in the same order, wherever they are."""
        return self._identity

    def tar_of(self, i: int) -> Path:
        """The shard that sample `i` stands in."""
        return self.tars[self.locate(i)[0]]

    def local(self, number: int) -> Path:
        """The shard as a file on the local disk; a remote one is fetched where it is not there."""
        return self.spool.get(self.tars[number]) if self.spool else self.tars[number]

    def members(self, i: int) -> dict[str, Member]:
        """Extension to ``(offset, size)`` in the shard, without reading."""
        number, row = self.locate(i)
        return self.index_of(number).members(row)

    def read(self, i: int, wanted: Collection[str] | None = None) -> dict[str, bytes]:
        """Read sample `i`: extension to bytes.

        Args:
            i: in the order of the shards.
            wanted: extensions of the members to read; all of them where it is not given.

        Raises:
            ClipkitError: where the shard is gone or shorter than its index says.
        """
        number, row = self.locate(i)
        members = self.index_of(number).members(row)
        if wanted is not None:
            members = {ext: member for ext, member in members.items() if ext in wanted}
        for _ in range(3 if self.spool else 1):  # another reader may make room between fetching and opening
            with contextlib.suppress(FileNotFoundError):
                return self._read(self.local(number), i, members)
        raise ClipkitError(f"cannot read {self.tars[number]}: it is gone")

    def _read(self, path: Path, i: int, members: dict[str, Member]) -> dict[str, bytes]:
        try:
            # Opening costs some 10 us and needs no cache of descriptors that forks and threads would share.
            with path.open("rb", buffering=0) as handle:
                data = {ext: os.pread(handle.fileno(), size, offset) for ext, (offset, size) in members.items()}
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ClipkitError(f"cannot read {path}: {error.strerror}") from error
        if any(len(data[ext]) != size for ext, (_, size) in members.items()):
            raise ClipkitError(f"{path} ends before sample {self.key(i)!r}; it was cut after it was indexed")
        return data

    def __getitem__(self, i: int) -> dict[str, bytes]:  # type: ignore[override]
        return self.read(i)

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        return (self[i] for i in range(len(self)))


def keys_repeat(sets: Sequence[Shards]) -> bool:
    """Whether two samples of these shards have one key, so that the shard's name must tell them apart."""
    ordered = sorted(key_range for shards in sets for key_range in shards.key_ranges)
    if not any(before[1] >= after[0] for before, after in pairwise(ordered)):
        return False
    # 8 bytes per sample for a moment, and only where the key ranges of shards overlap.
    hashes = [
        np.fromiter((hash(key) for key in shards.index_of(number).table["key"].to_pylist()), np.int64)
        for shards in sets
        for number in range(len(shards.tars))
    ]
    joined = np.concatenate(hashes)
    return len(np.unique(joined)) < len(joined)
