"""Webdataset shards: written with webdataset itself, read by seeking.

webdataset 1.0 reads a tar from front to back only. Training wants any sample at any moment, so each shard has a
sidecar index beside it, ``000000.idx.arrow``: one row per tar member with its key, extension, offset and size.
Shards that others made get theirs on first use. Reading is a `pread`, safe from any thread and after a fork.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipkit.artifact import WORK, atomic_write, kind_of, read_manifest
from clipkit.decode import IMAGE_SUFFIXES
from clipkit.errors import BadSample, ClipkitError
from clipkit.log import note, warn

__all__ = ["Shards", "captions_of", "expand", "index_tar", "is_shard_spec", "write_shard"]

SIDECAR_SUFFIX = ".idx.arrow"
# webdataset's rule: the key ends at the first dot of the last path component.
MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
SCHEMA = pa.schema([("key", pa.string()), ("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])


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


def expand(spec: str) -> list[Path]:
    """The tar files that `spec` names, in name order.

    Raises:
        ClipkitError: where one that is named by a pattern does not exist, a folder holds none, or it is one that
            `clipkit pack` has not finished.
    """
    folder = Path(spec)
    if folder.is_dir():
        if (folder / WORK).is_dir() or kind_of(folder):
            found = [folder / shard["name"] for shard in read_manifest(folder, "shards")["shards"]]
        else:
            found = sorted(folder.glob("*.tar"))
    else:
        from webdataset.shardlists import expand_urls

        found = [Path(url) for url in expand_urls(spec)]
    for path in found:
        if not path.is_file():
            raise ClipkitError(f"no such shard: {path}")
    if not found:
        raise ClipkitError(f"no shards (*.tar) in {spec}")
    return found


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write one shard and its sidecar, each atomically. Equal samples give equal bytes.

    Args:
        path: the tar to write.
        samples: pairs of a key and its members, extension to bytes, in order.

    Returns:
        The number of samples written.
    """
    from webdataset.writer import TarWriter

    count = 0
    with atomic_write(path) as stream:
        # A fixed time and owner make the bytes a function of the content; PAX carries long and unicode names.
        output: Any = stream
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
    write_sidecar(path, index_tar(path))
    return count


def index_tar(path: Path) -> pa.Table:
    """Scan a tar's headers: one row per file member, ``key, ext, offset, size``. Data is skipped, not read.

    A tar that is cut short is indexed as far as it is whole, with a warning that names it.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    end = path.stat().st_size
    if end:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    matched = MEMBER.match(member.name)
                    if member.isfile() and matched:
                        if member.offset_data + member.size > end:
                            warn(f"{path}: cut short inside {member.name}; what stands before it is used")
                            break
                        values = (matched[1], matched[2].lower(), member.offset_data, member.size)
                        for column, value in zip(columns.values(), values, strict=True):
                            column.append(value)
                    tar.members.clear()  # tarfile keeps every header it saw; a long shard would fill memory
        except tarfile.TarError as error:
            if not columns["key"]:
                raise ClipkitError(f"{path} is no readable tar: {error}") from error
            warn(f"{path}: {error}; the {len(columns['key'])} members before it are used")
    return pa.table(columns, schema=SCHEMA)


def sidecar_of(tar: Path) -> Path:
    """Where the sidecar of a shard stands."""
    return tar.with_name(tar.name.removesuffix(".tar") + SIDECAR_SUFFIX)


def write_sidecar(tar: Path, table: pa.Table) -> None:
    """Store the index with the size and time of the tar that it describes."""
    table = table.replace_schema_metadata({"tar": _stamp(tar)})
    with atomic_write(sidecar_of(tar)) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def _read_sidecar(tar: Path) -> pa.Table | None:
    path = sidecar_of(tar)
    if not path.is_file():
        return None
    try:
        with pa.memory_map(str(path)) as stream:
            table = pa.ipc.open_file(stream).read_all()
    except (pa.ArrowInvalid, OSError):
        return None
    described = (table.schema.metadata or {}).get(b"tar", b"").decode()
    return table if described == _stamp(tar) else None  # stale: the tar was written anew, or copied


def _stamp(tar: Path) -> str:
    # The time too: tar pads to 10 KiB, so a tar that was made again is often just as long.
    found = tar.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _load_index(tar: Path) -> pa.Table:
    table = _read_sidecar(tar)
    if table is None:
        table = index_tar(tar)
        try:
            write_sidecar(tar, table)
        except ClipkitError:
            note(f"{tar.parent} cannot be written: the index of {tar.name} is not kept")
    return table


class Shards(Sequence[dict[str, bytes]]):
    """Random access to the samples of many shards, in shard order and tar order.

    ``shards[i]`` reads sample `i`: extension to bytes. Memory is four numbers per member, not the data.
    """

    def __init__(self, tars: Sequence[Path]):
        self.tars = list(tars)
        keys: list[pa.Array] = []
        exts: list[pa.Array] = []
        offsets, sizes, shard_of, starts = [], [], [], []
        base = 0
        for number, tar in enumerate(self.tars):
            table = _load_index(tar)
            if table.num_rows == 0:
                warn(f"{tar} is empty")
                continue
            # Members of one key are one sample, by first appearance; plain tar does not keep them together.
            coded = table["key"].combine_chunks().dictionary_encode()
            codes = coded.indices.to_numpy()
            order = np.argsort(codes, kind="stable")
            keys.append(coded.dictionary)
            exts.append(table["ext"].take(pa.array(order)).combine_chunks())
            offsets.append(table["offset"].to_numpy()[order])
            sizes.append(table["size"].to_numpy()[order])
            shard_of.append(np.full(len(coded.dictionary), number, np.int32))
            starts.append(np.searchsorted(codes[order], np.arange(len(coded.dictionary))) + base)
            base += table.num_rows
        self._offset = np.concatenate(offsets) if offsets else np.zeros(0, np.int64)
        self._size = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        self._shard = np.concatenate(shard_of) if shard_of else np.zeros(0, np.int32)
        self._start = np.concatenate([*starts, [base]]).astype(np.int64)
        self._ext = pa.concat_arrays(exts) if exts else pa.array([], pa.string())
        self._key = pa.concat_arrays(keys) if keys else pa.array([], pa.string())
        # Shards that number their samples from zero, each anew, are common: there the shard is part of the key.
        self._named_by_shard = len(self._key.unique()) < len(self._key)

    @classmethod
    def open(cls, spec: str) -> "Shards":
        """Open what `expand` finds.

        Raises:
            ClipkitError: where there are no shards or they hold no sample.
        """
        shards = cls(expand(spec))
        if not len(shards):
            raise ClipkitError(f"the shards in {spec} hold no samples")
        return shards

    def __len__(self) -> int:
        return len(self._shard)

    def key(self, i: int) -> str:
        """The key of sample `i`; with the shard's name before it where several shards use one key."""
        key = self._key[i].as_py()
        return f"{self.tar_of(i).stem}/{key}" if self._named_by_shard else key

    @property
    def extensions(self) -> set[str]:
        """Every extension that a member has."""
        return set(self._ext.unique().to_pylist())

    def identity(self) -> str:
        """A hash over every member's key, extension and size: the same samples in the same order, wherever they are."""
        hasher = hashlib.blake2b(digest_size=16)
        for text in (self._key, self._ext):
            hasher.update("\0".join(text.to_pylist()).encode("utf-8", "surrogatepass"))
        hasher.update(self._size.tobytes())
        hasher.update(self._start.tobytes())
        return hasher.hexdigest()

    def tar_of(self, i: int) -> Path:
        """The shard that sample `i` stands in."""
        return self.tars[self._shard[i]]

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """Extension to ``(offset, size)`` in the shard, without reading."""
        return {
            self._ext[m].as_py(): (int(self._offset[m]), int(self._size[m]))
            for m in range(self._start[i], self._start[i + 1])
        }

    def read(self, i: int, *extensions: str) -> dict[str, bytes]:
        """Read the named members of sample `i` (all of them where none is named; those it lacks are left out).

        Raises:
            ClipkitError: where the shard is gone or shorter than its index says.
        """
        wanted = {ext: at for ext, at in self.members(i).items() if not extensions or ext in extensions}
        path = self.tar_of(i)
        try:
            # Opening costs some 10 us and needs no cache of descriptors that forks and threads would share.
            with path.open("rb", buffering=0) as handle:
                found = {ext: os.pread(handle.fileno(), size, offset) for ext, (offset, size) in wanted.items()}
        except OSError as error:
            raise ClipkitError(f"cannot read {path}: {error.strerror}") from error
        if any(len(found[ext]) != size for ext, (_, size) in wanted.items()):
            raise ClipkitError(f"{path} ends before sample {self.key(i)!r}; it was cut after it was indexed")
        return found

    def __getitem__(self, i: int) -> dict[str, bytes]:  # type: ignore[override]
        return self.read(i)

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        return (self[i] for i in range(len(self)))


def image_extension(extensions: Iterable[str]) -> str | None:
    """The extension among a sample's members that is its image."""
    return next((ext for ext in extensions if f".{ext}" in IMAGE_SUFFIXES), None)


def captions_of(members: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and other columns of a sample.

    ``json["captions"]`` where it stands, else ``txt``, else ``json["caption"]`` (img2dataset writes both).

    Raises:
        BadSample: where the text is not UTF-8 or the JSON is broken.
    """
    try:
        columns = json.loads(members["json"]) if "json" in members else {}
        text = members["txt"].decode("utf-8-sig") if "txt" in members else None
    except UnicodeDecodeError as error:
        raise BadSample(f"the caption is not UTF-8: {error}") from error
    except ValueError as error:
        raise BadSample(f"the .json member is broken: {error}") from error
    if not isinstance(columns, dict):
        raise BadSample("the .json member is no object")
    listed = columns.pop("captions", None)
    single = columns.pop("caption", None)
    found = listed if isinstance(listed, list) else [text if text is not None else single]
    return tuple(c.strip() for c in found if isinstance(c, str) and c.strip()), columns
