"""Training from ``pipe:COMMAND``: shards that can only be read from front to back.

Nothing can be looked up in a pipe, so the sequence is the order of the shards and of the samples in them, epoch after
epoch. Each rank reads all of it and decodes what is its own. A resumed run reads and passes over what was used before.
Where a window is set, blocks of that many samples are shuffled in memory.
"""

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipkit.core import ClipkitError
from clipkit.data.shards import MEMBER, brace_expand, image_extension
from clipkit.data.sources import sample_id
from clipkit.storage import digest, open_stream
from clipkit.training.batches.dataset import MISSING_HINT
from clipkit.training.batches.order import permuted

__all__ = ["StreamSet"]

BLOCK = 256  # raw samples that are held at a time; one that cannot be used is replaced by another one of its block


class _Record(NamedTuple):
    shard: str
    key: str
    members: dict[str, bytes]


class _In(NamedTuple):
    block: list[_Record]
    place: int


class StreamSet:
    """The samples of piped shards, in order. Positions must be asked for in rising order.

    Args:
        spec: ``pipe:COMMAND``, with braces for several.
        seed: shuffles inside blocks.
        window: samples that are shuffled among each other; None for the order of the stream.
        missing: ``stop`` where a sample without image or caption ends the run; else it is passed over.
        timeout: seconds without a byte after which a pipe is given up.
        is_main: only one rank keeps the ledger of what all of them pass over.
    """

    size: int | None = None
    replacement = False

    def __init__(
        self,
        spec: str,
        seed: int,
        *,
        window: int | None = None,
        missing: str = "skip",
        timeout: float = 300.0,
        is_main: bool = True,
    ):
        self.urls = brace_expand(spec)
        self.seed, self.window = seed, window
        self.missing, self.timeout, self.is_main = missing, timeout, is_main
        self.excluded: list[list[int]] = []
        self.left_out: list[dict[str, Any]] = []
        self._ledger: list[dict[str, Any]] = []
        self._records = self._endless()
        self._number = -1
        self._met = 0  # samples so far
        self._from: int | None = None  # the first position that was asked for
        self._block: list[_Record] = []

    def identity(self) -> str:
        """A hash of the commands and the window: what the commands will say, nobody knows."""
        return digest([self.urls, self.window])

    def _endless(self) -> Iterator[_Record]:
        epoch = 0
        while True:
            found = 0
            for url in self.urls:
                for record in self._samples(url, tell=self.is_main and epoch == 0):
                    found += 1
                    self._met += 1
                    yield record
            if not found:
                raise ClipkitError(f"no sample of {self.urls[0]} can be used: none has an image and a caption")
            epoch += 1

    def _samples(self, url: str, tell: bool) -> Iterator[_Record]:
        """Samples of one pipe: neighbouring members of one key, as webdataset has it."""
        key, members = None, {}
        try:
            with open_stream(url, timeout=self.timeout) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    tar.members.clear()  # tarfile keeps every header it saw
                    matched = MEMBER.match(member.name)
                    if not member.isfile() or not matched:
                        continue
                    if matched[1] != key:
                        yield from self._whole(url, key, members, tell)
                        key, members = matched[1], {}
                    content = tar.extractfile(member)
                    members[matched[2].lower()] = content.read() if content else b""
                # The command's own end, which tells whether it failed, comes after tar's.
                while stream.read(1 << 20):
                    pass
        except tarfile.TarError as error:
            if tell:
                self._tell(url, None, f"the stream is cut or broken: {error}")
        else:
            yield from self._whole(url, key, members, tell)

    def _whole(self, url: str, key: str | None, members: dict[str, bytes], tell: bool) -> Iterator[_Record]:
        if key is None:
            return
        lacks = None if {"txt", "json"} & members.keys() else "the sample has no caption"
        lacks = lacks if image_extension(members) else "the sample has no image"
        if lacks is None:
            yield _Record(url, key, members)
        elif self.missing == "stop":
            raise ClipkitError(f"{url}: {key}: {lacks}; {MISSING_HINT}")
        elif tell:
            self._tell(url, key, lacks)

    def _tell(self, url: str, key: str | None, reason: str) -> None:
        self._ledger.append({"shard": url, "key": key, "reason": reason, "position": self._met})

    def first(self, positions: Sequence[int]) -> list[_In]:
        """The samples at these positions, reading on as far as needed."""
        length = self.window or BLOCK
        if self._from is None and positions:
            self._from = positions[0]
        found = []
        for position in positions:
            number, place = divmod(position, length)
            if number < self._number:
                raise ClipkitError(f"{self.urls[0]} cannot be read backwards")
            while self._number < number:
                self._block = [next(self._records) for _ in range(length)]
                self._number += 1
            if self.window:
                place = int(permuted(np.array([place]), length, [self.seed, number])[0])
            found.append(_In(self._block, place))
        return found

    def other(self, reference: _In, rng: np.random.Generator) -> _In:
        """Another sample of the same block."""
        return _In(reference.block, int(rng.integers(len(reference.block))))

    def read(self, reference: _In) -> dict[str, bytes]:
        """The members of the sample."""
        return reference.block[reference.place].members

    def name(self, reference: _In) -> tuple[str, str]:
        """The command and the key of the sample."""
        record = reference.block[reference.place]
        return record.shard, record.key

    def image_id(self, reference: _In) -> int:
        """The sample's id."""
        return sample_id(reference.block[reference.place].key)

    def drain(self) -> list[dict[str, Any]]:
        """What was passed over since the last call, each once though every epoch meets it again."""
        lines, self._ledger = self._ledger, []
        # What is passed over on the way to the first position has its line from the run that was there before.
        return [line for line in lines if line["position"] >= (self._from or 0)]
