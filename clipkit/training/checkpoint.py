"""Checkpoints of a training run: taken in a moment, written in the background, complete or absent, never a pickle.

``checkpoints/step-000420/`` holds

- ``model/``, usable by itself: the average's weights where the run keeps one, else the trained ones;
- ``weights.safetensors``, the trained ones, only where ``model/`` has the average;
- ``optimizer.safetensors``, its tensors under ``PARAMETER:KEY``;
- ``rng-00.safetensors`` … for each rank, the states of its random generators;
- ``state.json``, what the job wants back, and sizes and hashes of the files (`clipkit.training.checkpoint_files`).

Every tensor is whole, however many ranks shared it, so a run may go on with other ranks or another sharding.
"""

import copy
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from clipkit.core import ClipkitError, read_json, warn
from clipkit.models import BACKBONE, STATE, DualEncoder, checkpoints
from clipkit.storage import MODEL_FOLDER
from clipkit.training.checkpoint_files import clear_scratch, prune, publish, scratch_folder, seal

__all__ = ["Saver", "Snapshot", "TrainedTensors", "checkpoint_bytes", "load_checkpoint", "take_snapshot"]

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class Snapshot:
    """A run at one step: whole tensors on the CPU that nobody else writes to."""

    step: int
    weights: dict[str, Tensor]
    """As trained, by the names of the model's `state_dict`, all of them."""
    average: dict[str, Tensor] | None
    """Under the same names, where the run keeps a moving average."""
    optimizer: dict[str, Tensor]
    """By ``PARAMETER:KEY``."""
    rng: list[dict[str, Tensor]]
    """Of every rank: ``cpu`` and perhaps ``cuda``, uint8."""
    state: dict[str, Any]
    """JSON-able: step, samples, what the data are, ..."""

    @property
    def nbytes(self) -> int:
        """Of all tensors: what it takes on disk, but for the tokenizer and a few kilobytes."""
        parts = (self.weights, self.average or {}, self.optimizer, *self.rng)
        return sum(tensor.nbytes for part in parts for tensor in part.values())


@dataclass(frozen=True)
class TrainedTensors:
    """The tensors that a checkpoint is made of, or that are filled from one; the same names on every rank."""

    weights: Iterable[tuple[str, Tensor]]
    """Trained ones by the names of the model's ``state_dict()``, all of them; fp32 masters where the towers compute in
    less."""
    optimizers: Sequence[Optimizer]
    names: Mapping[int, str]
    """Of the optimizers' parameters, by ``id(parameter)``."""
    average: Iterable[tuple[str, Tensor]] | None = None
    """The moving average, under the names of the weights."""


def take_snapshot(
    trained: TrainedTensors, state: dict[str, Any], *, is_main: bool, spare: Snapshot | None = None
) -> Snapshot | None:
    """Copy everything that a checkpoint holds to the memory of the main rank; the run may go on at once.

    Every rank calls it, with the same names in the same order: where tensors are sharded (DTensor, as FSDP2 makes
    them), each is gathered from all ranks, one after another. It takes as long as the copy from the device.

    Args:
        trained: after a step of the optimizers, or before the first.
        state: JSON-able, with ``step``, the number of steps done; copied.
        is_main: whether this is rank 0.
        spare: an old snapshot whose memory may be overwritten (`Saver.spare`); fresh memory must first be found by the
            kernel, page by page, which takes several times as long as the copy.

    Returns:
        The snapshot on the main rank, None on the others.
    """
    old = spare or Snapshot(0, {}, {}, {}, [], {})
    weights = {name: _whole(tensor, is_main, old.weights.get(name)) for name, tensor in trained.weights}
    average = None
    if trained.average is not None:
        average = {name: _whole(tensor, is_main, (old.average or {}).get(name)) for name, tensor in trained.average}
    moments = {}
    for optimizer in trained.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                entry = f"{trained.names[id(parameter)]}:{key}"
                if isinstance(value, Tensor):
                    moments[entry] = _whole(value, is_main, old.optimizer.get(entry))
                elif value is not None:
                    raise TypeError(f"{entry} in the state of {type(optimizer).__name__} is no tensor")
    rng = _gather_generators(is_main)
    if not is_main:
        return None
    return Snapshot(state["step"], weights, average, moments, rng, copy.deepcopy(state))


def _whole(tensor: Tensor, wanted: bool, spare: Tensor | None) -> Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()  # all ranks take part, also those that do not want it
    if not wanted:
        return tensor.new_empty(0)
    if spare is None or (spare.shape, spare.dtype) != (tensor.shape, tensor.dtype):
        spare = torch.empty(tensor.shape, dtype=tensor.dtype)
    return spare.copy_(tensor)  # contiguous, as safetensors needs it, whatever the tensor's own layout is


def _gather_generators(is_main: bool) -> list[dict[str, Tensor]]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [states]
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_main else None
    dist.gather_object(states, gathered)
    return gathered or []


class Saver:
    """Writes snapshots in one background thread, one at a time; on the main rank only.

    A checkpoint that cannot be written (full disk, quota, permissions) is one warning: what was written of it is
    removed, the last good one stays, and the run goes on and tries again at the next time.

    Args:
        run: the run folder.
        model: whose weights they are; its tensors are never looked at.
        keep: how many of the last checkpoints stay, beside the best one.
    """

    def __init__(self, run: Path, model: DualEncoder, *, keep: int):
        self.run = run
        self.keep = keep
        self.failed: str | None = None
        """What became of the last snapshot: None where it is on disk or still being written, else why it is not."""
        self._model = model
        self._names = set(model.state_dict())
        _ = model.tokenizer_state  # made here, so that the writer does not halt the run for it
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: Future[None] | None = None
        self._spare: Snapshot | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()  # an error of the run does not take the checkpoint that is being written with it

    def spare(self) -> Snapshot | None:
        """The last snapshot that was done with, for `take_snapshot` to overwrite; None where there is none yet."""
        spare, self._spare = self._spare, None
        return spare

    def save(self, snapshot: Snapshot, *, best: bool = False, score: float | None = None) -> None:
        """Begin to write a snapshot, and return. Waits for the one before, so that at most two are in memory.

        Args:
            snapshot: given away: nobody may change it any more.
            best: whether ``RUN@best`` is this one from now on; it stays until another is better.
            score: the figure that says so; kept with it.
        """
        for weights in (snapshot.weights, snapshot.average):
            if weights is not None and set(weights) != self._names:
                raise ValueError(f"the snapshot has other weights: {sorted(set(weights) ^ self._names)[:3]}")
        self.wait()
        self.failed = None
        self._begun = self._writer.submit(self._write, snapshot, {"score": score} if best else None)

    def wait(self, *, final: bool = False) -> None:
        """Wait until what was begun is on disk.

        Args:
            final: the run ends here.

        Raises:
            ClipkitError: where `final` and the last snapshot could not be written.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()
        if final and self.failed is not None:
            raise ClipkitError(f"{self.failed}; make room and go on with --resume")

    def _write(self, snapshot: Snapshot, best: dict[str, Any] | None) -> None:
        scratch = scratch_folder(self.run, snapshot.step)
        try:
            try:
                clear_scratch(self.run)
                scratch.mkdir(parents=True)
                _refuse_full_disk(scratch, snapshot.nbytes)
                _write_files(scratch, snapshot, self._model)
                seal(scratch, snapshot.state, best)
                publish(scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                self._spare = snapshot
        except (OSError, SafetensorError, ClipkitError) as error:
            self.failed = f"the checkpoint of step {snapshot.step:,} in {self.run} cannot be written ({_reason(error)})"
            last = next((folder.name for folder in reversed(checkpoints(self.run))), "no checkpoint")
            warn(f"{self.failed}; {last} is there, and the run goes on")
            return
        try:
            prune(self.run, self.keep, snapshot.step)
        except ClipkitError as error:
            warn(str(error))


def _write_files(scratch: Path, snapshot: Snapshot, model: DualEncoder) -> None:
    model.save(scratch / MODEL_FOLDER, snapshot.weights if snapshot.average is None else snapshot.average)
    if snapshot.average is not None:
        save_file(snapshot.weights, scratch / WEIGHTS_FILE)
    save_file(snapshot.optimizer, scratch / OPTIMIZER_FILE)
    for rank, states in enumerate(snapshot.rng):
        save_file(states, scratch / _rng_name(rank))


def _rng_name(rank: int) -> str:
    return f"rng-{rank:02d}.safetensors"


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ClipkitError(f"it takes {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left")


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # beneath a ClipkitError that names a file of the scratch folder
    number = re.search(r"\(os error (\d+)\)", str(cause))  # how safetensors says it
    if number:
        return os.strerror(int(number[1]))
    return getattr(cause, "strerror", None) or " ".join(str(cause).split())


def load_checkpoint(folder: Path, trained: TrainedTensors, rank: int) -> dict[str, Any]:
    """Put everything back in place: weights, average, the optimizers' state and this rank's random generators.

    Every rank reads the files and keeps its part of what is sharded; nothing is sent between them.

    Args:
        folder: a whole checkpoint (`newest_usable`).
        trained: what is filled. State that the optimizers had is dropped, and an average is filled with the trained
            weights where the run kept none.
        rank: whose generators to set. A rank that the saved run did not have keeps its own.

    Returns:
        The `state` that was saved.

    Raises:
        ClipkitError: where a file is missing or broken, or does not fit the model.
    """
    own = folder / WEIGHTS_FILE
    published = folder / MODEL_FOLDER / "model.safetensors"
    _fill(own if own.is_file() else published, trained.weights)
    if trained.average is not None:
        _fill(published, trained.average)
    owners = {
        trained.names[id(parameter)]: (parameter, optimizer, group)
        for optimizer in trained.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for optimizer in trained.optimizers:
        optimizer.state.clear()
    with _reading(folder / OPTIMIZER_FILE) as file:
        for entry in sorted(file.keys()):
            name, _, key = entry.rpartition(":")
            if name not in owners:
                raise ClipkitError(f"{folder / OPTIMIZER_FILE} has state for {name}, which is not trained here")
            parameter, optimizer, group = owners[name]
            optimizer.state[parameter][key] = _state_of(parameter, group, key, file.get_tensor(entry))
    if (folder / _rng_name(rank)).is_file():
        with _reading(folder / _rng_name(rank)) as file:
            torch.set_rng_state(file.get_tensor("cpu"))
            if "cuda" in set(file.keys()) and torch.cuda.is_available():
                torch.cuda.set_rng_state(file.get_tensor("cuda"))
    return read_json(folder / STATE)["state"]


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ClipkitError(
            f"{path} is broken ({error}); remove its checkpoint to resume from the one before"
        ) from error


def _fill(path: Path, named: Iterable[tuple[str, Tensor]]) -> None:
    with _reading(path) as file:
        known = set(file.keys())
        for name, tensor in named:
            # The model's own file has its library's names.
            key = name if name in known else name.removeprefix(BACKBONE)
            if key not in known:
                raise ClipkitError(f"{path} lacks {name}; it is of another model")
            value = file.get_tensor(key)
            if value.shape != tensor.shape:
                raise ClipkitError(f"{path} has {name} as {list(value.shape)}, the model as {list(tensor.shape)}")
            _put(value, tensor)


@torch.no_grad()
def _put(value: Tensor, into: Tensor) -> None:
    if isinstance(into, DTensor):
        # No rank is asked for the data (src_data_rank=None): each has just read all of it.
        value = distribute_tensor(value, into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(value)


def _state_of(parameter: Tensor, group: dict[str, Any], key: str, value: Tensor) -> Tensor:
    if key == "step":  # a count, on the device only where the optimizer counts there (torch.optim.Optimizer)
        counted_there = group.get("fused") or group.get("capturable")
        return value.to(parameter.device if counted_there else "cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    # Sharded as the parameter is, and in its own memory layout: the fused step walks both as flat memory.
    placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    _put(value, placed)
    return placed


def checkpoint_bytes(model: nn.Module, optimizers: Sequence[Optimizer], *, average: bool) -> int:
    """What one checkpoint will take on disk, before anything was trained.

    Args:
        model: gives the weights; floating-point ones are kept as fp32.
        optimizers: over what is trained; a group with ``betas`` keeps two fp32 values per parameter (AdamW), any other
            one (Muon, momentum).
        average: whether the run keeps a moving average.
    """
    weights = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in model.state_dict().values())
    moments = sum(
        4 * (2 if "betas" in group else 1) * parameter.numel()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return weights * (2 if average else 1) + moments
