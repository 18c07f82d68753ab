"""The manifest of an artifact: written last, so that a folder which has one is whole.

A folder with a plan in ``.work/`` is unfinished and can be completed by running the same stage again (see
`clipkit.storage.stage`); anything else is not ours to touch.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, atomic_write, read_json
from clipkit.storage.folder_swap import PLAN

__all__ = [
    "LAYOUT_VERSION",
    "MODEL_FOLDER",
    "WORK",
    "kind_of",
    "read_manifest",
    "relative_to_artifact",
    "state_of",
    "write_ledger",
]

LAYOUT_VERSION = 1  # of the layout of every kind; a reader refuses what is newer than itself
MANIFEST = "manifest.json"
MODEL_FOLDER = "model"  # of a run and of a checkpoint: the weights with all that is needed to use them
WORK = str(PLAN.parent)


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
    if manifest.get("version", 0) > LAYOUT_VERSION:
        raise ClipkitError(
            f"{folder} was written by a newer clipkit (layout {manifest['version']}, this one reads {LAYOUT_VERSION}); "
            "update"
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
