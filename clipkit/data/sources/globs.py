"""Which files of a source are looked at: glob patterns over the path within it."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError
from clipkit.data.sources.sample import Sample, Source, Stamp
from clipkit.storage import digest, is_remote

__all__ = ["Globs", "Selected"]


class Globs:
    """Patterns of paths; ``/`` stands between folders.

    ``*`` and ``?`` stand for anything within one name, ``[abc]`` and ``[!abc]`` for one character, ``**`` for any
    number of folders. A pattern without ``/`` is of names in any folder (``*.jpg``); one with ``/`` is of the whole
    path from the source on (``cats/*``: straight in ``cats``; ``cats/**``: anywhere below it; ``/*.jpg``: at the top).
    One that ends in ``/`` is a folder with everything in it, in any folder unless there is another ``/``. The case of
    an ending does not count (``*.jpg`` is of ``A.JPG`` too), that of other letters does. As in a shell, a name that
    begins with a dot is hidden: only a pattern that says the dot is of it.

    Args:
        include: a path must be of one of these; every path where there are none.
        exclude: and of none of these; here the dot need not be said.

    Raises:
        ClipkitError: for an empty pattern, or one that leads out of the source.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()):
        self.include, self.exclude = tuple(include), tuple(exclude)
        self._include = [_Pattern(pattern, hidden=False) for pattern in self.include or ("**",)]
        self._exclude = [_Pattern(pattern, hidden=True) for pattern in self.exclude]
        self.hidden = any(part.startswith(".") for pattern in self.include for part in pattern.split("/"))
        """Whether any pattern is of hidden names."""

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def __str__(self) -> str:
        options = [f"--include {pattern}" for pattern in self.include]
        return " ".join([*options, *(f"--exclude {pattern}" for pattern in self.exclude)])

    def passes(self, path: str) -> bool:
        """Whether this path, or URL, is wanted."""
        if is_remote(path):
            path = path.partition("?")[0].partition("#")[0]
        names = [name for name in path.split("/") if name]
        return any(one.fits(names) for one in self._include) and not any(one.fits(names) for one in self._exclude)


class _File:
    """A pattern of a file's name; the case of the ending does not count, be it of the name or of the pattern.

    The last dot of the pattern need not be that of the name (``Dr.Smith*``): what follows it is an ending only where it
    fits one.
    """

    def __init__(self, part: str):
        self._whole = re.compile(fnmatch.translate(part))
        stem, dot, ending = part.rpartition(".")
        self._ends = None
        if dot and "]" not in ending.partition("[")[0]:  # the dot is not one of [._]
            self._ends = re.compile(fnmatch.translate(stem)), re.compile(fnmatch.translate(ending), re.IGNORECASE)

    def fits(self, name: str) -> bool:
        if self._whole.match(name):
            return True
        stem, dot, ending = name.rpartition(".")
        if self._ends is None:
            return bool(dot and self._whole.match(f"{stem}.{ending.lower()}"))
        return bool(dot and self._ends[0].match(stem) and self._ends[1].match(ending))


class _Pattern:
    """One pattern, name by name."""

    def __init__(self, pattern: str, hidden: bool):
        if not pattern.strip("/") or ".." in pattern.split("/"):
            raise ClipkitError(f"{pattern!r} is no pattern of paths; write *.jpg, cats/* or cats/**")
        anchored = "/" in pattern.rstrip("/")
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        parts = [*([] if anchored else ["**"]), *parts, *(["**"] if pattern.endswith("/") else [])]
        self.hidden = hidden
        # Several in a row say what one says, and would take time that grows with the power of their number.
        self.parts = [part for at, part in enumerate(parts) if part != "**" or parts[at - 1 : at] != ["**"]]
        self.folders = [re.compile(fnmatch.translate(part)) for part in self.parts[:-1]]
        self.file = _File(self.parts[-1])

    def fits(self, names: Sequence[str], at: int = 0) -> bool:
        """Whether the parts from `at` on are of these names."""
        if at == len(self.parts) or not names:
            return at == len(self.parts) and not names
        part, name = self.parts[at], names[0]
        plain = self.hidden or not name.startswith(".")
        if part == "**":
            if at == len(self.parts) - 1:  # at the end, whatever is below
                return self.hidden or not any(name.startswith(".") for name in names)
            return self.fits(names, at + 1) or (plain and self.fits(names[1:], at))
        fits = self.file.fits(name) if at == len(self.folders) else self.folders[at].match(name) is not None
        return fits and (plain or part[0] not in "*?[") and self.fits(names[1:], at + 1)


class Selected:
    """Some samples of a source, in the order that is named.

    Args:
        source: of which.
        rows: which.
        problems: in place of the source's.
    """

    def __init__(self, source: Source, rows: Iterable[int], problems: Iterable[dict[str, Any]] | None = None):
        self._source, self._rows = source, list(rows)
        self.spec, self.has_captions, self.remote = source.spec, source.has_captions, source.remote
        self.problems = source.problems if problems is None else list(problems)

    @classmethod
    def by(cls, source: Source, globs: Globs) -> "Selected":
        """Those whose name passes.

        Raises:
            ClipkitError: where none does.
        """
        rows = [row for row in range(len(source)) if globs.passes(source.name(row))]
        if not rows:
            first = f"the first is {source.name(0)}" if len(source) else "it has none"
            raise ClipkitError(f"no image of {source.spec} passes {globs}; {first}")
        return cls(source, rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        return self._source[self._rows[i]]

    def without_image(self, i: int) -> Sample:
        return self._source.without_image(self._rows[i])

    def key(self, i: int) -> str:
        return self._source.key(self._rows[i])

    def name(self, i: int) -> str:
        return self._source.name(self._rows[i])

    def place(self, i: int) -> Path | str | None:
        return self._source.place(self._rows[i])

    def size(self, i: int) -> int:
        return self._source.size(self._rows[i])

    def stamp(self, i: int) -> Stamp:
        return self._source.stamp(self._rows[i])

    @cached_property
    def _identity(self) -> str:
        return digest([self._source.identity(), self._rows])

    def identity(self) -> str:
        return self._identity
