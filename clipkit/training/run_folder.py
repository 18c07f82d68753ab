"""A training run's folder: who may write into it, its ledgers, its finished model."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.core import ClipkitError, atomic_write, read_json, write_json
from clipkit.models import DualEncoder
from clipkit.storage import (
    LAYOUT_VERSION,
    MODEL_FOLDER,
    WORK,
    digest,
    hold,
    kind_of,
    refuse_own_input,
    remove_folder,
    write_ledger,
)
from clipkit.training.recipe import changed_keys, dump_yaml, load_config
from clipkit.training.settings import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Run", "refuse_too_many"]

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"


class Run:
    """A run folder, opened for training. Only the main process writes."""

    def __init__(self, folder: Path, config: TrainConfig, is_main: bool):
        self.folder = folder
        self.config = config
        self.is_main = is_main
        self.metrics_path = folder / "metrics.jsonl"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Look at what stands in the folder, without touching it.

        Raises:
            ClipkitError: where something else stands there, a run stands there and neither `resume` nor `overwrite`
                says what to do with it, or a setting changed that a resumption may not change (named).
        """
        folder = self.folder
        if folder.is_file():
            raise ClipkitError(f"{folder} is a file; name a folder for the run")
        occupied = folder.is_dir() and any(folder.iterdir())
        # A kill before config.yaml was written leaves nothing but these; that much is ours.
        begun = occupied and {p.name for p in folder.iterdir()} <= {".lock", "metrics.jsonl"}
        if occupied and not self._stands and not begun:
            what = f"holds {kind_of(folder)}" if kind_of(folder) else "is not empty and holds no run"
            raise ClipkitError(f"{folder} {what}; name another folder")
        if resume and overwrite:
            raise ClipkitError("--resume goes on with the run, --overwrite removes it; choose one")
        if overwrite and isinstance(self.config.model, str):
            refuse_own_input(folder, [self.config.model.partition("@")[0]])
        if self._stands and resume:
            self._check_unchanged()
        elif self._stands and not overwrite:
            raise ClipkitError(
                f"{folder} already holds a run; add --resume to go on with it, or --overwrite to replace it"
            )

    def begin(self, *, resume: bool) -> None:
        """Lock the folder for this process and make it ready to be written: an old run goes unless it is resumed.

        Raises:
            ClipkitError: where another process trains in it, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.folder, "trains in")
            if self._stands and not resume:
                self._lock.release()
                remove_folder(self.folder)
                self.folder.mkdir()
                self._lock = hold(self.folder, "trains in")
            self.metrics_path.touch()
        except OSError as error:
            raise ClipkitError(f"cannot make {self.folder}: {error.strerror or error}") from error
        with atomic_write(self.folder / CONFIG_FILE, "w") as handle:
            handle.write(dump_yaml(self.config))

    def pin_plan(self, excluded: list[list[int]], left_out: Sequence[dict[str, Any]]) -> None:
        """Keep what this run leaves out of its data from the start, and begin the ledger with it."""
        write_ledger(self.folder, left_out)
        write_json(self.folder / PLAN_FILE, {"excluded": excluded})

    @property
    def excluded(self) -> list[list[int]] | None:
        """What `pin_plan` kept; None for a run that has not come that far."""
        path = self.folder / PLAN_FILE
        return read_json(path)["excluded"] if path.is_file() else None

    @property
    def _stands(self) -> bool:
        return (self.folder / CONFIG_FILE).is_file() and self.metrics_path.is_file()

    def _check_unchanged(self) -> None:
        changed = changed_keys(load_config(self.folder / CONFIG_FILE), self.config)
        if changed:
            raise ClipkitError(
                f"{self.folder} was started with other settings: {', '.join(changed)}; "
                "keep them to resume, or start a new run with --init-from"
            )

    def check_data(self, before: Any, now: Any) -> None:
        """Refuse to go on with other samples than a checkpoint was trained on.

        Raises:
            ClipkitError: where the identities of the training data differ.
        """
        if before != now:
            raise ClipkitError(
                f"data.train holds other samples than {self.folder} was trained on, or mixes them otherwise; "
                "use --init-from to go on"
            )

    @property
    def finished_steps(self) -> int:
        """Where a finished run ended; 0 for one that is not."""
        path = self.folder / "manifest.json"
        return read_json(path)["counts"]["steps"] if path.is_file() else 0

    def last_loss(self) -> float:
        """The loss that was reported last; NaN where none was."""
        lines = [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]
        return next((line["loss"] for line in reversed(lines) if line.get("loss") is not None), float("nan"))

    def rewind(self, step: int, position: int) -> None:
        """Drop what was written of steps that will be done again, so that each step stands there once.

        Args:
            step: how many are done.
            position: of the sequence of samples, where the run goes on.
        """
        self._keep(self.metrics_path, lambda line: line["step"] <= step)
        for path in (self._ledger, self._nonfinite):
            self._keep(path, lambda line: line.get("position", -1) < position)

    def _keep(self, path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line without its end was being written when the run was killed.
            kept = [line for line in lines if line.endswith("\n") and wanted(json.loads(line))]
            with atomic_write(path, "w") as handle:
                handle.writelines(kept)

    @property
    def _ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def add_to_ledger(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add unusable samples to ``ledger.jsonl``. Every rank adds its own; short appends do not tear."""
        if lines:
            with self._ledger.open("a", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    @property
    def _nonfinite(self) -> Path:
        return self.folder / "nonfinite.jsonl"

    def add_nonfinite(self, samples: Sequence[tuple[str, str]], **about: int) -> None:
        """Name the samples (shard, key) of a step whose loss or gradient is not finite, as far as this rank knows."""
        if samples:
            named = [{"shard": shard, "key": key} for shard, key in samples]
            with self._nonfinite.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({**about, "samples": named}, ensure_ascii=False) + "\n")

    @property
    def left_out(self) -> int:
        """How many unusable samples all ranks have met so far."""
        if not self._ledger.is_file():
            return 0
        with self._ledger.open("rb") as handle:
            return sum(1 for _ in handle)

    def finish(
        self, model: DualEncoder, state: dict[str, Any], weights: "Mapping[str, Tensor] | None" = None
    ) -> dict[str, Any]:
        """Write ``model/`` and then the manifest: from here on the run is whole. Returns the manifest.

        Args:
            model: as trained.
            state: with ``step`` and ``samples``.
            weights: what to write instead of the model's own (`DualEncoder.save`): the average, or fp32 masters.

        Raises:
            ClipkitError: where the model cannot be written.
        """
        scratch = self.folder / WORK / MODEL_FOLDER
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            model.save(scratch, weights)
        except OSError as error:
            raise ClipkitError(f"cannot write {self.folder / MODEL_FOLDER}: {error.strerror or error}") from error
        (self.folder / "manifest.json").unlink(missing_ok=True)  # of a shorter run that was gone on with
        shutil.rmtree(self.folder / MODEL_FOLDER, ignore_errors=True)
        scratch.replace(self.folder / MODEL_FOLDER)
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        settings = self.config.model_dump(mode="json")
        manifest = {
            "kind": "run",
            "version": LAYOUT_VERSION,
            "model": {
                "fingerprint": read_json(self.folder / MODEL_FOLDER / "clipkit.json")["fingerprint"],
                "path": MODEL_FOLDER,
            },
            "counts": {"steps": state["step"], "samples": state["samples"], "left_out": self.left_out},
            "made_from": {"config": digest(settings), "train": settings["data"]["train"]},
        }
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def refuse_too_many(bad: float, samples: int, share: float, run: Path) -> None:
    """Stop a run whose data is worse than its settings allow. Below 1,000 samples the share says too little.

    Raises:
        ClipkitError: where more than `share` of the samples could not be used.
    """
    if bad > share * max(samples, 1000):
        raise ClipkitError(
            f"{bad:,.0f} of {samples:,} samples could not be used, more than data.max_bad_share={share:g} allows; "
            f"they are listed in {run / 'ledger.jsonl'}; clipkit check tells what is wrong with the shards"
        )
