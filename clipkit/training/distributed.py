"""The processes of a training run: where each computes, what is divided among them, and what they agree on.

accelerate joins the processes, places the model and averages gradients (DDP). Dividing weights, gradients and
optimizer (FSDP2) is torch's own `fully_shard`: accelerate offers it on accelerators only, and what cannot run on a CPU
cannot be tested on one.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clipkit.core import ClipkitError, fast_bf16, launched, pick_device
from clipkit.models import DualEncoder
from clipkit.training.recipe import flat
from clipkit.training.settings import TrainConfig

__all__ = ["Distributed", "full_tensor", "set_seed"]


Value = TypeVar("Value")


@contextmanager
def _own_gpu_counted_as_first() -> Iterator[None]:
    """Where each process was given a GPU of its own to see, let accelerate, which counts them all, take that one.

    It reads LOCAL_RANK from the environment while it joins the processes; afterwards the variable is what it was.
    """
    before = os.environ.get("LOCAL_RANK")
    one_each = launched() and torch.cuda.device_count() == 1
    if one_each:
        os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if one_each and before is None:
            del os.environ["LOCAL_RANK"]
        elif one_each and before is not None:
            os.environ["LOCAL_RANK"] = before


class Distributed:
    """This process among all that train together; with one process everything here is the identity.

    Args:
        config: precision, sharding, trackers.
        folder: of the run, where TensorBoard's files go.

    Raises:
        ClipkitError: where the processes did not find each other, or a tracker is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path):
        trackers: list[Any] = [*config.log.trackers]
        missing = [name for name in trackers if find_spec(name) is None]
        if missing:
            raise ClipkitError(f"log.trackers: not installed; pip install {' '.join(missing)}")
        # accelerate joins the ranks of a CPU launch only when it is told that the CPU is meant.
        cpu = os.environ.get("ACCELERATE_USE_CPU") == "1" or pick_device().type == "cpu"
        with _own_gpu_counted_as_first():
            # Ranks wait for what one does alone: a checkpoint on its way to a slow disk, a shard that does not come.
            state = PartialState(cpu=cpu, timeout=timedelta(seconds=max(3600, 4 * config.data.timeout)))
            if state.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
                raise ClipkitError(f"accelerate joined {state.num_processes} of {os.environ['WORLD_SIZE']} processes")
            self.device = torch.device(state.device or "cpu")
            chosen = config.precision
            self.precision = ("bf16" if fast_bf16(self.device) else "fp32") if chosen == "auto" else chosen
            AcceleratorState._reset_state()  # a notebook may train twice, with another precision
            mixed = "bf16" if self.precision == "amp_bf16" else "no"
            self._accelerator = Accelerator(mixed_precision=mixed, log_with=trackers or None, project_dir=str(folder))
        self.rank, self.world_size = state.process_index, state.num_processes
        self.is_main = self.rank == 0
        self.sharded = config.sharding == "full" and self.world_size > 1

    def shard(self, model: DualEncoder) -> None:
        """Divide the model among the ranks, where `sharding` says so; in place, before anything keeps its tensors."""
        if not self.sharded:
            return
        model.to(memory_format=torch.contiguous_format)  # what is cut into rows must lie in rows
        low = torch.bfloat16 if self.precision == "bf16" else None
        # Gradients are summed in fp32: the sum over many ranks would lose the small ones.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        alone = self.unsharded(model)
        for block in _blocks(model):
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy, ignored_params=set(alone))

    def wrap(self, model: DualEncoder) -> Any:
        """The module to call; gradients that its backward pass leaves are the average over the ranks."""
        wrapped: Any = model if self.sharded else self._accelerator.prepare(model)
        if isinstance(wrapped, DistributedDataParallel) and self.precision == "bf16":
            wrapped.register_comm_hook(None, _average_in_fp32)
        return wrapped

    def unsharded(self, model: DualEncoder) -> list[nn.Parameter]:
        """The logit scale and bias: numbers cannot be divided, so under FSDP each rank holds them."""
        return [p for p in (model.logit_scale, model.logit_bias) if p is not None] if self.sharded else []

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average what FSDP does not."""
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    def share(self) -> dict[str, Any]:
        """Which part of each batch is this rank's."""
        return {"rank": self.rank, "world_size": self.world_size}

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is set on any rank. One small message, and the device is waited for."""
        if self.world_size == 1:
            return list(flags)
        flags_anywhere = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags_anywhere, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags_anywhere.tolist()]

    def mean(self, figures: Sequence[float]) -> list[float]:
        """The average over the ranks of each figure."""
        values = torch.tensor(figures, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        return self._accelerator.reduce(values.to(self.device), "mean").tolist()  # type: ignore[union-attr]

    def from_main(self, work: Callable[[], Value]) -> Value:
        """What the work gives on the main rank, told to all, who wait for it: what one does, or only one can answer.

        Raises:
            ClipkitError: on all ranks, where the work raises it.
        """
        result_and_error: list[Any] = [None, None]
        if self.is_main:
            try:
                result_and_error[0] = work()
            except ClipkitError as error:
                result_and_error[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(result_and_error)
        if result_and_error[1] is not None:
            raise ClipkitError(result_and_error[1])
        return result_and_error[0]

    def of_main(self, tensor: Tensor) -> Tensor:
        """The main rank's, on all of them; a copy where there are several."""
        if self.world_size == 1:
            return tensor
        copy = tensor.clone()
        dist.broadcast(copy, 0)
        return copy

    def wait(self) -> None:
        """Until every rank is here."""
        self._accelerator.wait_for_everyone()

    def track(self, config: TrainConfig) -> None:
        """Start the trackers, with the run's settings as plain values under dotted names."""
        plain = {k: v for k, v in flat(config).items() if isinstance(v, (int, float, str, bool))}
        self._accelerator.init_trackers("clipkit", plain)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Tell the trackers."""
        self._accelerator.log(figures, step=step)

    def end(self) -> None:
        """Finish the trackers and let the other processes go."""
        self._accelerator.end_training()


def _average_in_fp32(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own average would be summed in bf16, where the sum over many ranks loses the small ones."""
    low = bucket.buffer()
    summed = low.float() / dist.get_world_size()
    work: Any = dist.all_reduce(summed, async_op=True)
    return work.get_future().then(lambda done: low.copy_(done.value()[0]))


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided among the ranks, detached; every rank must ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _blocks(model: nn.Module) -> list[nn.Module]:
    # Transformer blocks stand in module lists in every library that towers come from (timm: in `blocks`). Each is
    # gathered as it is needed and let go after; what is left over belongs to the whole model.
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) or name.endswith(".blocks")]
    return [block for modules in lists for block in modules.children() if any(True for _ in block.parameters())]
