"""Sizes and checksums of an artifact's files: taken while they are written, compared when somebody asks."""

import hashlib
import io
from pathlib import Path
from typing import IO, Any, TypedDict

__all__ = ["Checksum", "Hashed", "file_flaw", "size_flaw"]


class Checksum(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    blake2b: str
    """In hexadecimal digits, as ``b2sum`` prints it."""


class Hashed(io.RawIOBase):
    """A stream that hashes what goes through it, a gigabyte a second, so that no file is read to be summed up.

    Args:
        stream: where it goes on to; writes all that it is given.
    """

    def __init__(self, stream: IO[bytes]):
        self._stream, self._size, self._hash = stream, 0, hashlib.blake2b()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        return self._stream.write(data)

    def checksum(self) -> Checksum:
        """Of what was written until now."""
        return {"bytes": self._size, "blake2b": self._hash.hexdigest()}


def size_flaw(path: Path, written: Checksum) -> str | None:
    """What is wrong with a file as far as its size tells, beginning with its path; None where nothing is."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    if size != written["bytes"]:
        return f"{path} has {size:,} bytes, but {written['bytes']:,} were written"
    return None


def file_flaw(path: Path, written: Checksum) -> str | None:
    """As `size_flaw`, and all of the file is read."""
    problem = size_flaw(path, written)
    if problem is None:
        try:
            with path.open("rb") as handle:
                if hashlib.file_digest(handle, "blake2b").hexdigest() != written["blake2b"]:
                    problem = f"{path} was altered after it was written, or its disk has lost something"
        except OSError as error:
            problem = f"cannot read {path}: {error.strerror or error}"
    return problem
