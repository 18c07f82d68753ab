"""What learns in a training run: the towers, their fp32 weights and average, and the optimizers over them."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.core import keep_freed_memory
from clipkit.models import DualEncoder, TowersConfig
from clipkit.training.checkpoint import Snapshot, TrainedTensors, load_checkpoint, take_snapshot
from clipkit.training.distributed import Distributed, full_tensor
from clipkit.training.gradient import Gradient, Objective, clip_gradients, compute_gradient
from clipkit.training.master_weights import Weights
from clipkit.training.optim import make_optimizers, set_rate
from clipkit.training.settings import TrainConfig

__all__ = ["Learner", "prepare_towers"]


def prepare_towers(model: DualEncoder, config: TowersConfig) -> None:
    """Lock what is to stay as it is, and choose what the backward pass computes again.

    Raises:
        ClipkitError: where a tower cannot.
    """
    if config.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    if config.image.lock:
        model.lock("image", config.image.unlocked_layers)
    if config.text.lock:
        model.lock("text", config.text.unlocked_layers)


class Learner:
    """A model made ready to be trained: placed, divided or copied over the ranks, in its precision.

    Args:
        model: fp32, on the CPU, prepared (`prepare_towers`); changed in place.
        config: of the run.
        distributed: the processes that train it together.
    """

    def __init__(self, model: DualEncoder, config: TrainConfig, distributed: Distributed):
        self.config, self.distributed = config, distributed
        if distributed.device.type == "cpu":
            keep_freed_memory()
        self.shape = copy.deepcopy(model).eval()  # whole, fp32, on the CPU: what is evaluated and saved looks like it
        self.model = model.to(distributed.device).train()
        distributed.shard(model)
        bf16 = distributed.precision == "bf16" and not distributed.sharded  # FSDP2 casts by itself
        self.weights = Weights(model, bf16=bf16, ema=config.optim.ema)
        if config.compile:
            if config.micro_batch is not None:
                # The two passes over a micro-batch are compiled apart, and must drop out the same all the same.
                torch._inductor.config.fallback_random = True
            model.compile()
        self._forward = distributed.wrap(model)
        self._parameters = dict(self.weights.named_parameters())
        decay = {"image": config.towers.image.layer_decay, "text": config.towers.text.layer_decay}
        self.optimizers = make_optimizers(
            self._parameters.items(), config.optim, model.layer_depths(), decay, distributed.device
        )
        self._statistics = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
        self._statistics_before: list[Tensor] = []
        self._names = {id(tensor): name for name, tensor in self._parameters.items()}

    def gradient(self, pixels: Tensor, tokens: Tensor, objective: Objective) -> tuple[Gradient, Tensor]:
        """The gradient of a batch's loss, averaged over the ranks and clipped, and its norm before."""
        self.weights.zero_grad()
        self._statistics_before = [tensor.clone() for tensor in self._statistics]
        gradient = compute_gradient(
            self._forward,
            pixels,
            tokens,
            objective,
            micro_batch=self.config.micro_batch,
            collect=self.weights.collect_gradients,
        )
        self.distributed.average_gradients(self.distributed.unsharded(self.model))
        return gradient, clip_gradients(self._parameters.values(), self.config.optim.clip_grad_norm)

    @torch.no_grad()
    def skip(self) -> None:
        """Forget the gradient, and what the batch did to running statistics: it may not be finite."""
        for tensor, before in zip(self._statistics, self._statistics_before, strict=True):
            tensor.copy_(before)

    @torch.no_grad()
    def step(self, rate: float, number: int) -> None:
        """Follow the gradient.

        Args:
            rate: the learning rate.
            number: how many steps have been taken with this one.
        """
        set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.logit_scale.clamp_(0, math.log(self.config.loss.max_logit_scale))
        self.weights.publish()
        self.weights.update_average(number)

    def bad_rows(self, gradient: Gradient) -> list[int]:
        """This rank's rows of a step that could not be taken that are to blame; every rank must ask.

        Where all embeddings of all ranks are finite, nobody knows better than that it was this batch: all of them.
        """
        rows = gradient.bad_rows()
        return rows if self.distributed.any([bool(rows)])[0] else list(range(len(gradient.image)))

    def scale(self) -> float:
        """The factor on the similarities. The device is waited for."""
        return float(self.model.logit_scale.detach().exp())

    def snapshot(self, state: dict[str, Any], spare: Snapshot | None = None) -> Snapshot | None:
        """A copy of everything that a run goes on from, on the main rank; every rank must ask.

        Args:
            state: kept with it, JSON-able.
            spare: an old one to write over, which saves finding the memory anew.
        """
        return take_snapshot(self._trained(), state, is_main=self.distributed.is_main, spare=spare)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go back to a checkpoint; returns the state that was saved with it.

        Raises:
            ClipkitError: where it is broken.
        """
        state = load_checkpoint(folder, self._trained(), self.distributed.rank)
        self.weights.publish()
        return state

    def _trained(self) -> TrainedTensors:
        weights = self.weights
        return TrainedTensors(weights.named_tensors(), self.optimizers, self._names, weights.named_average())

    def final_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the run publishes: the average where one is kept, else the weights; whole, every rank must ask."""
        buffers = dict(self.model.named_buffers())
        for name, tensor in self.weights.named_average() or self.weights.named_tensors():
            value = full_tensor(tensor)
            if name in buffers:
                value = self.distributed.of_main(value)  # running statistics are each rank's own
            yield name, value

    def final_model(self) -> DualEncoder:
        """A model of its own with the `final_tensors`, fp32, on the device."""
        model = copy.deepcopy(self.shape)
        model.load_state_dict(dict(self.final_tensors()))
        return model.to(self.distributed.device)
