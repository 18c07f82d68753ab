"""Remote shards on the local disk for as long as they are read: fetched whole, bounded in size, shared by processes.

A shard is one request and then random access, where a request per sample would wait for the network each time. The
folder is in the user's cache, so a second run finds what is still there; the shard used longest ago goes first.
"""

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from filelock import FileLock

from clipkit.core import ClipkitError, cache_folder, note
from clipkit.data.shards.tar_index import SIDECAR_SUFFIX, TarIndex, fits, load_index, parse_index, write_index
from clipkit.storage import digest, fetch, read_bytes, sizes_and_stamps

__all__ = ["Spool"]

FETCHED_AHEAD = 4  # shards that are fetched at a time, ahead of the reader


class Spool:
    """Remote shards as paths on the local disk that are filled when they are asked for.

    Args:
        urls: of the shards.
        limit: most bytes on the local disk; 64 GiB where not given. One shard more than that may stand for a moment.

    Raises:
        ClipkitError: where one is not there.
    """

    def __init__(self, urls: Sequence[str], limit: int | None = None):
        self.limit = limit or 64 << 30
        self.urls = list(urls)
        self._about = []
        for url, facts in zip(self.urls, sizes_and_stamps(self.urls), strict=True):
            if facts is None:
                raise ClipkitError(f"{url}: there is no such shard, or it cannot be reached")
            self._about.append(facts)
        names = [PurePosixPath(url.partition("?")[0]).name for url in self.urls]
        if len(set(names)) < len(names):
            names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
        # The stamps are part of the folder's name: a shard that was written anew is another one.
        self.folder = cache_folder() / "shards" / digest([self.urls, self._about])
        self.tars = [self.folder / name for name in names]
        self._number = {tar: number for number, tar in enumerate(self.tars)}
        self._coming: set[Path] = set()
        self._used: dict[Path, float] = {}
        self._lock = threading.Lock()

    def stamp(self, tar: Path) -> str:
        """What tells one content of a shard from another; the remote side's word."""
        return f"remote {self._about[self._number[tar]][1]}"

    def index(self, tar: Path) -> TarIndex | None:
        """The index of a shard where it is known here, or stands beside it on the remote side."""
        index = load_index(tar, self.stamp(tar))
        if index is None:
            number = self._number[tar]
            beside = self.urls[number].removesuffix(".tar") + SIDECAR_SUFFIX
            try:
                index, made_of = parse_index(read_bytes(beside, retries=0))
            except ClipkitError:
                return None
            # Uploaded with its shard, it carries the time of another disk: the size must do.
            if made_of.partition(" ")[0] != str(self._about[number][0]):
                return None
            write_index(tar, index, self.stamp(tar))
        return index

    def get(self, tar: Path) -> Path:
        """The shard on the local disk, fetched where it is not there.

        Raises:
            ClipkitError: where it cannot be fetched, naming the URL.
        """
        if not tar.exists():
            tar.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(tar.with_name(f".{tar.name}.lock")):
                if not tar.exists():
                    self._make_room()
                    url = self.urls[self._number[tar]]
                    fetch(url, tar)
                    index = load_index(tar, self.stamp(tar))
                    if index is not None and not fits(tar, index):
                        tar.unlink()
                        raise ClipkitError(f"{url}: the {SIDECAR_SUFFIX} beside it is of another tar; remove it there")
        elif time.monotonic() - self._used.get(tar, 0.0) > 10.0:
            self._used[tar] = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                os.utime(tar)  # access times are off on many disks
        return tar

    def _make_room(self) -> None:
        everything = self.folder.parent  # other sets and older contents are in the cache too
        for scratch in everything.glob("*/.*.tmp"):  # of a process that was killed while it fetched
            with contextlib.suppress(FileNotFoundError):
                if time.time() - scratch.stat().st_mtime > 3600:
                    scratch.unlink()
        standing = []
        for path in everything.glob("*/*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            standing.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in standing)
        for _, size, path in sorted(standing):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)  # who reads in it at this moment reads on
            total -= size

    def ahead(self, tars: list[Path]) -> None:
        """Begin to fetch these, at most four at a time and half of the limit, without waiting for them."""
        size = 0
        with self._lock:
            for tar in tars:
                size += self._about[self._number[tar]][0]
                if len(self._coming) >= FETCHED_AHEAD or size > self.limit // 2:
                    return
                if tar not in self._coming and not tar.exists():
                    self._coming.add(tar)
                    threading.Thread(target=self._bring, args=(tar,), daemon=True).start()

    def _bring(self, tar: Path) -> None:
        try:
            self.get(tar)
        except ClipkitError as error:
            note(f"read-ahead: {error}")  # the reader meets it again, and stops there
        finally:
            with self._lock:
                self._coming.discard(tar)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_coming": set(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
