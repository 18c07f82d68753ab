"""The states of an index: which segments it has and which of their rows are gone, one small file per generation.

Segments never change. Whoever changes an index writes new segments, lists of rows that are gone, and the next
generation's file, and moves ``current.json`` last: a reader has one generation or the other, and a kill leaves the one
before. The generation before stays, to be gone back to, until the next change.
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import ClipkitError, Side, atomic_write, read_json, write_json

__all__ = [
    "Generation",
    "SegmentState",
    "commit",
    "current",
    "current_number",
    "read",
    "read_dead",
    "revert",
    "write_dead",
]

POINTER = "current.json"


@dataclass(frozen=True)
class SegmentState:
    """A segment as one generation sees it."""

    name: str
    rows: dict[Side, int]
    """How many rows it holds, gone or not."""
    coded: list[Side]
    """The sides that have codes; the others are compared in full."""
    dead: dict[Side, str] = field(default_factory=dict)
    """Files of rows that are gone, relative to the index."""
    gone: dict[Side, int] = field(default_factory=dict)
    """How many they are."""


@dataclass(frozen=True)
class Generation:
    """One state of an index."""

    number: int
    segments: list[SegmentState]
    kinds: dict[Side, str]
    """The kind of each side's codes."""
    coding: dict[Side, str] = field(default_factory=dict)
    """The folder of what the codes are made with, relative to the index; none where the kind is Flat."""
    efforts: dict[Side, dict[str, int]] = field(default_factory=dict)
    """How hard each side's search looks."""
    recall: dict[Side, float] = field(default_factory=dict)
    """What was measured with that."""
    before: int | None = None
    """The generation that can be gone back to."""

    @property
    def sides(self) -> list[Side]:
        """What can be found, in a fixed order."""
        return [side for side in ("image", "text") if side in self.kinds]

    def count(self, side: Side) -> int:
        """How many rows can be found."""
        return sum(s.rows.get(side, 0) - s.gone.get(side, 0) for s in self.segments)

    def files(self) -> set[str]:
        """Everything beneath the index that this state needs."""
        return {
            f"generations/{self.number:06d}.json",
            *(f"segments/{segment.name}" for segment in self.segments),
            *self.coding.values(),
            *(path for segment in self.segments for path in segment.dead.values()),
        }


def _path(folder: Path, number: int) -> Path:
    return folder / "generations" / f"{number:06d}.json"


def current(folder: Path) -> Generation:
    """The generation that counts.

    Raises:
        ClipkitError: where the files are missing or altered.
    """
    return read(folder, current_number(folder))


def current_number(folder: Path) -> int:
    """The number of the generation that counts.

    Raises:
        ClipkitError: where the file is missing or altered.
    """
    pointer = read_json(folder / POINTER)
    if not isinstance(pointer, dict) or not isinstance(pointer.get("generation"), int):
        raise ClipkitError(f"{folder / POINTER} was altered; build the index again")
    return pointer["generation"]


def read(folder: Path, number: int) -> Generation:
    """A generation by its number.

    Raises:
        ClipkitError: where it is missing or altered.
    """
    path = _path(folder, number)
    told = read_json(path)
    try:
        segments = [SegmentState(**segment) for segment in told.pop("segments")]
        return Generation(segments=segments, **told)
    except (TypeError, KeyError, AttributeError) as error:
        raise ClipkitError(f"{path} was altered ({error}); build the index again") from error


def commit(folder: Path, state: Generation) -> None:
    """Make a state the one that counts, and clear away what neither it nor the one before it needs.

    The caller holds the index's lock.
    """
    write_json(_path(folder, state.number), _plain(state))
    write_json(folder / POINTER, {"generation": state.number})
    kept = state.files()
    if state.before is not None:
        kept |= read(folder, state.before).files()
    for room in ("segments", "codings", "dead", "generations"):
        for path in (folder / room).glob("*"):
            if f"{room}/{path.name}" not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _plain(state: Generation) -> dict[str, Any]:
    return {**vars(state), "segments": [vars(segment) for segment in state.segments]}


def revert(folder: Path) -> Generation:
    """Make the generation before the one that counts, which then cannot be gone back from.

    Raises:
        ClipkitError: where there is none.
    """
    now = current(folder)
    if now.before is None:
        raise ClipkitError(f"{folder} has no generation before {now.number} to go back to")
    state = replace(read(folder, now.before), number=now.number + 1, before=None)
    commit(folder, state)
    return state


def write_dead(folder: Path, number: int, segment: str, side: Side, rows: np.ndarray) -> str:
    """Write the rows of a segment that are gone in a generation, int64 and rising; the name relative to the index."""
    name = f"dead/{number:06d}-{segment}-{side}.npy"
    with atomic_write(folder / name) as handle:
        np.save(handle, rows)
    return name


def read_dead(folder: Path, name: str, count: int) -> np.ndarray:
    """Rows that are gone.

    Raises:
        ClipkitError: where the file is missing, cut or altered.
    """
    try:
        rows = np.load(folder / name)
    except (OSError, ValueError, EOFError) as error:
        raise ClipkitError(f"{folder / name} is missing, cut or altered; build the index again") from error
    if len(rows) != count:
        raise ClipkitError(f"{folder / name} holds {len(rows):,} rows where {count:,} are expected; it was altered")
    return rows
