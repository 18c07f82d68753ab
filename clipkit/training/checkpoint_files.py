"""Checkpoints as folders: their names, whether they are whole, which of them is the best, which of them stay.

``RUN/checkpoints/step-000420/`` is written under a hidden name, sealed and renamed, so what can be seen was whole once.
Sealing writes ``state.json`` with the size and hash of every other file, so that damage that came later is found before
anything is loaded. The hashes cost a background thread a second per gigabyte.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, read_json, sync_folder, warn, write_json
from clipkit.models import STATE, best_checkpoint, checkpoint_name, checkpoints, step_of
from clipkit.storage import digest, remove_folder

__all__ = ["checkpoint_flaw", "clear_scratch", "newest_usable", "prune", "publish", "scratch_folder", "seal"]


def scratch_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it is published."""
    return run / "checkpoints" / f".{checkpoint_name(step)}"


def clear_scratch(run: Path) -> None:
    """Remove what a kill in the middle of writing or removing a checkpoint left behind."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def seal(scratch: Path, state: dict[str, Any], best: dict[str, Any] | None = None) -> None:
    """Bring every file of the folder to the disk, and write ``state.json`` with their sizes and hashes, last of all.

    Args:
        scratch: the checkpoint, written but for this.
        state: JSON-able, for whoever resumes.
        best: ``{"score": 0.5}`` where this is the best checkpoint so far.

    Raises:
        OSError, ClipkitError: where the disk is full or refuses.
    """
    files = {}
    for path in sorted(p for p in scratch.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            files[str(path.relative_to(scratch))] = {"bytes": path.stat().st_size, "blake2b": _hash(handle)}
            os.fsync(handle.fileno())
    # As it will be read back: keys become strings, tuples lists.
    content = json.loads(json.dumps({"state": state, "best": best, "files": files}))
    write_json(scratch / STATE, {**content, "digest": digest(content)})
    for folder in (*(p for p in scratch.rglob("*") if p.is_dir()), scratch):
        sync_folder(folder)


def publish(scratch: Path) -> Path:
    """Move a sealed checkpoint to its name. One of the same step that stands there goes aside first."""
    final = scratch.with_name(scratch.name.removeprefix("."))
    aside = scratch.with_name(f"{scratch.name}.old")
    if final.exists():
        final.replace(aside)
    scratch.replace(final)
    sync_folder(final.parent)
    if aside.exists():
        shutil.rmtree(aside)
    return final


def prune(run: Path, keep: int, newest: int) -> None:
    """Remove all checkpoints but the last `keep` and the best one.

    Those of later steps than `newest`, which was written just now, go too: the run went back behind them, and left
    standing they would be taken for its latest state.
    """
    present = [folder for folder in checkpoints(run) if step_of(folder) <= newest]
    best = best_checkpoint(run, until=newest)
    kept = {*present[-keep:], *([best[0]] if best else [])}
    for folder in checkpoints(run):
        if folder not in kept:
            remove_folder(folder)


def checkpoint_flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, beginning with the file's path; None where it is whole.

    Reads all of it: a second per gigabyte.
    """
    path = folder / STATE
    try:
        content = read_json(path)
        sealed = content.pop("digest")
        files = {name: (entry["bytes"], entry["blake2b"]) for name, entry in content["files"].items()}
    except ClipkitError as error:
        return str(error)
    except (AttributeError, KeyError, TypeError):
        return f"{path} is no checkpoint's state"
    if digest(content) != sealed:
        return f"{path} was altered"
    for name, (size, written) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes, but {size:,} were written"
            with path.open("rb") as handle:
                if _hash(handle) != written:
                    return f"{path} was altered"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"cannot read {path}: {error.strerror or error}"
    return None


def newest_usable(run: Path) -> Path | None:
    """The newest checkpoint that is whole, or None. Each one that is not is named in a warning, and none is removed."""
    present = checkpoints(run)
    while present:
        folder = present.pop()
        problem = checkpoint_flaw(folder)
        if problem is None:
            return folder
        warn(f"{problem}; {f'trying {present[-1].name} instead' if present else f'{run} has no other checkpoint'}")
    return None


def _hash(handle: Any) -> str:
    return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
