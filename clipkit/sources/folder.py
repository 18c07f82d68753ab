"""A folder of images, with captions in files beside them; on the disk or at a URL."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.artifact import digest
from clipkit.decode import IMAGE_SUFFIXES
from clipkit.errors import ClipkitError, UnreadSample
from clipkit.shards import captions_of
from clipkit.sources.base import Files, Sample, Stamp, extension_of, hash_of, own_columns, readable
from clipkit.storage import read_bytes

__all__ = ["FolderSource"]


class FolderSource:
    """Every image below a folder, by name order; same-stem ``.txt`` and ``.json`` files give captions.

    Hidden files and folders are passed over. Links are followed to files, not to folders.

    Args:
        root: the folder, or its URL.
        urls: of all files below it, where it is a URL.
    """

    def __init__(self, root: str, urls: Sequence[str] | None = None):
        self.spec = root
        self.problems: list[dict[str, Any]] = []
        self.paths: list[str] = []
        companions: dict[tuple[str, str], str] = {}
        for name in _walk(root) if urls is None else _below(root, urls):
            path = PurePosixPath(name)
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                self.paths.append(name)
            elif suffix in (".txt", ".json"):
                companions[str(path.with_suffix("")), suffix.lstrip(".")] = name
        if not self.paths:
            raise ClipkitError(f"no images in {root}; known endings are {', '.join(sorted(IMAGE_SUFFIXES))}")
        self.paths.sort()
        stems = {str(PurePosixPath(p).with_suffix("")) for p in self.paths}
        self._companions = {at: name for at, name in companions.items() if at[0] in stems}
        self._files = Files(root, [*self.paths, *sorted(self._companions.values())])
        self.has_captions = bool(self._companions)
        self.remote = urls is not None

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, i: int) -> str:
        return readable(self.paths[i])

    def size(self, i: int) -> int:
        return self._files.size(i)

    def __getitem__(self, i: int) -> Sample:
        name = self.paths[i]
        try:
            members = {ext: _read(self._files.place(companion)) for ext, companion in self._beside(i).items()}
        except OSError as error:
            raise UnreadSample(f"{error.filename}: {error.strerror}") from error
        except ClipkitError as error:
            raise UnreadSample(str(error)) from error
        captions, columns = captions_of(members)
        about = {"path": self.key(i), **own_columns(columns)}
        return Sample(self.key(i), self._files.at(i), extension_of(name), captions, about)

    def without_image(self, i: int) -> Sample:
        return self[i]

    def _beside(self, i: int) -> dict[str, str]:
        stem = str(PurePosixPath(self.paths[i]).with_suffix(""))
        return {ext: self._companions[stem, ext] for ext in ("txt", "json") if (stem, ext) in self._companions}

    def stamp(self, i: int) -> Stamp:
        image = self._files.stamp(i)
        names = self._files.names
        beside = [self._files.stamp(bisect_left(names, name, lo=len(self.paths))) for name in self._beside(i).values()]
        words = None if None in beside else hash_of(self.paths[i], beside)
        return Stamp(image and hash_of(image), words)

    def identity(self) -> str:
        return digest(self._files.stamps())


def _read(place: Path | str) -> bytes:
    return read_bytes(place) if isinstance(place, str) else place.read_bytes()


def _walk(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        yield from (str(inside / name) for name in sorted(files) if not name.startswith("."))


def _below(root: str, urls: Sequence[str]) -> Iterator[str]:
    # Filesystems differ in the slashes that follow the scheme, memory:// even from itself.
    above = root.partition("://")[2].strip("/") + "/"
    for url in urls:
        name = url.partition("://")[2].lstrip("/").removeprefix(above)
        if not any(part.startswith(".") for part in name.split("/")):
            yield name
