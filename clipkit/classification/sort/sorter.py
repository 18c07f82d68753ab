"""Classified images put into a folder for each label."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipkit.classification.classified import Classified
from clipkit.classification.decisions import STATUSES, Decisions
from clipkit.classification.images import ImageOptions, OpenedImages, open_images
from clipkit.classification.labels import LabelSet
from clipkit.classification.sort.journal import Journal, is_begun
from clipkit.classification.sort.plan import BACKGROUND_FOLDER, UNSURE_FOLDER, How, Item, Step, folders_of, plan
from clipkit.classification.sort.transfer import Refused, carry_out, settle, undo
from clipkit.core import ClipkitError, meter, note, warn
from clipkit.data.sources import Globs, Selected, Source, open_source, utf8_name
from clipkit.models import LazyModel
from clipkit.storage import Cache, is_remote

__all__ = ["Sorted", "Sorter", "undo_sort"]

SHOWN = 10  # lines of what would be done
VERBS: dict[How, str] = {"copy": "copied", "link": "linked", "move": "moved"}


class Sorted(NamedTuple):
    """Where an image went, or would go."""

    to: list[str]
    """Its names in the sorted folder; none where it could not be put there."""
    reason: str | None = None
    """Why it could not."""


class _NothingLeft(Exception):
    """All images of a source are sorted."""


class Sorter:
    """Puts images into ``INTO/LABEL/``, the unsure into ``INTO/unsure``, and those of the background likewise.

    What an earlier sort put into the folder is not sorted again, and is no part of the source.

    Args:
        into: the folder; the one above it must be there.
        how: whether files are copied, linked or moved.
        yes: do it, and do not only say what would be done.
        several: whether an image goes into the folder of each of its labels.

    Raises:
        ClipkitError: where it cannot be sorted so.
    """

    def __init__(self, into: Path, how: How, *, yes: bool, several: bool = False):
        if several and how == "move":
            raise ClipkitError("a file cannot be moved into several folders; with --multi-label, --how copy or link")
        if not into.parent.is_dir():
            raise ClipkitError(f"no such folder: {into.parent}; make it, and {into.name} is made in it")
        if os.path.lexists(into) and not into.is_dir():
            raise ClipkitError(f"{into} is a file; name a folder to sort into")
        self.into, self.yes = into.resolve(), yes
        self.how: How = how
        for name in (UNSURE_FOLDER, BACKGROUND_FOLDER):
            if self._is_taken(name):
                raise ClipkitError(f"{self.into / name} is a file, and a folder of that name is needed; rename it")
        self._parents: dict[str, str] = {}
        self._folders: dict[str, str] = {}  # of labels
        self._written: list[str] = []  # targets that the journal names
        self._done: dict[tuple[str, str], str] = {}  # path and folder to target
        self._moved: dict[str, str] = {}  # path to target
        self._refused: list[Refused] = []
        if is_begun(self.into):
            with Journal.open(self.into, create=False) as journal:
                self._look(journal)

    @property
    def before(self) -> int:
        """How many files stand in the folder from before."""
        return len(self._done)

    @property
    def failed(self) -> list[Refused]:
        """What could not be sorted, once that was tried."""
        return self._refused

    def open(
        self, spec: str, models: Sequence[str | LazyModel], cache: Cache, options: ImageOptions
    ) -> OpenedImages | None:
        """Open images without what was sorted before; None where nothing is left.

        Args:
            spec, models, cache, options: see `clipkit.classification.open_images`.

        Raises:
            ClipkitError: where its images are no files of their own.
        """
        try:
            opened = open_images(spec, models, cache, options, open_files=self._unsorted)
        except _NothingLeft:
            return None
        if opened.files is None:
            _refuse_without_files(spec, options.image_root)
        return opened

    def _unsorted(self, spec: str | Path, **options: Any) -> Source:
        """As `open_source`, without what was sorted before."""
        try:
            source = open_source(spec, **options)
        except ClipkitError as error:
            if not self._has_moved(Path(spec).resolve(), options.get("globs") or Globs()):
                raise
            raise _NothingLeft from error
        apart = {str(self.into / target) for target in self._done.values()} | self._moved.keys()
        rows = []
        for row in range(len(source)):
            place = source.place(row)
            if not isinstance(place, Path):
                what = "in shards" if place is None else f"at URLs ({place})"
                raise ClipkitError(f"the images of {spec} are {what}, and only files on the disk can be sorted")
            if self._real(place) not in apart:
                rows.append(row)
        if not rows:
            raise _NothingLeft
        return source if len(rows) == len(source) else Selected(source, rows)

    def _has_moved(self, folder: Path, globs: Globs) -> bool:
        """Whether files were moved out of a folder that would be looked at."""
        inside = (Path(path).relative_to(folder) for path in self._moved if Path(path).is_relative_to(folder))
        return folder.is_dir() and any(globs.passes(path.as_posix()) for path in inside)

    def sort(self, classified: Classified) -> list[Sorted]:
        """Do it, or say what would be done.

        Args:
            classified: images that `open` gave, and what was decided of them.

        Raises:
            ClipkitError: where the disk is full, or another process sorts into the folder.
        """
        images, labels, decisions = classified.images, classified.labels, classified.decisions
        places = [self._real(Path(images.place(at) or "")) for at in range(len(images))]
        if self.yes:
            with Journal.open(self.into, create=True) as journal:
                self._look(journal)
                items, steps = self._planned(places, labels, decisions)
                with meter("sort", len(steps), "files") as advance:
                    self._refused = carry_out(journal, steps, self.how, advance, labels=self._folders)
            self._tell_done(steps)
        else:
            items, steps = self._planned(places, labels, decisions)
            self._tell_plan(steps)
        reason_of = {each.target: each.reason for each in self._refused}
        targets = {(step.path, step.folder): step.target for step in steps} | self._done
        placed = []
        for item in items:
            names = [targets[item.path, folder] for folder in item.folders if (item.path, folder) in targets]
            names = [self._moved[item.path]] if item.path in self._moved else names
            reason = next((reason_of[target] for target in names if target in reason_of), None)
            placed.append(Sorted([target for target in names if target not in reason_of], reason))
        return placed

    def rows(self, rows: Iterable[dict[str, Any]], placed: Sequence[Sorted]) -> Iterator[dict[str, Any]]:
        """The rows of `clipkit.classification.rows_of` with ``to``: the name in the folder; of several labels, names.

        An image that could not be sorted has the reason in ``reason``.
        """
        each = iter(placed)
        for row in rows:
            names, reason = ([], row["reason"]) if row["status"] == "unreadable" else next(each)
            to = [utf8_name(name) for name in names]
            yield {**row, "reason": reason, "to": to if "labels" in row else to[0] if to else None}

    def _look(self, journal: Journal) -> None:
        self._done = settle(journal, act=self.yes)
        self._folders, self._written = dict(journal.labels), list(journal.records)
        moves = (record for record in journal.records.values() if record.how == "move")
        self._moved = {r.path: r.target for r in moves if self._done.get((r.path, r.folder)) == r.target}

    def _planned(self, places: Sequence[str], labels: LabelSet, decisions: Decisions) -> tuple[list[Item], list[Step]]:
        names = [label.name for label in labels.labels if not label.background]
        self._folders = folders_of(names, self._folders, self._is_taken)
        items = [Item(path, _own(decisions, at, labels.names, self._folders)) for at, path in enumerate(places)]
        for item in items:
            for folder in item.folders:
                if Path(item.path).parent == self.into / folder:  # it stands where it belongs
                    self._done.setdefault((item.path, folder), f"{folder}/{Path(item.path).name}")
        left = [item for item in items if item.path not in self._moved]
        return items, plan(left, self._taken({folder for item in left for folder in item.folders}), self._done)

    def _taken(self, folders: Iterable[str]) -> Iterator[str]:
        yield from self._written
        for folder in folders:
            if (self.into / folder).is_dir():
                yield from (f"{folder}/{path.name}" for path in (self.into / folder).iterdir())

    def _is_taken(self, name: str) -> bool:
        return os.path.lexists(self.into / name) and not (self.into / name).is_dir()

    def _real(self, place: Path) -> str:
        # The real path of its folder, but its own name: a link that is sorted is a link.
        parent = str(place.parent)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent).rstrip("/")
        return f"{self._parents[parent]}/{place.name}"

    def _tell_plan(self, steps: Sequence[Step]) -> None:
        note(f"would {self.how} {_counted(steps)} to {self.into}{self._before()}")
        for step in steps[:SHOWN]:
            note(f"  {step.path} -> {step.target}")
        if len(steps) > SHOWN:
            note(f"  and {len(steps) - SHOWN:,} more; the rows of --format jsonl name each")
        note("nothing was touched; --yes does it")

    def _tell_done(self, steps: Sequence[Step]) -> None:
        refused = {each.target for each in self._refused}
        done = [step for step in steps if step.target not in refused]
        note(f"{VERBS[self.how]} {_counted(done)} to {self.into}{self._before()}")
        note(f"clipkit classify --undo {self.into} takes it back")
        if refused:
            first = self._refused[0]
            warn(f"{len(refused):,} files could not be sorted; the first: {first.path}: {first.reason}")

    def _before(self) -> str:
        return f"; {len(self._done):,} are there from before" if self._done else ""


def undo_sort(into: Path) -> list[dict[str, Any]]:
    """Take back all that sorts put into a folder, and say what came of it.

    Returns:
        A row for each file that was not touched: ``path`` (where it was), ``target`` (in the folder), ``reason``.

    Raises:
        ClipkitError: see `clipkit.classification.sort.transfer.undo`.
    """
    with meter("undo", None, "files") as advance:
        back, refused = undo(into, advance)
    note(f"{into}: took back {back:,} files")
    if refused:
        first = refused[0]
        warn(f"{len(refused):,} files were not touched; the first: {first.path}: {first.reason}")
    rows = ({"path": each.path, "target": each.target, "reason": each.reason} for each in refused)
    return [{key: utf8_name(value) for key, value in row.items()} for row in rows]


def _counted(steps: Sequence[Step]) -> str:
    counts = Counter(step.folder for step in steps)
    of_each = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return f"{len(steps):,} files ({of_each})" if of_each else "no files"


def _own(decisions: Decisions, at: int, names: Sequence[str], folders: dict[str, str]) -> tuple[str, ...]:
    status = STATUSES[decisions.statuses[at]]
    if status != "ok":
        return (BACKGROUND_FOLDER if status == "background" else UNSURE_FOLDER,)
    if decisions.present.shape[1]:
        return tuple(folders[names[c]] for c in np.flatnonzero(decisions.present[at]).tolist())
    return (folders[names[int(decisions.classes[at, 0])]],)


def _refuse_without_files(spec: str, root: str | None) -> None:
    """Refuse vectors of which it is not said where the images are."""
    if root is None or is_remote(root):
        hint = "say where the files are: --image-root DIR" if root is None else f"{root} is a URL"
        raise ClipkitError(f"{spec} holds vectors and no images, and only files on the disk can be sorted; {hint}")
