"""Where classified files go: a folder for each label, and a name in it that nothing else has. Nothing is touched here.

Names count as equal where a file system might take them for one: in whatever case and whatever Unicode form.
"""

import hashlib
import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

__all__ = [
    "BACKGROUND_FOLDER",
    "UNSURE_FOLDER",
    "How",
    "Item",
    "Step",
    "folders_of",
    "numbered",
    "plain_form",
    "plan",
    "safe_name",
]

How = Literal["copy", "link", "move"]
UNSURE_FOLDER, BACKGROUND_FOLDER = "unsure", "background"
LONGEST = 120  # bytes of a folder's name; file systems take 255, and paths must stay short as a whole
NAME_MAX = 255
FORBIDDEN = frozenset('/\\<>:"|?*')  # somewhere; a sorted folder may go to another system
DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


@dataclass(frozen=True)
class Item:
    """A file that was classified."""

    path: str
    """Where it is, absolute."""
    folders: tuple[str, ...]
    """Names of those that it goes into; to be moved into one at most."""


@dataclass(frozen=True)
class Step:
    """One file to be put somewhere."""

    path: str
    """Where it is, absolute."""
    target: str
    """Where it goes, ``FOLDER/NAME`` in the sorted folder."""

    @property
    def folder(self) -> str:
        """Of the target."""
        return self.target.partition("/")[0]


def plain_form(name: str) -> str:
    """The same for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def safe_name(label: str) -> str:
    """A label as a folder can be called on any system: no separators, not hidden, not above, not too long.

    Different labels may get one name; `folders_of` tells those apart.
    """
    text = unicodedata.normalize("NFC", label)
    text = "".join(char if char.isprintable() and char not in FORBIDDEN else "_" for char in text)
    text = text.strip().rstrip(". ")
    if text.startswith("."):
        text = "_" + text.lstrip(".")
    if not text or text.partition(".")[0].lower() in DEVICE_NAMES:
        text += "_"
    if len(text.encode()) > LONGEST:
        mark = hashlib.blake2b(label.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        text = f"{_cut(text, LONGEST - 9).rstrip('. ')}~{mark}"
    return text


def folders_of(labels: Sequence[str], known: Mapping[str, str], is_file: Callable[[str], bool]) -> dict[str, str]:
    """A folder for each label, each another and none of those for what is unsure and for the background.

    Args:
        labels: names of classes.
        known: folders that labels have from before.
        is_file: whether a name in the sorted folder is taken by something that is no folder.
    """
    folder_of = dict(known)
    taken = {plain_form(name) for name in (UNSURE_FOLDER, BACKGROUND_FOLDER, *known.values())}
    for label in labels:
        if label not in folder_of:
            name = safe_name(label)
            for number in itertools.count(2):
                if plain_form(name) not in taken and not is_file(name):
                    break
                name = f"{safe_name(label)}-{number}"
            folder_of[label] = name
            taken.add(plain_form(name))
    return folder_of


def plan(items: Iterable[Item], taken: Iterable[str], done: Mapping[tuple[str, str], str]) -> list[Step]:
    """Give each file a name in each of its folders: its own, or the next that is free (``a.jpg``, ``a-2.jpg``).

    Args:
        items: in order, the first of which keeps its name. Of one file that is named twice the first counts.
        taken: names that exist already, ``FOLDER/NAME``.
        done: what stands where it belongs: path and folder to target. It is not planned again.
    """
    used = {plain_form(name) for name in taken}
    numbers: dict[str, int] = {}  # so that 10,000 files of one name are not tried against each other
    seen = set(done)
    steps = []
    for item in items:
        for folder in item.folders:
            if (item.path, folder) not in seen:
                seen.add((item.path, folder))
                name = PurePosixPath(item.path).name
                wanted = plain_form(f"{folder}/{name}")
                while plain_form(f"{folder}/{name}") in used:
                    numbers[wanted] = numbers.get(wanted, 1) + 1
                    name = numbered(PurePosixPath(item.path).name, numbers[wanted])
                used.add(plain_form(f"{folder}/{name}"))
                steps.append(Step(item.path, f"{folder}/{name}"))
    return steps


def numbered(name: str, number: int) -> str:
    """``a-2.jpg`` of ``a.jpg``, cut before the number where it would be longer than a file system takes."""
    path = PurePosixPath(name)
    stem, ending = (path.stem, path.suffix) if len(path.suffix) < 32 else (name, "")
    mark = f"-{number}{ending}"
    return _cut(stem, NAME_MAX - len(os.fsencode(mark))) + mark


def _cut(text: str, size: int) -> str:
    """The beginning of it that takes at most so many bytes."""
    raw = os.fsencode(text)
    return text if len(raw) <= size else raw[:size].decode("utf-8", "ignore")
