"""The optimizers, their parameter groups and the learning rate schedule."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from clipkit.core import fast_bf16
from clipkit.training.settings import OptimConfig

__all__ = ["Muon", "learning_rate", "make_optimizers", "parameter_groups", "set_rate"]

UNDECAYED = (
    *("logit_scale", "logit_bias", "positional_embedding", "position_embedding", "position_embeddings", "pos_embed"),
    *("class_embedding", "cls_token", "cls_emb", "reg_token", "token_type_embeddings", "head_scale"),
)
# Two-dimensional all the same: tables that are looked up, one row per token, type or relative position.
LOOKED_UP_TABLES = ("embed", "relative", "rel_pos")
FUSED_QKV = ("in_proj_weight", "qkv.weight")

Depths = Mapping[str, tuple[str | None, int]]


def parameter_groups(
    named: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    *,
    depths: Depths | None = None,
    layer_decay: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """What an optimizer's parameters fall into: matrices and kernels decay; gains, biases, scale and positions do not.

    Decay pulls a gain or the logit scale towards zero, where it means something else than "simpler".

    Args:
        named: the model's parameters, or fp32 masters of them, with the names that `depths` has.
        weight_decay: of what decays.
        depths: `clipkit.models.DualEncoder.layer_depths`.
        layer_decay: for each side the factor between the rate of a layer and that of the layer above it (Clark et al.
            2020); needs `depths`. The last norm and the projection have the whole rate, and so have scale and bias.

    Returns:
        Groups with ``lr_scale``, the factor on the rate (see `set_rate`); the largest first, and within one factor
        what decays first. None of them is empty.
    """
    scale = _scales(depths, layer_decay)
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, tensor in named:
        spared = tensor.ndim < 2 or any(part in UNDECAYED for part in name.split("."))
        groups.setdefault((scale(name), spared), []).append(tensor)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay, "lr_scale": key[0]}
        for key in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def make_optimizers(
    named: Iterable[tuple[str, Tensor]],
    config: OptimConfig,
    depths: Depths,
    layer_decay: Mapping[str, float],
    device: torch.device,
) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices inside the towers' layers, and AdamW for everything else.

    Muon makes an update whose singular values are all about one, which is right for a matrix that maps activations to
    activations. Jordan et al. 2024 leave to AdamW what is none of that: embeddings and positions (tables), the first
    convolutions (inputs), the projections into the shared space (outputs), all vectors. A convolution inside a ResNet
    is a matrix from patches to channels (they flatten it likewise); a depthwise one is not. Both kinds share one rate:
    Muon's update is scaled to AdamW's usual size (Liu et al. 2025).

    Args:
        named: of what learns; float32 tensors, sharded or whole.
        config: the recipe's.
        depths: as in `parameter_groups`.
        layer_decay: as in `parameter_groups`.
        device: where the tensors are.
    """
    named = list(named)
    hidden = {name for name, tensor in named if config.kind == "muon" and _is_hidden_matrix(name, tensor, depths)}
    rest = [(name, tensor) for name, tensor in named if name not in hidden]
    groups = parameter_groups(rest, config.weight_decay, depths=depths, layer_decay=layer_decay)
    fused = device.type in ("cpu", "cuda", "mps", "xpu")
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, config.lr, config.betas, config.eps, fused=fused))
    groups = []
    for parts in (1, 3):
        chosen = [(n, t) for n, t in named if n in hidden and (3 if n.endswith(FUSED_QKV) else 1) == parts]
        found = parameter_groups(chosen, config.weight_decay, depths=depths, layer_decay=layer_decay)
        groups += [{**group, "parts": parts} for group in found]
    if groups:
        optimizers.append(Muon(groups, config.lr, momentum=config.momentum))
    set_rate(optimizers, config.lr)
    return optimizers


def set_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of a step: `rate` times each group's ``lr_scale``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]


class Muon(torch.optim.Optimizer):
    """torch's Muon (``match_rms_adamw``), for stacked queries, keys and values, kernels and sharded matrices.

    A group's ``parts`` says how many matrices are stacked in each of its parameters; Jordan et al. 2024 find the three
    better orthogonalised one by one. torch's own runs on `DTensor` too, but with collectives in every iteration, and
    bf16 sums in another order change the result visibly. Here a sharded momentum is gathered once, and every rank
    computes the same update and keeps its rows: bit-equal to no sharding.

    Args:
        params: groups of matrices ``[rows, columns]`` or kernels ``[rows, ...]``, which are taken as matrices.
        lr: learning rate, as for AdamW.
        momentum: of Nesterov's kind.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95):
        # torch's own refuses kernels when it is made.
        like = torch.optim.Muon([nn.Parameter(torch.zeros(1, 1))], lr=lr, momentum=momentum).defaults
        super().__init__(params, like)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; weight decay is decoupled (Loshchilov & Hutter 2019)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                whole = update.full_tensor() if isinstance(update, DTensor) else update
                parts = whole.flatten(1).chunk(group.get("parts", 1))
                whole = torch.cat([_orthogonal(part, group) for part in parts]).view_as(whole)
                if isinstance(update, DTensor):
                    # Every rank has the same whole; taking its own rows of it needs no collective.
                    mesh, placements = update.device_mesh, update.placements
                    whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
                    whole = whole.redistribute(placements=placements)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(whole, alpha=-group["lr"] * 0.2 * math.sqrt(max(parts[0].shape)))
        return loss


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, floor: float = 0.0) -> float:
    """Linear warmup to `peak`, then half a cosine to `floor` (Loshchilov & Hutter 2017).

    Args:
        step: 0 … steps - 1; the first step already learns, the last one stands just above the floor.
        steps: of the whole run.
        peak: highest rate.
        warmup: steps of warmup, cut to a fifth of a short run.
        floor: where the cosine ends.
    """
    warmup = min(warmup, steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def _scales(depths: Depths | None, layer_decay: Mapping[str, float] | None) -> Callable[[str], float]:
    depths, layer_decay = depths or {}, layer_decay or {}
    tops = _tops(depths)

    def scale(name: str) -> float:
        side, depth = depths.get(name, (None, 0))
        return 1.0 if side is None else layer_decay.get(side, 1.0) ** (tops[side] - depth)

    return scale


def _tops(depths: Depths) -> dict[str, int]:
    tops: dict[str, int] = {}
    for side, depth in depths.values():
        if side is not None:
            tops[side] = max(depth, tops.get(side, 0))
    return tops


def _is_hidden_matrix(name: str, tensor: Tensor, depths: Depths) -> bool:
    side, depth = depths[name]
    kernel = tensor.ndim > 2 and tensor.shape[1] > 1
    if side is None or not (kernel or tensor.ndim == 2) or any(table in name for table in LOOKED_UP_TABLES):
        return False
    return 0 < depth < _tops(depths)[side]


def _orthogonal(matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The matrix with its singular values pulled to about one, by torch's Newton-Schulz iteration.

    In bf16 as torch's own, which is enough: they end between 0.7 and 1.2 in any precision. In fp32 where the device is
    slow at bf16: on two cores with AVX2 alone a step of `tiny` took 10 s.
    """
    a, b, c = group["ns_coefficients"]
    x = matrix.bfloat16() if fast_bf16(matrix.device) else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
