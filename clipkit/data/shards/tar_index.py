"""What stands where in a tar of samples: an index beside each shard, and the defects that a check found in it.

webdataset 1.0 reads a tar from front to back only. Training wants any sample at any moment, so each shard has a
sidecar, ``000000.idx.arrow``: one row per sample with its key and the extension, offset and size of its members,
memory-mapped, so that it costs no memory of ours and is shared by all processes. Shards that others made get theirs on
first use, in the user's cache folder where the shards' own folder cannot be written. A sidecar carries the size and
time of its tar and counts for nothing when they differ.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.core import ClipkitError, atomic_write, cache_folder, note, write_json
from clipkit.images import IMAGE_SUFFIXES

__all__ = [
    "DEFECTS_SUFFIX",
    "SIDECAR_SUFFIX",
    "Member",
    "TarIndex",
    "fits",
    "index_tar",
    "load_index",
    "parse_index",
    "read_defects",
    "stamp_of",
    "write_defects",
    "write_index",
]

SIDECAR_SUFFIX = ".idx.arrow"
DEFECTS_SUFFIX = ".defects.json"
LAYOUT = "3"
# webdataset's rule: the key ends at the first dot of the last path component.
MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ext", pa.list_(pa.string())),
        ("offset", pa.list_(pa.int64())),
        ("size", pa.list_(pa.int64())),
    ]
)

BLOCK, USTAR = 512, b"ustar"  # of a tar, and what each header has at byte 257

Member = tuple[int, int]  # offset of the data in the tar, and its size in bytes


@dataclass
class TarIndex:
    """The samples of one tar in the order in which their keys first appear."""

    table: pa.Table
    """One row per sample: ``key``, and lists ``ext, offset, size`` with an entry per member."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """What was passed over, as ``{"key", "reason"}``; the key is None where the tar as a whole is meant."""

    def __len__(self) -> int:
        return self.table.num_rows

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        return self.table["key"][i].as_py()

    def members(self, i: int) -> dict[str, Member]:
        """Extension to offset and size of sample `i`'s members."""
        exts, offsets, sizes = (self.table[name][i].as_py() for name in ("ext", "offset", "size"))
        return dict(zip(exts, zip(offsets, sizes, strict=True), strict=True))

    @cached_property
    def extensions(self) -> set[str]:
        """Every extension that a member has."""
        return set(pc.list_flatten(self.table["ext"]).unique().to_pylist())

    @cached_property
    def key_range(self) -> tuple[str, str]:
        """The smallest and the largest key; where ranges of shards do not overlap, no key stands in two of them."""
        ends = pc.min_max(self.table["key"]).as_py()
        return ends["min"] or "", ends["max"] or ""

    @cached_property
    def digest(self) -> str:
        """A hash over every sample's key and its members' extensions and sizes."""
        hasher = hashlib.blake2b(digest_size=16)
        for name in ("key", "ext", "size"):
            hasher.update(json.dumps(self.table[name].to_pylist(), ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    @cached_property
    def without_image(self) -> list[int]:
        """Rows of the samples that have no member with the extension of an image."""
        return self._without(lambda ext: f".{ext}" in IMAGE_SUFFIXES)

    @cached_property
    def without_text(self) -> list[int]:
        """Rows of the samples that have neither a ``txt`` nor a ``json`` member, so no caption."""
        return self._without(lambda ext: ext in ("txt", "json"))

    def _without(self, wanted: Callable[[str], bool]) -> list[int]:
        column = self.table["ext"].combine_chunks()
        flat = pc.list_flatten(column).dictionary_encode()
        good = np.array([wanted(ext) for ext in flat.dictionary.to_pylist()], bool)
        owner = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        present = np.zeros(len(self), bool)
        present[owner[good[flat.indices.to_numpy(zero_copy_only=False)]]] = True
        return np.flatnonzero(~present).tolist()


def stamp_of(tar: Path) -> str:
    """Size and time of a tar. The time too: tar pads to 10 KiB, so one that was made again is often just as long."""
    status = tar.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def index_tar(path: Path) -> TarIndex:
    """Scan a tar's headers; data is skipped, not read.

    Members of one key are one sample by the key's first appearance: plain tar does not keep them together. Of a member
    that stands twice the first counts. A tar that is cut short is indexed as far as it is whole.

    Raises:
        ClipkitError: where there is no readable member at all.
    """
    samples: dict[str, dict[str, Member]] = {}
    problems: list[dict[str, Any]] = []
    end = 0
    try:
        end = path.stat().st_size
        if end:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members.clear()  # tarfile keeps every header it saw; a long shard would fill memory
                    matched = MEMBER.match(member.name)
                    if not member.isfile() or not matched:
                        continue
                    if member.offset_data + member.size > end:
                        problems.append({"key": None, "reason": f"the tar is cut short inside {member.name}"})
                        break
                    key, ext = matched[1], matched[2].lower()
                    if ext in samples.setdefault(key, {}):
                        problems.append({"key": key, "reason": f"{member.name} stands twice; the first counts"})
                    else:
                        samples[key][ext] = member.offset_data, member.size
    except tarfile.TarError as error:
        if not samples:
            raise ClipkitError(f"{path} is no readable tar: {error}") from error
        problems.append({"key": None, "reason": f"the tar is broken after {len(samples)} samples: {error}"})
    except OSError as error:
        raise ClipkitError(f"cannot read {path}: {error.strerror or error}") from error
    if samples and not any(problem["key"] is None for problem in problems):
        problems += _ending(path, end, max(sum(at) for members in samples.values() for at in members.values()))
    columns = {
        "key": [_text(key) for key in samples],
        "ext": [[_text(ext) for ext in members] for members in samples.values()],
        "offset": [[offset for offset, _ in members.values()] for members in samples.values()],
        "size": [[size for _, size in members.values()] for members in samples.values()],
    }
    return TarIndex(pa.table(columns, schema=SCHEMA), problems)


def _ending(path: Path, end: int, last: int) -> list[dict[str, Any]]:
    """What is wrong after the last member: tarfile takes damage there for the end and says nothing."""
    last = -(-last // BLOCK) * BLOCK
    with path.open("rb") as handle:
        handle.seek(last)
        block = handle.read(BLOCK)
    if len(block) < BLOCK:
        reason = "the tar has no end-of-archive mark: it is cut short between two members"
    elif any(block) and block[257:262] != USTAR:  # that may be a member that is no sample's, such as a folder
        reason = f"the tar is damaged at byte {last:,}: the {end - last:,} bytes from there on are not read"
    else:
        return []
    return [{"key": None, "reason": reason}]


def fits(tar: Path, index: TarIndex) -> bool:
    """Whether an index can be of this tar: a header with the right size stands before each member's data."""
    flat = [pc.list_flatten(index.table[name]).to_pylist() for name in ("offset", "size")]
    with tar.open("rb") as handle:
        for offset, size in zip(*flat, strict=True):
            header = os.pread(handle.fileno(), BLOCK, offset - BLOCK)
            try:
                header_size = int(header[124:135].rstrip(b" \0") or b"0", 8)
            except ValueError:
                header_size = size  # a size in base 256, of members above 8 GiB
            if header[257:262] != USTAR or header_size != size:
                return False
    return True


def _text(name: str) -> str:
    # tarfile gives bytes that are no UTF-8 as lone surrogates, which Arrow cannot hold.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _places(tar: Path, suffix: str) -> tuple[Path, Path]:
    """Beside the tar, and in the user's cache for tars in folders that cannot be written."""
    name = tar.name.removesuffix(".tar")
    where = hashlib.blake2b(str(tar.resolve()).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return tar.with_name(name + suffix), cache_folder() / "sidecars" / f"{name}-{where}{suffix}"


def _write_beside(tar: Path, suffix: str, write: Callable[[Path], None]) -> None:
    beside, cached = _places(tar, suffix)
    try:
        write(beside)
    except ClipkitError:
        try:
            write(cached)
        except ClipkitError:
            note(f"neither {beside.parent} nor {cached.parent} can be written: what was learnt of {tar} is not kept")


def write_index(tar: Path, index: TarIndex, stamp: str | None = None) -> None:
    """Keep the index of a tar, with the stamp of what it describes."""
    metadata = {
        "layout": LAYOUT,
        "tar": stamp or stamp_of(tar),
        "problems": json.dumps(index.problems),
        "digest": index.digest,
        "key_range": json.dumps(index.key_range),
        "extensions": json.dumps(sorted(index.extensions)),
        "without_image": json.dumps(index.without_image),
        "without_text": json.dumps(index.without_text),
    }
    table = index.table.replace_schema_metadata(metadata)

    def write(path: Path) -> None:
        with atomic_write(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)

    _write_beside(tar, SIDECAR_SUFFIX, write)


def load_index(tar: Path, stamp: str | None = None) -> TarIndex | None:
    """The index that stands beside a tar (or in the user's cache), where it describes the tar as it is now.

    Args:
        tar: need not be there itself where `stamp` is given.
        stamp: what the index must have been made of; the tar's present one where not given.
    """
    stamp = stamp or stamp_of(tar)
    for path in _places(tar, SIDECAR_SUFFIX):
        try:
            with pa.memory_map(str(path)) as stream:
                index, made_of = parse_index(stream)
        except (ClipkitError, pa.ArrowInvalid, OSError):
            continue
        if made_of == stamp:
            return index
    return None


def parse_index(stream: Any) -> tuple[TarIndex, str]:
    """An index and the stamp of the tar that it describes, from a sidecar's bytes or memory map.

    Raises:
        ClipkitError: where it is no sidecar of this layout.
    """
    try:
        table = pa.ipc.open_file(stream).read_all()
    except pa.ArrowInvalid as error:
        raise ClipkitError(f"no index of a tar: {error}") from error
    metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    if metadata.get("layout") != LAYOUT:
        raise ClipkitError(f"an index of another layout ({metadata.get('layout')}; this one reads {LAYOUT})")
    index = TarIndex(table, json.loads(metadata["problems"]))
    # What costs a pass over the table was worked out when it was written.
    index.digest = metadata["digest"]
    low, high = json.loads(metadata["key_range"])
    index.key_range = low, high
    index.extensions = set(json.loads(metadata["extensions"]))
    index.without_image, index.without_text = (
        json.loads(metadata["without_image"]),
        json.loads(metadata["without_text"]),
    )
    return index, metadata["tar"]


def write_defects(tar: Path, defects: dict[str, str], stamp: str | None = None) -> None:
    """Keep what a check found in a shard: sample key to the reason why the sample cannot be used.

    An empty mapping says that the shard was checked and is clean. Training leaves these samples out of its plan.
    """
    content = {"tar": stamp or stamp_of(tar), "defects": defects}
    _write_beside(tar, DEFECTS_SUFFIX, lambda path: write_json(path, content))


def read_defects(tar: Path, stamp: str | None = None) -> dict[str, str]:
    """What `write_defects` kept of the shard as it is now; empty where nothing is known."""
    for path in _places(tar, DEFECTS_SUFFIX):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("tar") == (stamp or stamp_of(tar)):
            return content["defects"]
    return {}
