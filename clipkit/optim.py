"""The optimizer's parameter groups and the learning rate schedule."""

import math
from typing import Any

from torch import nn

__all__ = ["learning_rate", "parameter_groups"]

UNDECAYED = ("logit_scale", "logit_bias", "positional_embedding", "pos_embed", "class_embedding", "cls_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels decay; gains, biases, scale and positions do not.

    Decay pulls a gain or the logit scale towards zero, where it means something else than "simpler".
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim < 2 or any(part in UNDECAYED for part in name.split("."))
            (spared if small else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
