"""The loss that a recipe names, as one function of a batch's embeddings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipkit import loss
from clipkit.core import ClipkitError
from clipkit.loader import Batch
from clipkit.settings import TrainConfig
from clipkit.step import Objective
from clipkit.teacher import Teacher
from clipkit.trainset import TrainData

__all__ = ["make_objective"]


def make_objective(
    recipe: TrainConfig, data: TrainData, device: torch.device, *, has_bias: bool
) -> Callable[[Batch], Objective]:
    """A function from a batch to its loss, which still wants the batch's embeddings, factor and bias.

    Args:
        recipe: which loss, and how it is computed.
        data: that is trained on; a teacher must know it.
        device: of the embeddings.
        has_bias: whether the model has one.

    Raises:
        ClipkitError: where the sigmoid loss lacks a bias, or the teacher's embeddings cannot be used.
    """
    config = recipe.loss
    if config.kind == "sigmoid" and not has_bias:
        raise ClipkitError("loss.kind=sigmoid needs a bias; set model.init_logit_bias=-10 (and init_logit_scale=2.3)")
    tiled = config.form == "tiled"
    ring: dict[str, Any] = {"ring": config.exchange == "ring"} if tiled else {}
    nce = partial(loss.tiled_info_nce if tiled else loss.info_nce, label_smoothing=config.label_smoothing, **ring)
    sigmoid = partial(loss.tiled_sigmoid_loss if tiled else loss.sigmoid_loss, **ring)
    distillation = partial(loss.tiled_distillation_loss if tiled else loss.distillation_loss, **ring)
    teacher = None
    if config.distill is not None:
        teacher = Teacher.open(config.distill.teacher)
        teacher.check(data, recipe.data)

    def of_batch(batch: Batch) -> Objective:
        ids = {}
        if config.multi_positive:
            ids = {"image_ids": batch["image_ids"].to(device), "text_ids": batch["text_ids"].to(device)}
        taught = None
        if teacher is not None:
            taught = [side.to(device) for side in teacher.lookup(batch["image_ids"], batch["text_ids"])]

        def objective(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            if config.kind == "sigmoid" and bias is not None:
                total = sigmoid(image, text, scale, bias, **ids)
            else:
                total = nce(image, text, scale, **ids)
                # A bias that this loss has no use for: DDP waits for the gradient of everything that learns.
                total = total if bias is None else total + 0 * bias
            if taught is not None and config.distill is not None:
                weight, sharpness = config.distill.weight, config.distill.scale
                total = total + weight * distillation(image, text, scale, *taught, sharpness)
            return total

        return objective

    return of_batch
