"""The checkpoints of a run by name: which there are, and which of them is the best."""

import re
from pathlib import Path

from clipkit.core import ClipkitError, read_json

__all__ = ["STATE", "best_checkpoint", "checkpoint_name", "checkpoints", "step_of"]

STATE = "state.json"
STEP = re.compile(r"step-(\d{6,})")


def checkpoint_name(step: int) -> str:
    """``step-000420`` for 420."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """420 for ``step-000420``."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def best_checkpoint(run: Path, until: int | None = None) -> tuple[Path, float | None] | None:
    """The checkpoint that ``RUN@best`` names, and its score: the newest of those that were the best when saved.

    Args:
        run: the run folder.
        until: look no further than this step.
    """
    for folder in reversed(checkpoints(run)):
        if until is None or step_of(folder) <= until:
            try:
                best = read_json(folder / STATE)["best"]
            except (ClipkitError, KeyError, TypeError):
                continue  # damaged; `newest_usable` speaks of it
            if best is not None:
                return folder, best["score"]
    return None
