"""Artifact folders: a manifest that is written last, parts that are claimed and committed one by one.

While a stage works, its folder holds ``.work/``: ``plan.json`` (what is being made, from what), a lock per part,
and a record per finished part. Files are written under a hidden name and moved into place whole, then the part's
record is written, ``manifest.json`` comes after all parts, and ``.work/`` goes last. So a folder with a manifest is
whole, a folder with a plan can be completed by running the same stage again, and anything else is not ours to touch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from clipkit.errors import ClipkitError

__all__ = [
    "MODEL_FOLDER",
    "VERSION",
    "WORK",
    "Stage",
    "atomic_write",
    "digest",
    "hold",
    "kind_of",
    "read_json",
    "read_manifest",
    "refuse_own_input",
    "relative_to_artifact",
    "remove_folder",
    "write_json",
    "write_ledger",
]

VERSION = 1  # of the layout of every kind; a reader refuses what is newer than itself
MANIFEST = "manifest.json"
MODEL_FOLDER = "model"  # of a run and of a checkpoint: the weights with all that is needed to use them
WORK = ".work"


def digest(value: Any) -> str:
    """A short hash of any JSON-able value, the same for equal values on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file beside `path` and move it there when the block ends well; on any error nothing is left.

    The data is flushed to the disk before the rename, so a power cut leaves the old file or the new one.
    """
    # Threads, and processes of several machines on one disk, may write the same file at once.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with scratch.open(mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        scratch.replace(path)
    except OSError as error:
        raise ClipkitError(f"cannot write {path}: {error.strerror or error}; nothing of it was kept") from error
    finally:
        with contextlib.suppress(NotADirectoryError):
            scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    with atomic_write(path, "w") as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ClipkitError: where it is missing, unreadable or cut.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClipkitError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ClipkitError(f"{path} is not valid JSON ({error}); it was cut or edited") from error


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
        if (folder / WORK / "plan.json").is_file():
            plan = read_json(folder / WORK / "plan.json")
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


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill in the middle leaves nothing under its name: it is renamed first."""
    real = folder.resolve()
    aside = real.with_name(f".{real.name}.removed.{os.getpid()}")
    try:
        real.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise ClipkitError(f"cannot remove {folder}: {error.strerror or error}") from error


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


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time look at a folder and begin it; the lock is on its parent, so that no file is left."""
    try:
        folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise ClipkitError(f"cannot make {folder}: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Stage:
    """One artifact being made: opened over an empty, unfinished or finished folder.

    Args:
        folder: where the artifact goes.
        kind: what it is.
        made_from: JSON-able description of everything the content depends on; the same description on an
            unfinished folder continues it, on a finished one does nothing (`done` is true).
        inputs: what the stage reads; none of it may lie in `folder`, where `overwrite` would remove it.
        overwrite: remove an artifact of other content or kind first. A folder that is no artifact is never removed.

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
    ):
        refuse_own_input(folder, inputs)
        self.folder = folder
        self.kind = kind
        self.made_from = made_from
        self.work = folder / WORK
        identity = digest({"kind": kind, "version": VERSION, "made_from": made_from})
        self.identity = identity
        self.done = False
        with _one_at_a_time(folder):
            self._clear_the_way(identity, overwrite)
            if not self.done:
                try:
                    (self.work / "parts").mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ClipkitError(f"cannot make {folder}: {error.strerror or error}") from error
                plan = {"kind": kind, "version": VERSION, "identity": identity, "made_from": made_from}
                if not (self.work / "plan.json").is_file():
                    write_json(self.work / "plan.json", plan)

    def _clear_the_way(self, identity: str, overwrite: bool) -> None:
        if self.folder.is_file():
            raise ClipkitError(f"{self.folder} is a file; name a folder for the output")
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        if kind_of(self.folder):
            present, state = read_json(self.folder / MANIFEST), "finished"
        elif (self.work / "plan.json").is_file():
            present, state = read_json(self.work / "plan.json"), "unfinished"
        else:
            # A kill before the plan was written leaves a .work/ alone; that much is ours, and nothing in it counts.
            if {p.name for p in self.folder.iterdir()} == {WORK}:
                shutil.rmtree(self.work)
                return
            raise ClipkitError(f"{self.folder} is not empty and holds no clipkit artifact; name another output folder")
        if present.get("identity") == identity and not (overwrite and state == "finished"):
            self.done = state == "finished"
            if self.done:
                shutil.rmtree(self.work, ignore_errors=True)  # a kill after the manifest left it behind
            return
        if not overwrite:
            what = f"{self.folder} already holds {state} {present.get('kind')}"
            why = "" if present.get("kind") != self.kind else " made from other input or settings"
            raise ClipkitError(f"{what}{why}; name another output folder, or add --overwrite to replace it")
        remove_folder(self.folder)

    def pending(self, names: Sequence[str]) -> Iterator[str]:
        """Claim, one after another, the parts that nobody has finished; yields while holding the part's lock.

        Several processes may iterate at once: each part goes to one of them, and a lock dies with its process. Who has
        nothing left to claim waits for the others, and takes over the part of one that died.
        """
        left = list(names)
        while left and not (self.folder / MANIFEST).is_file():
            for name in list(left):
                if self._record(name).is_file():
                    left.remove(name)
                    continue
                if not self.work.is_dir():
                    return  # another process has committed meanwhile; `records` tells if it has not
                try:
                    with FileLock(self.work / f"{name}.lock").acquire(timeout=0):
                        if not self._record(name).is_file() and not (self.folder / MANIFEST).is_file():
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
        """
        self._committing = FileLock(self.work / "commit.lock")
        # Whoever commits removes the folder of locks under those who wait for one.
        with contextlib.suppress(FileNotFoundError):
            self._committing.acquire()
        if (self.folder / MANIFEST).is_file():
            self._committing.release()
            shutil.rmtree(self.work, ignore_errors=True)
            return None
        return [read_json(self._record(name)) for name in names]

    def _record(self, name: str) -> Path:
        return self.work / "parts" / f"{name}.json"

    def commit(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: from here on the artifact is whole. Returns it."""
        manifest = {"kind": self.kind, "version": VERSION, **facts, "made_from": self.made_from}
        manifest["identity"] = self.identity
        for scratch in self.folder.rglob(".*.tmp"):  # what a kill in the middle of a write left behind
            scratch.unlink()
        write_json(self.folder / MANIFEST, manifest)
        shutil.rmtree(self.work, ignore_errors=True)
        self.done = True
        return manifest
