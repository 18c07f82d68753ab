"""What every source gives: samples with ids, their captions, columns and stamps."""

import hashlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clipkit.core import BadSample, ClipkitError, UnreadSample
from clipkit.data.sources.files import IMAGE_TIMEOUT
from clipkit.storage import read_bytes

__all__ = ["Sample", "Source", "Stamp", "check_ids", "own_columns", "sample_id", "text_id", "utf8_name"]


def sample_id(key: str) -> int:
    """A 63-bit id of a sample: BLAKE2b of its key. 63, because FAISS ids are signed."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def text_id(caption: str) -> int:
    """A 63-bit id of a text, the same for texts that differ in their case only, which most tokenizers pass over."""
    return sample_id(caption.lower())


def check_ids(ids: np.ndarray, keys_of: Callable[[int], Sequence[str]]) -> None:
    """Refuse two samples with one id, be it one key twice or two that hash alike.

    Args:
        ids: int64 ``[samples]``, of all of them; sorted in place, so that 100 million take 0.8 GB and nothing more.
        keys_of: the keys of the samples with an id, in order; asked only where two agree.

    Raises:
        ClipkitError: naming both. Among a million keys the chance of this is about one in ten million.
    """
    ids.sort()
    twins = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twins):
        first, second = keys_of(int(ids[twins[0]]))[:2]
        raise ClipkitError(f"{second!r} and {first!r} have the same id; rename one of them")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions."""

    key: str
    """Unique within the source: the source-relative path, or the key in the shards."""
    image: bytes | Path | str | None
    """The image's own bytes, or the file or URL that holds them; None where the sample has no image."""
    extension: str
    """Of the image, lower case without the dot."""
    captions: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    """Everything else that the source says of it."""
    others: dict[str, bytes] = field(default_factory=dict)
    """Further members of a sample in shards, extension to bytes."""
    left_out: tuple[str, ...] = ()
    """What the source says of this image that cannot be used, such as an empty caption among others."""

    @property
    def id(self) -> int:
        """The 63-bit id, see `sample_id`."""
        return sample_id(self.key)

    def read(self) -> bytes:
        """The image's own bytes.

        Raises:
            UnreadSample: where there is no such file, or it cannot be read.
            BadSample: where the sample has no image.
        """
        if isinstance(self.image, bytes):
            return self.image
        if self.image is None:
            raise BadSample("the sample has no image")
        try:
            if isinstance(self.image, str):
                return read_bytes(self.image, timeout=IMAGE_TIMEOUT, retries=2)
            # A named pipe would be waited for, and some devices never end.
            kind = self.image.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise UnreadSample("cannot be read: it is no file but a pipe, a socket or a device")
            return self.image.read_bytes()
        except UnreadSample:
            raise
        except ClipkitError as error:
            raise UnreadSample(str(error)) from error
        except OSError as error:
            raise UnreadSample(f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise BadSample(f"no file can have this name: {error}") from error


class Stamp(NamedTuple):
    """What tells one content of a sample from another without reading it: hashes of names, sizes and times, 16 bytes.

    None where nothing can be told, as of a file that is missing, or when a server says nothing of it.
    """

    image: bytes | None
    words: bytes | None
    """Of the key, the captions and the other columns."""


@runtime_checkable
class Source(Protocol):
    """What folder, list and shards have in common."""

    spec: str
    has_captions: bool
    """Whether captions can be expected; single samples may still lack them."""
    remote: bool
    """Whether samples come one by one over the network, so that many should be asked for at once."""
    problems: list[dict[str, Any]]
    """Ledger lines, with ``key`` and ``reason``, of what is no sample: a row that names no image, a tar that is cut.

    And ``unread``, true, where another time it might be read, such as a folder."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Sample:
        """Sample `i`. `BadSample` where it cannot be read at all."""
        ...

    def without_image(self, i: int, /) -> Sample:
        """Sample `i` without the image's bytes and other members, which are not read."""
        ...

    def key(self, i: int, /) -> str:
        """The key of sample `i`, without reading it."""
        ...

    def name(self, i: int, /) -> str:
        """What the image of sample `i` is called within the source, with its ending: its path, or its member's name."""
        ...

    def place(self, i: int, /) -> Path | str | None:
        """The file or URL of the image of sample `i`; None where it has none of its own."""
        ...

    def size(self, i: int, /) -> int:
        """Bytes of the image of sample `i`, without reading it; 0 where there is none."""
        ...

    def stamp(self, i: int, /) -> Stamp:
        """What tells this content of sample `i` from another, as it was when the source was opened, or as it is now."""
        ...

    def identity(self) -> str:
        """A hash of what the source holds (names, sizes, times, captions), by which a stage knows its input."""
        ...


# What clipkit itself says of a sample in shards, metadata and results; a user's column of such a name gets a ``_``.
RESERVED_COLUMNS = frozenset({"captions", "caption", "id", "image_path", "key", "path", "rank", "score"})


def own_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """A user's columns under names that do not hide what clipkit says, and that can be written."""
    return {f"{name}_" if name in RESERVED_COLUMNS else utf8_name(name): value for name, value in columns.items()}


def utf8_name(name: str) -> str:
    """A file's name as text that can be written anywhere: what is not UTF-8 in it becomes an escape (``\\udcff``)."""
    return name.encode("utf-8", "backslashreplace").decode()
