"""Sources of samples, all named by one string: a folder of images, shards, or a list file.

A sample is one image with its captions, one or several. A source knows how many samples it has and gives any one of
them; it opens no image before it is asked to, and a sample that turns out unusable raises `BadSample` then.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from clipkit.artifact import digest
from clipkit.decode import IMAGE_SUFFIXES
from clipkit.errors import BadSample, ClipkitError
from clipkit.lists import LIST_SUFFIXES, read_rows
from clipkit.shards import Shards, captions_of, image_extension, is_shard_spec

__all__ = ["Sample", "Source", "check_ids", "open_source", "sample_id"]

IMAGE_COLUMNS = (
    "path",
    "image",
    "image_path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "file",
    "img",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "alt_text", "description")


def sample_id(key: str) -> int:
    """A 63-bit id of a sample: BLAKE2b of its key. 63, because FAISS ids are signed."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def check_ids(keys: Sequence[str], ids: Sequence[int]) -> None:
    """Refuse two samples with one id, be it one key twice or two that hash alike.

    Raises:
        ClipkitError: naming both. Among a million keys the chance of this is about one in ten million.
    """
    seen: dict[int, str] = {}
    for key, number in zip(keys, ids, strict=True):
        if number in seen:
            raise ClipkitError(f"{key!r} and {seen[number]!r} have the same id; rename one of them")
        seen[number] = key


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions."""

    key: str
    """Unique within the source: the source-relative path, or the key in the shards."""
    image: bytes | Path | None
    """The image's own bytes, or the file that holds them; None where the sample has no image."""
    extension: str
    """Of the image, lower case without the dot."""
    captions: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    """Everything else that the source says of it."""

    @property
    def id(self) -> int:
        """The 63-bit id, see `sample_id`."""
        return sample_id(self.key)

    def read(self) -> bytes:
        """The image's own bytes.

        Raises:
            BadSample: where there is no such file or no image in the sample.
        """
        if isinstance(self.image, bytes):
            return self.image
        if self.image is None:
            raise BadSample("the sample has no image")
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror}") from error


@runtime_checkable
class Source(Protocol):
    """What folder, list and shards have in common."""

    spec: str
    has_captions: bool
    """Whether captions can be expected; single samples may still lack them."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Sample:
        """Sample `i`. `BadSample` where it cannot be read at all."""
        ...

    def key(self, i: int, /) -> str:
        """The key of sample `i`, without reading it."""
        ...

    def size(self, i: int, /) -> int:
        """Bytes of the image of sample `i`, without reading it; 0 where there is none."""
        ...

    def identity(self) -> str:
        """A hash of what the source holds (names, sizes, times, captions), by which a stage knows its input."""
        ...


def open_source(
    spec: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: Path | None = None,
    captions_required: bool = False,
) -> Source:
    """Open a folder of images, shards (a folder, a tar or a brace pattern) or a list file.

    Args:
        spec: what to open.
        image_column: a list's column of image paths; found among the usual names when not given.
        caption_column: a list's column of captions; found likewise, and may be absent when not given.
        image_root: where relative paths in a list start; the list's own folder when not given.
        captions_required: refuse a source that has none.

    Raises:
        ClipkitError: where nothing is there, nothing in it is usable, or a column is missing.
    """
    spec = str(spec)
    path = Path(spec)
    if is_shard_spec(spec) or path.is_dir():
        source = ShardSource(spec) if is_shard_spec(spec) else FolderSource(path)
        if captions_required and not source.has_captions:
            raise ClipkitError(f"{spec} has no captions: no .txt or .json beside its images; give a list with captions")
        return source
    if not path.exists():
        raise ClipkitError(f"no such source: {spec}; name a folder of images, shards, or a list file")
    if path.suffix.lower() in LIST_SUFFIXES:
        return ListSource(path, image_column, caption_column, image_root, captions_required)
    raise ClipkitError(f"{spec} is no source: expected a folder, shards (.tar) or a list ({', '.join(LIST_SUFFIXES)})")


# What clipkit itself says of a sample in shards, metadata and results; a user's column of such a name gets a ``_``.
RESERVED = frozenset({"captions", "caption", "id", "image_path", "key", "path", "rank", "score"})


def _own_columns(columns: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_" if name in RESERVED else name: value for name, value in columns.items()}


def _stat_line(key: str, path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError:
        return key, -1, -1
    return key, found.st_size, found.st_mtime_ns


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class FolderSource:
    """Every image below a folder, by name order; same-stem ``.txt`` and ``.json`` files give captions.

    Hidden files and folders are passed over. Links are followed to files, not to folders.
    """

    def __init__(self, root: Path):
        self.spec = str(root)
        self.root = root
        self.paths: list[str] = []
        companions: dict[tuple[str, str], str] = {}
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
            for name in files:
                suffix = Path(name).suffix.lower()
                if name.startswith("."):
                    continue
                if suffix in IMAGE_SUFFIXES:
                    self.paths.append(str(inside / name))
                elif suffix in (".txt", ".json"):
                    companions[str(inside / Path(name).stem), suffix.lstrip(".")] = str(inside / name)
        if not self.paths:
            raise ClipkitError(f"no images in {root}; known endings are {', '.join(sorted(IMAGE_SUFFIXES))}")
        self.paths.sort()
        stems = {str(PurePosixPath(p).with_suffix("")) for p in self.paths}
        self._companions = {at: name for at, name in companions.items() if at[0] in stems}
        self.has_captions = bool(self._companions)

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, i: int) -> str:
        return self.paths[i]

    def size(self, i: int) -> int:
        return _size(self.root / self.paths[i])

    def __getitem__(self, i: int) -> Sample:
        name = self.paths[i]
        stem = str(PurePosixPath(name).with_suffix(""))
        beside = {ext: self._companions[stem, ext] for ext in ("txt", "json") if (stem, ext) in self._companions}
        try:
            members = {ext: (self.root / companion).read_bytes() for ext, companion in beside.items()}
        except OSError as error:
            raise BadSample(f"{error.filename}: {error.strerror}") from error
        captions, columns = captions_of(members)
        return Sample(name, self.root / name, _extension(name), captions, {"path": name, **_own_columns(columns)})

    def identity(self) -> str:
        names = [*self.paths, *sorted(self._companions.values())]
        return digest([_stat_line(name, self.root / name) for name in names])


class ListSource:
    """A table with an image per row; rows that name one image are one sample with several captions."""

    def __init__(
        self,
        path: Path,
        image_column: str | None,
        caption_column: str | None,
        image_root: Path | None,
        captions_required: bool,
    ):
        self.spec = str(path)
        self.path = path
        self.root = image_root or path.parent
        rows = read_rows(path)
        if not rows:
            raise ClipkitError(f"{path} has no rows")
        columns = list(rows[0])
        self._image = _find_column(path, columns, image_column, IMAGE_COLUMNS, "image", True) or ""
        self._caption = _find_column(path, columns, caption_column, CAPTION_COLUMNS, "caption", captions_required)
        self.has_captions = self._caption is not None
        groups: dict[str, list[dict[str, Any]]] = {}
        for number, row in enumerate(rows):
            name = row.get(self._image)
            if not isinstance(name, str) or not name.strip():
                raise ClipkitError(f"{path}: row {number + 1} names no image in column {self._image!r}")
            groups.setdefault(name, []).append(row)
        self._names = list(groups)
        self._rows = list(groups.values())

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return self._names[i]

    def size(self, i: int) -> int:
        return _size(self.root / self._names[i])

    def __getitem__(self, i: int) -> Sample:
        name, rows = self._names[i], self._rows[i]
        captions: list[str] = []
        for row in rows if self._caption else []:
            value = row.get(self._caption or "")
            values = value if isinstance(value, list) else [value]
            captions += [v.strip() for v in values if isinstance(v, str) and v.strip()]
        columns = {}
        for column in dict.fromkeys(name for row in rows for name in row):
            if column not in (self._image, self._caption):
                values = [row.get(column) for row in rows]
                alike = all(value == values[0] for value in values[1:])
                columns[column] = values[0] if alike else values
        about = {"path": name, **_own_columns(columns)}
        return Sample(name, self.root / name, _extension(name), tuple(captions), about)

    def identity(self) -> str:
        listed = hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()
        columns = [self._image, self._caption]
        return digest([listed, columns, [_stat_line(name, self.root / name) for name in self._names]])


class ShardSource:
    """The samples of webdataset shards, in shard order."""

    def __init__(self, spec: str):
        self.spec = spec
        self.shards = Shards.open(spec)
        self.has_captions = bool({"txt", "json"} & self.shards.extensions)

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        return self.shards.key(i)

    def size(self, i: int) -> int:
        members = self.shards.members(i)
        extension = image_extension(members)
        return members[extension][1] if extension else 0

    def __getitem__(self, i: int) -> Sample:
        key = self.shards.key(i)
        try:
            members = self.shards[i]
            captions, columns = captions_of(members)
        except ClipkitError as error:
            raise BadSample(str(error)) from error
        extension = image_extension(members)
        image = members[extension] if extension else None
        path = columns.pop("path", key)  # what clipkit pack was given
        return Sample(key, image, extension or "", captions, {"path": path, **_own_columns(columns)})

    def identity(self) -> str:
        return self.shards.identity()


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")


def _find_column(
    path: Path, columns: list[str], wanted: str | None, usual: Sequence[str], what: str, required: bool
) -> str | None:
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise ClipkitError(
            f"{path} has no column {wanted!r}; its columns are {', '.join(columns)}; name one with --{what}-column"
        )
    by_lower = {column.lower(): column for column in reversed(columns)}
    found = next((by_lower[name] for name in usual if name in by_lower), None)
    if found is None and required:
        raise ClipkitError(
            f"{path} has no {what} column; its columns are {', '.join(columns)}; name it with --{what}-column"
        )
    return found
