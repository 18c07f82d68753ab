"""Webdataset shards written with webdataset itself, and summed up while they are written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.core import atomic_write
from clipkit.data.shards.tar_index import index_tar, write_index
from clipkit.storage import Hashed

__all__ = ["load_writer", "write_shard"]


class WrittenShard(NamedTuple):
    """What was written."""

    samples: int
    bytes: int
    """Of the tar."""
    blake2b: str
    """Of the tar's bytes, in hexadecimal digits, as ``b2sum`` prints it."""


def load_writer() -> Any:
    """webdataset's class for writing a tar. Its import brings torch, seconds that are better spent before a fork."""
    from webdataset.writer import TarWriter

    return TarWriter


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> WrittenShard:
    """Write one shard and its sidecar, each atomically. Equal samples give equal bytes.

    Args:
        path: the tar to write.
        samples: pairs of a key and its members, extension to bytes, in order.
    """
    TarWriter = load_writer()
    count = 0
    with atomic_write(path) as stream:
        # A fixed time and owner make the bytes a function of the content; PAX carries long and unicode names.
        output: Any = Hashed(stream)
        writer = TarWriter(output, encoder=False, mtime=0, user="clipkit", group="clipkit", format="PAX_FORMAT")
        try:
            for key, members in samples:
                writer.write({"__key__": key, **members})
                count += 1
            writer.close()
        except BaseException:
            # The tar would write its end when it is collected, to a file that is closed by then.
            writer.tarstream.fileobj.closed = True
            raise
    write_index(path, index_tar(path))
    return WrittenShard(count, **output.checksum())
