"""Artifact folders: a manifest that is written last, parts that are claimed and committed one by one.

While a stage works, its folder holds ``.work/``: ``plan.json`` (what is being made, from what), a lock per part,
and a record per finished part. Files are written under a hidden name and moved into place whole, then the part's
record is written, ``manifest.json`` comes after all parts, and ``.work/`` goes last. So a folder with a manifest is
whole, a folder with a plan can be completed by running the same stage again, and anything else is not ours to touch.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clipkit.core import ClipkitError, atomic_write, read_json, write_json
from clipkit.renewal import PLAN, beside, is_held, mend, one_at_a_time, others, put_in_place, remove_folder, share, tidy

__all__ = [
    "MODEL_FOLDER",
    "VERSION",
    "WORK",
    "Stage",
    "digest",
    "hold",
    "kind_of",
    "read_manifest",
    "refuse_own_input",
    "relative_to_artifact",
    "state_of",
    "write_ledger",
]

VERSION = 1  # of the layout of every kind; a reader refuses what is newer than itself
MANIFEST = "manifest.json"
MODEL_FOLDER = "model"  # of a run and of a checkpoint: the weights with all that is needed to use them
WORK = str(PLAN.parent)


def digest(value: Any) -> str:
    """A short hash of any JSON-able value, the same for equal values on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def kind_of(folder: Path) -> str | None:
    """The kind of a finished artifact (``shards``, ``run``, ``embeddings``, ``index``, ``report``), else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # many programs write a manifest.json; one that is not ours says nothing
    return manifest.get("kind") if isinstance(manifest, dict) else None


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished artifact of this kind.

    Raises:
        ClipkitError: where the folder is missing, unfinished, of another kind, or of a newer version.
    """
    if not folder.is_dir():
        raise ClipkitError(f"no such folder: {folder}")
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            plan = read_json(folder / PLAN)
            raise ClipkitError(
                f"{folder} holds unfinished {plan.get('kind')}; run the command that makes it again to complete it"
            )
        raise ClipkitError(f"{folder} is no clipkit artifact: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != kind:
        raise ClipkitError(f"{folder} holds {manifest.get('kind')}, but {kind} is needed here")
    if manifest.get("version", 0) > VERSION:
        raise ClipkitError(
            f"{folder} was written by a newer clipkit (layout {manifest['version']}, this one reads {VERSION}); update"
        )
    return manifest


def relative_to_artifact(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, so that both can be moved together."""
    return os.path.relpath(path.resolve(), folder.resolve())


def write_ledger(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write ``ledger.jsonl``, one line per input that was left out; no file where there is none."""
    if lines:
        with atomic_write(folder / "ledger.jsonl", "w") as handle:
            handle.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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
        identity = digest({"kind": kind, "version": VERSION, "made_from": made_from})
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
                plan = {"kind": kind, "version": VERSION, "identity": identity, "made_from": made_from}
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
        self.folder = beside(real, self.identity)
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
        manifest = {"kind": self.kind, "version": VERSION, **facts, "made_from": self.made_from}
        manifest["identity"] = self.identity
        for scratch in self.folder.rglob(".*.tmp"):  # what a kill in the middle of a write left behind
            scratch.unlink()
        with one_at_a_time(self.place):
            write_json(self.folder / MANIFEST, manifest)
            self._end()
        if self._committing is not None:
            self._committing.release()
        return manifest


def state_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """``empty``, ``unfinished`` or ``finished``, and the plan or the manifest that says what of.

    Raises:
        ClipkitError: where it is a file, or holds something that is no artifact.
    """
    if folder.is_file():
        raise ClipkitError(f"{folder} is a file; name a folder for the output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return "empty", {}
    if kind_of(folder):
        return "finished", read_json(folder / MANIFEST)
    if (folder / PLAN).is_file():
        return "unfinished", read_json(folder / PLAN)
    # A kill before the plan was written leaves a .work/ alone; that much is ours, and nothing in it counts.
    if {p.name for p in folder.iterdir()} == {WORK}:
        return "empty", {}
    raise ClipkitError(f"{folder} is not empty and holds no clipkit artifact; name another output folder")


def _inode(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
