"""Files that a source names, on the disk and at URLs: their bytes, sizes and stamps."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from clipkit.core import note
from clipkit.storage import is_remote, sizes_and_stamps

__all__ = ["Files", "extension_of"]

IMAGE_TIMEOUT = 20.0  # seconds for one image: long lists of URLs hold many dead ones


def extension_of(name: str) -> str:
    """The extension of a path or URL, lower case without the dot."""
    plain = name.partition("?")[0].partition("#")[0] if is_remote(name) else name
    return PurePosixPath(plain).suffix.lower().lstrip(".")


class Files:
    """Files that a source names: below a folder, below a URL, at URLs of their own, or all of these.

    Args:
        root: where relative names start; a folder or a URL.
        names: relative or absolute paths, or URLs.
    """

    def __init__(self, root: str | Path, names: Sequence[str]):
        self.root = str(root)
        self.names = names
        self._root_is_remote = is_remote(self.root)
        self._remote: dict[int, tuple[int, str] | None] | None = None

    @property
    def remote(self) -> bool:
        """Whether any of them is at a URL."""
        return self._root_is_remote or any(is_remote(name) for name in self.names)

    def at(self, i: int) -> Path | str:
        """Where file `i` is: a path on the disk or a URL."""
        return self.place(self.names[i])

    def place(self, name: str) -> Path | str:
        """Where a file of this name is."""
        if is_remote(name):
            return name
        return f"{self.root.rstrip('/')}/{name}" if self._root_is_remote else Path(self.root, name)

    def size(self, i: int) -> int:
        """Bytes of file `i`; 0 where it is missing, or a server does not tell."""
        facts = self._about(i)
        return facts[0] if facts else 0

    def stamp(self, i: int) -> tuple[str, int, int | str] | None:
        """What tells the content of file `i` from another: name, size, and time or mark; None where nothing does."""
        facts = self._about(i)
        return (self.names[i], *facts) if facts and facts[1] != "" else None

    def stamps(self) -> list[tuple[str, int, int | str]]:
        """For each file what tells its content from another: name, size, and time or mark; -1 where it is missing."""
        facts = [self._about(i) or (-1, -1) for i in range(len(self.names))]
        return [(name, size, mark) for name, (size, mark) in zip(self.names, facts, strict=True)]

    def _about(self, i: int) -> tuple[int, int | str] | None:
        place = self.at(i)
        if isinstance(place, str):
            return self._asked()[i]
        try:
            status = place.stat()
        except (OSError, ValueError):  # the latter of a name that no file can have, such as one with a zero byte
            return None
        return status.st_size, status.st_mtime_ns

    def _asked(self) -> dict[int, tuple[int, str] | None]:
        # A request each with most servers, so all of them at once, and once.
        if self._remote is None:
            places = {i: place for i in range(len(self.names)) if isinstance(place := self.at(i), str)}
            note(f"asking for the size and state of {len(places):,} remote files")
            facts = sizes_and_stamps(list(places.values()), timeout=IMAGE_TIMEOUT, retries=2)
            self._remote = dict(zip(places, facts, strict=True))
        return self._remote
