"""The loss that a recipe names, as one function of a batch's embeddings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.core import ClipkitError
from clipkit.embedding import TeacherEmbeddings
from clipkit.training.batches import Batch, TrainData
from clipkit.training.gradient import Objective
from clipkit.training.loss import (
    distillation_loss,
    info_nce,
    sigmoid_loss,
    tiled_distillation_loss,
    tiled_info_nce,
    tiled_sigmoid_loss,
)
from clipkit.training.settings import DataConfig, TrainConfig

__all__ = ["check_teacher", "make_objective"]

CHECKED_SAMPLES = 256  # samples of which a teacher's embeddings are looked for before training


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
    nce = partial(tiled_info_nce if tiled else info_nce, label_smoothing=config.label_smoothing, **ring)
    sigmoid = partial(tiled_sigmoid_loss if tiled else sigmoid_loss, **ring)
    distillation = partial(tiled_distillation_loss if tiled else distillation_loss, **ring)
    teacher = None
    if config.distill is not None:
        teacher = TeacherEmbeddings.open(config.distill.teacher)
        check_teacher(teacher, data, recipe.data)

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


def check_teacher(teacher: TeacherEmbeddings, data: TrainData, config: DataConfig, first: int = 0) -> None:
    """Look for the first samples of a run, so that what does not fit is found before it starts.

    Args:
        teacher: that is asked.
        data: what is trained on.
        config: its settings.
        first: the position where the run begins.

    Raises:
        ClipkitError: where one of `CHECKED_SAMPLES` samples was not embedded, or captions are put into other words.
    """
    if set(config.templates) - {"{caption}"}:
        raise ClipkitError(
            f"data.templates changes the captions, and {teacher.folder} holds embeddings of the captions as they are; "
            "remove it, or loss.distill"
        )
    if data.size is None:
        return  # a stream cannot be looked into and read again
    references = data.first(range(first, first + min(CHECKED_SAMPLES, data.size)))
    rows = teacher.rows(np.array([data.image_id(reference) for reference in references]))
    if (rows < 0).any():
        shard, key = data.name(references[int(np.flatnonzero(rows < 0)[0])])
        raise ClipkitError(
            f"{teacher.folder} has no embedding of sample {key!r} of {shard}, and of {(rows < 0).sum()} among "
            f"{len(rows)} that were looked for; {teacher.hint}"
        )
