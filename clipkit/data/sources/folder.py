"""A folder of images, with captions in files beside them; on the disk or at a URL."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.core import ClipkitError, UnreadSample, note
from clipkit.data.shards import captions_of
from clipkit.data.sources.files import Files, extension_of
from clipkit.data.sources.globs import Globs
from clipkit.data.sources.sample import Sample, Stamp, own_columns, utf8_name
from clipkit.images import IMAGE_SUFFIXES
from clipkit.storage import digest, hash_of, read_bytes

__all__ = ["FolderSource"]

CAPTION_SUFFIXES = (".txt", ".json")


class FolderSource:
    """Every image below a folder, by name order; same-stem ``.txt`` and ``.json`` files give captions.

    An image is what has the ending of one, in whatever case. With patterns it is every file that passes them, and what
    turns out to be none is unusable as a broken image is; captions beside an image are left out then, unless they are
    asked for. Hidden files and folders are passed over. Links are followed to files, not to folders.

    Args:
        root: the folder, or its URL.
        urls: of all files below it, where it is a URL.
        globs: which files.
    """

    def __init__(self, root: str, urls: Sequence[str] | None = None, globs: Globs | None = None):
        self.spec = root
        self.problems: list[dict[str, Any]] = []
        globs = globs or Globs()
        names = list(self._walk(globs.hidden) if urls is None else _below(root, urls, globs.hidden))
        stems = {_stem(name) for name in names if _ending(name) in IMAGE_SUFFIXES}
        beside = {name for name in names if _ending(name) in CAPTION_SUFFIXES and _stem(name) in stems}
        if globs:
            self.paths = [n for n in names if globs.passes(n) and (globs.include or n not in beside)]
        else:
            self.paths = [name for name in names if _ending(name) in IMAGE_SUFFIXES]
        words = [name for name in names if _ending(name) in CAPTION_SUFFIXES]
        companions = {(_stem(name), _ending(name).lstrip(".")): name for name in words}
        if not self.paths:
            if self.problems:
                raise ClipkitError(f"{root}: {self.problems[0]['key']}: {self.problems[0]['reason']}")
            if globs:
                raise ClipkitError(f"no file in {root} passes {globs}; patterns are of paths below it")
            raise ClipkitError(f"no images in {root}; known endings are {', '.join(sorted(IMAGE_SUFFIXES))}")
        self.paths.sort()
        stems = {_stem(path) for path in self.paths}
        self._companions = {at: name for at, name in companions.items() if at[0] in stems}
        self._files = Files(root, [*self.paths, *sorted(self._companions.values())])
        self.has_captions = bool(self._companions)
        self.remote = urls is not None

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, i: int) -> str:
        return utf8_name(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]

    def place(self, i: int) -> Path | str:
        return self._files.at(i)

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
        all_columns = {"path": self.key(i), **own_columns(columns)}
        return Sample(self.key(i), self._files.at(i), extension_of(name), captions, all_columns)

    def without_image(self, i: int) -> Sample:
        return self[i]

    def _walk(self, hidden: bool) -> Iterator[str]:
        links: list[str] = []

        def refused(error: OSError) -> None:
            key = utf8_name(os.path.relpath(error.filename, self.spec))
            reason = f"the folder cannot be read: {error.strerror}"
            self.problems.append({"key": key, "reason": reason, "unread": True})

        for folder, folders, files in os.walk(self.spec, onerror=refused):
            folders[:] = [name for name in folders if hidden or not name.startswith(".")]
            inside = PurePosixPath(Path(folder).relative_to(self.spec).as_posix())
            links += [str(inside / name) for name in folders if Path(folder, name).is_symlink()]
            yield from (str(inside / name) for name in sorted(files) if hidden or not name.startswith("."))
        if links:
            note(
                f"links to folders are not followed: {links[0]}"
                + (f" and {len(links) - 1:,} more" if links[1:] else "")
            )

    def _beside(self, i: int) -> dict[str, str]:
        stem = _stem(self.paths[i])
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


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _below(root: str, urls: Sequence[str], hidden: bool) -> Iterator[str]:
    # Filesystems differ in the slashes that follow the scheme, memory:// even from itself.
    above = root.partition("://")[2].strip("/") + "/"
    for url in urls:
        name = url.partition("://")[2].lstrip("/").removeprefix(above)
        if hidden or not any(part.startswith(".") for part in name.split("/")):
            yield name
