"""Images that something else names, such as a list of questions about them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.data.sources.files import Files, extension_of
from clipkit.data.sources.sample import Sample, Stamp, utf8_name
from clipkit.storage import digest, hash_of

__all__ = ["NamedImages"]


class NamedImages:
    """A source of images by their paths, without captions.

    Args:
        spec: how messages and the cache call it.
        names: paths or URLs, each once.
        root: where relative ones start.
    """

    def __init__(self, spec: str, names: Sequence[str], root: str | Path):
        self.spec = spec
        self.has_captions = False
        self.problems: list[dict[str, Any]] = []
        self._files = Files(root, names)
        self.remote = self._files.remote

    def __len__(self) -> int:
        return len(self._files.names)

    def key(self, i: int) -> str:
        return utf8_name(self._files.names[i])

    def name(self, i: int) -> str:
        return self._files.names[i]

    def place(self, i: int) -> Path | str:
        return self._files.at(i)

    def size(self, i: int) -> int:
        return self._files.size(i)

    def __getitem__(self, i: int) -> Sample:
        return Sample(self.key(i), self._files.at(i), extension_of(self._files.names[i]), (), {"path": self.key(i)})

    def without_image(self, i: int) -> Sample:
        return self[i]

    def stamp(self, i: int) -> Stamp:
        image = self._files.stamp(i)
        return Stamp(image and hash_of(image), hash_of(self.key(i)))

    def identity(self) -> str:
        return digest(self._files.stamps())
