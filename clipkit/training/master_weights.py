"""The weights of a training run: what the optimizer changes, what the towers compute with, and their average.

In bf16 a weight moves by at least 1/256 of itself or not at all, so that most updates would be lost. The optimizer
therefore changes fp32 masters (Micikevicius et al. 2018, "Mixed Precision Training", section 3.1) and the towers get
a rounded copy of them after each step. Unlike autocast, which casts every weight at each use, that is one cast a step,
and activations and gradients are bf16 throughout.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Weights"]

SCALARS = ("logit_scale", "logit_bias")


class Weights:
    """What is trained of a model: fp32 parameters for the optimizer, and the weights that the towers compute with.

    A step is: forward and backward, `collect_gradients`, the optimizer over `named_parameters`, `publish`,
    `update_average`, `zero_grad`.

    Args:
        model: on its device; its parameters are fp32, or DTensors (then `bf16` is the sharding's business).
        bf16: cast the model's parameters in place to bf16 and keep fp32 masters beside them, also of frozen ones, so
            that what is saved has lost nothing: 6 bytes a parameter in place of 4. The factor and bias on the
            similarities stay fp32, and so does batch normalisation, whose kernels take running statistics and gains in
            one precision only; these are their own masters. Without, all parameters are.
        ema: final decay per step of the average of the weights; None keeps none.
    """

    def __init__(self, model: nn.Module, *, bf16: bool, ema: float | None = None):
        self._model = model
        self._ema = ema
        kept = {p for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
        self._masters: dict[Tensor, Tensor] = {}
        for name, parameter in model.named_parameters():
            master = parameter
            if bf16 and parameter not in kept and name.rpartition(".")[2] not in SCALARS:
                # `data`, so that whoever holds the parameter keeps it; its layout (channels_last) stays.
                master = parameter.data.float().requires_grad_(parameter.requires_grad)
                parameter.data = parameter.data.to(torch.bfloat16)
            self._masters[parameter] = master
        pairs = [(working, master) for working, master in self._masters.items() if working is not master]
        self._trained = [pair for pair in pairs if pair[0].requires_grad]
        self._frozen = [pair for pair in pairs if not pair[0].requires_grad]
        self._frozen_version = self._count_writes()
        self._average: dict[Tensor, Tensor] = {}
        if ema is not None:
            still = {master for parameter, master in self._masters.items() if not parameter.requires_grad}
            moving = [tensor for _, tensor in self.named_tensors() if tensor not in still]
            self._average = {tensor: tensor.detach().clone() for tensor in moving}

    def _count_writes(self) -> int:
        return sum(master._version for _, master in self._frozen)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer changes: trainable fp32 tensors under the names of the model's parameters."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield name, self._masters[parameter]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds: fp32 parameters, frozen ones too, and buffers, under the names of `state_dict`.

        They may be written in place; `publish` then brings them to the towers.
        """
        state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            yield name, self._masters.get(tensor, tensor)

    def named_average(self) -> Iterator[tuple[str, Tensor]] | None:
        """Like `named_tensors`, of the average; frozen parameters are themselves. None where no average is kept."""
        if self._ema is None:
            return None
        return ((name, self._average.get(tensor, tensor)) for name, tensor in self.named_tensors())

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the towers' gradients to those of the masters, in fp32, and drop them; several times a step if wanted."""
        fresh: list[tuple[Tensor, Tensor]] = []
        further: list[tuple[Tensor, Tensor]] = []
        for working, master in self._trained:
            given, working.grad = working.grad, None
            if given is not None and master.grad is not None:
                further.append((master.grad, given))
            elif given is not None:
                master.grad = torch.empty_like(master)
                fresh.append((master.grad, given))
        if fresh:
            torch._foreach_copy_([into for into, _ in fresh], [given for _, given in fresh])
        if further:
            torch._foreach_add_([into for into, _ in further], [given for _, given in further])

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights that the towers compute with."""
        pairs = self._trained
        written = self._count_writes()
        if written != self._frozen_version:  # only a checkpoint writes there, so that a step need not copy them
            self._frozen_version = written
            pairs = pairs + self._frozen
        if pairs:
            torch._foreach_copy_([working for working, _ in pairs], [master for _, master in pairs])

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for working, master in self._masters.items():
            working.grad = master.grad = None

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the average towards the present weights: ``a ← d·a + (1 - d)·w``, ``d = min(ema, (1 + s) / (10 + s))``.

        The ramp keeps the first random weights from lasting (TensorFlow's ExponentialMovingAverage). Statistics of
        batch normalisation are averaged alike; counters are copied.

        Args:
            step: how many steps have been done.
        """
        if self._ema is None:
            return
        decay = min(self._ema, (1 + step) / (10 + step))
        floating = [(average, now) for now, average in self._average.items() if now.is_floating_point()]
        if floating:
            torch._foreach_lerp_([average for average, _ in floating], [now for _, now in floating], 1 - decay)
        for now, average in self._average.items():
            if not now.is_floating_point():
                average.copy_(now)
