"""A stage at work on an artifact: its parts are claimed and committed one by one, by one process or several.

While a stage works, its folder holds ``.work/``: ``plan.json`` (what is being made, from what), a lock per part,
and a record per finished part. Files are written under a hidden name and moved into place whole, then the part's
record is written, ``manifest.json`` comes after all parts, and ``.work/`` goes last. So a folder with a manifest is
whole, a folder with a plan can be completed by running the same stage again, and anything else is not ours to touch.
"""

import contextlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clipkit.core import ClipkitError, read_json, write_json
from clipkit.storage.folder_swap import (
    PLAN,
    is_held,
    mend,
    one_at_a_time,
    others,
    put_in_place,
    remove_folder,
    replacement_folder,
    share,
    tidy,
)
from clipkit.storage.hashing import digest
from clipkit.storage.manifest import LAYOUT_VERSION, MANIFEST, WORK, state_of

__all__ = ["Stage", "hold", "refuse_own_input"]


def refuse_own_input(folder: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse an output folder that holds what is to be read.

    Raises:
        ClipkitError: naming both.
    """
    out = folder.resolve()
    for path in inputs:
        if Path(path).exists() and Path(path).resolve().is_relative_to(out):
            raise ClipkitError(f"{folder} holds {path}, which is read to make it; name another output folder")


def hold(folder: Path, what: str) -> FileLock:
    """Lock a folder for this process; the lock goes with the object or the process.

    Raises:
        ClipkitError: where another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ClipkitError(f"another process {what} {folder} right now; wait for it, or name another folder") from None
    return lock


class Stage:
    """One artifact being made: opened over an empty, unfinished or finished folder.

    Args:
        folder: where the artifact goes.
        kind: what it is.
        made_from: JSON-able description of everything the content depends on; the same description on an
            unfinished folder continues it, on a finished one does nothing (`done` is true).
        inputs: what the stage reads; none of it may lie in `folder`, where `overwrite` would remove it.
        overwrite: remove an artifact of other content or kind first. A folder that is no artifact is never removed.
        update: leave an artifact of the same kind and other content as it is until this one is whole, made in a hidden
            folder beside it (`folder`), and put in its place then. `earlier` names what there is to take over. None
            for a kind that cannot be brought up to date.

    Raises:
        ClipkitError: where the folder holds something else.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        made_from: dict[str, Any],
        *,
        inputs: Sequence[str | Path] = (),
        overwrite: bool = False,
        update: bool | None = None,
    ):
        refuse_own_input(folder, inputs)
        self.place = self.folder = folder
        self.kind = kind
        self.made_from = made_from
        identity = digest({"kind": kind, "version": LAYOUT_VERSION, "made_from": made_from})
        self.identity = identity
        self.done = False
        self._committing: FileLock | None = None
        self.earlier: list[Path] = []
        """Artifacts, finished or not, of the same kind and other content: what an update may take over."""
        with one_at_a_time(folder):
            mend(folder.resolve())
            self._clear_the_way(overwrite, update)
            if not self.done:
                if not (self.folder / PLAN).is_file():
                    shutil.rmtree(self.work, ignore_errors=True)
                try:
                    (self.work / "parts").mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ClipkitError(f"cannot make {self.folder}: {error.strerror or error}") from error
                plan = {"kind": kind, "version": LAYOUT_VERSION, "identity": identity, "made_from": made_from}
                if not (self.folder / PLAN).is_file():
                    write_json(self.folder / PLAN, plan)
                weakref.finalize(self, os.close, share(self.folder))
            self._replaced = _inode(folder)

    @property
    def work(self) -> Path:
        """What only an unfinished artifact has: its plan, locks and records."""
        return self.folder / WORK

    def _clear_the_way(self, overwrite: bool, update: bool | None) -> None:
        state, present = state_of(self.folder)
        if state == "empty":
            return
        if present.get("identity") == self.identity and not (overwrite and state == "finished"):
            self.done = state == "finished"
            if self.done:
                shutil.rmtree(self.work, ignore_errors=True)  # a kill after the manifest left it behind
                tidy(self.folder.resolve())
            return
        if update and present.get("kind") == self.kind:
            self._go_beside()
        elif overwrite:
            remove_folder(self.folder)
        else:
            what, how = f"{self.folder} already holds {state} {present.get('kind')}", ""
            if present.get("kind") == self.kind:
                what += " made from other input or settings"
                how = "" if update is None else "--update to bring it up to date, or "
            raise ClipkitError(f"{what}; name another output folder, or add {how}--overwrite to replace it")

    def _go_beside(self) -> None:
        real = self.place.resolve()
        if real.stat().st_dev != real.parent.stat().st_dev:
            raise ClipkitError(f"{self.place} is where a disk is mounted and cannot be replaced; use a folder below it")
        self.folder = replacement_folder(real, self.identity)
        self.earlier = [self.place, *others(real, self.identity)]
        if any(is_held(folder) for folder in self.earlier):
            raise ClipkitError(f"another process makes {self.place} from other input right now; wait for it")
        state, present = state_of(self.folder)
        if state != "empty" and present.get("identity") != self.identity:
            remove_folder(self.folder)  # what stood in the place before: a kill came after the exchange
        elif state == "finished":
            self._end()

    def _end(self) -> None:
        """Within `one_at_a_time`: put what is whole in its place, and remove what kills and others left behind."""
        real = self.place.resolve()
        if self.folder != self.place:
            state, present = state_of(self.folder)
            if state == "finished" and present.get("identity") == self.identity:  # else it is the old one, or gone
                if is_held(real):
                    raise ClipkitError(f"another process works in {self.place}; wait for it, and run this again")
                shutil.rmtree(self.work, ignore_errors=True)
                put_in_place(self.folder, real)
            self.folder = self.place
        state, present = state_of(self.place)
        if state == "finished" and present.get("identity") == self.identity:
            self.done = True
            # Who waits for a lock in it may make that anew at this moment; they come by here, too.
            shutil.rmtree(self.work, ignore_errors=True)
        tidy(real)

    def _over(self) -> bool:
        """Whether another process has made the artifact whole."""
        # In this order: the manifest's folder is moved to its place, and not the other way round.
        moved = self.folder != self.place
        return (self.folder / MANIFEST).is_file() or (moved and _inode(self.place) != self._replaced)

    def settled(self, name: str, find: Callable[[], Any]) -> Any:
        """What the first process found out for all that work on this artifact, now or after a kill: a plain value."""
        path = self.work / "settled" / f"{name}.json"
        try:
            with FileLock(self.work / f"{name}.settled.lock"):
                if not path.is_file():
                    write_json(path, find())
                return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # another process has committed meanwhile, and nothing is left to be done with it
            return find()

    def pending(self, names: Sequence[str]) -> Iterator[str]:
        """Claim, one after another, the parts that nobody has finished; yields while holding the part's lock.

        Several processes may iterate at once: each part goes to one of them, and a lock dies with its process. Who has
        nothing left to claim waits for the others, and takes over the part of one that died.
        """
        left = list(names)
        while left and not self._over():
            for name in list(left):
                if self._record(name).is_file():
                    left.remove(name)
                    continue
                if not self.work.is_dir():
                    return  # another process has committed meanwhile; `records` tells if it has not
                try:
                    with FileLock(self.work / f"{name}.lock").acquire(timeout=0):
                        if not self._record(name).is_file() and not self._over():
                            yield name
                    left.remove(name)
                except (Timeout, FileNotFoundError):
                    continue
            if left:
                time.sleep(0.2)

    def is_finished(self, name: str) -> bool:
        """Whether somebody has finished this part."""
        return self._record(name).is_file()

    def finish_part(self, name: str, record: dict[str, Any]) -> None:
        """Say that every file of this part stands under its final name; `record` is kept for the manifest."""
        write_json(self._record(name), record)

    def records(self, names: Sequence[str]) -> list[dict[str, Any]] | None:
        """The records of all the parts in order, or None where another process has committed the artifact already.

        From here to `commit` this process is the only one: two that finish at once would tread on each other's files.

        Raises:
            ClipkitError: where another artifact has taken the place meanwhile.
        """
        self._committing = lock = FileLock(self.work / "commit.lock")
        # Whoever commits removes the folder of locks under those who wait for one.
        with contextlib.suppress(FileNotFoundError):
            lock.acquire()
        if not self._over():
            return [read_json(self._record(name)) for name in names]
        lock.release()
        with one_at_a_time(self.place):
            self._end()
        if read_json(self.place / MANIFEST).get("identity") != self.identity:
            raise ClipkitError(f"another process has made {self.place} from other input meanwhile; run this again")
        return None

    def _record(self, name: str) -> Path:
        return self.work / "parts" / f"{name}.json"

    def commit(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: from here on the artifact is whole. Returns it."""
        manifest = {"kind": self.kind, "version": LAYOUT_VERSION, **facts, "made_from": self.made_from}
        manifest["identity"] = self.identity
        for scratch in self.folder.rglob(".*.tmp"):  # what a kill in the middle of a write left behind
            scratch.unlink()
        with one_at_a_time(self.place):
            write_json(self.folder / MANIFEST, manifest)
            self._end()
        if self._committing is not None:
            self._committing.release()
        return manifest


def _inode(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
