"""Where the model is that a name means, without loading it."""

import re
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, did_you_mean
from clipkit.models.checkpoint_folders import best_checkpoint, checkpoint_name, checkpoints
from clipkit.storage import MODEL_FOLDER

__all__ = ["model_folder", "refuse_another", "spec_of"]


def model_folder(spec: str | Path) -> Path | None:
    """The local folder of weights that `spec` names, or None where it names none.

    Raises:
        ClipkitError: where it names a run that has no such checkpoint, or no model yet.
    """
    spec = str(spec)
    run, at, which = spec.rpartition("@")
    if at and Path(run).is_dir():
        return _checkpoint(Path(run), which) / MODEL_FOLDER
    folder = Path(spec)
    if not folder.is_dir():
        return None
    if (folder / MODEL_FOLDER).is_dir():
        return folder / MODEL_FOLDER
    if (folder / "checkpoints").is_dir():
        steps = checkpoints(folder)
        hint = (
            f"use {spec.rstrip('/')}@{steps[-1].name}, or finish it with --resume"
            if steps
            else "finish it with --resume"
        )
        raise ClipkitError(f"{folder} is a run without a finished model; {hint}")
    return folder


def _checkpoint(run: Path, which: str) -> Path:
    number = re.fullmatch(r"step-(\d+)", which)
    chosen = run / "checkpoints" / (checkpoint_name(int(number[1])) if number else which)
    known = [path.name for path in checkpoints(run)]
    has = f"it has {', '.join(known) or 'none'}"
    if which == "best":
        best = best_checkpoint(run)
        if best is None:
            raise ClipkitError(
                f"{run} kept no best checkpoint (validation.best=FIGURE does, such as image_retrieval_recall@1); {has}"
            )
        chosen = best[0]
    elif not (chosen / MODEL_FOLDER).is_dir():
        raise ClipkitError(f"{run} has no checkpoint {which!r}{did_you_mean(which, [*known, 'best'])}; {has}")
    return chosen


def spec_of(manifest: dict[str, Any], artifact: Path, spec: str | None = None) -> str:
    """The name of the model that an artifact was made with.

    Args:
        manifest: of the artifact.
        artifact: its folder; the model's path in the manifest is relative to it.
        spec: what the user names instead.

    Raises:
        ClipkitError: where the model is not where the manifest says.
    """
    if spec is not None:
        return spec
    made_with = manifest["model"]
    place = str(made_with.get("spec") or artifact / made_with["path"])
    if "path" in made_with and not Path(place).is_dir():
        known = made_with["fingerprint"][:12]
        raise ClipkitError(f"the model of {artifact} ({known}) is not at {place} any more; name it with --model")
    return place


def refuse_another(manifest: dict[str, Any], artifact: Path, spec: str, fingerprint: str) -> None:
    """Refuse a model that is not the one that an artifact was made with.

    Raises:
        ClipkitError: naming both fingerprints.
    """
    made_with = manifest["model"]["fingerprint"]
    if fingerprint != made_with:
        raise ClipkitError(
            f"{artifact} was made with model {made_with[:12]}, but {spec} is model {fingerprint[:12]}; "
            "name the right one with --model, or make it again with this one"
        )
