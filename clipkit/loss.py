"""Contrastive objectives as pure functions.

Each rank holds its own rows and compares them with the rows of all ranks. A rank's loss is the mean over its own rows,
so the mean over ranks, which is what DistributedDataParallel's averaged gradients belong to, is the loss of the joint
batch. With one process the gather is the identity and the same code runs.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

__all__ = ["gather_rows", "info_nce", "sigmoid_loss"]

Features = Float[Tensor, "n dim"]
Ids = Int64[Tensor, " n"]
Scalar = Float[Tensor, ""]


class _AllGather(torch.autograd.Function):
    """Concatenate every rank's rows; the backward pass sums every rank's gradient for one's own rows.

    The all-reduce moves twice what a reduce-scatter would, but gloo has it too, so that CPUs run the same path.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Shaped[Tensor, "n ..."]) -> tuple[Shaped[Tensor, "world_n ..."], int]:
    """All ranks' rows in rank order, with gradients, and where one's own begin. Every rank has as many rows."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows, 0
    return _AllGather.apply(rows), dist.get_rank() * len(rows)  # type: ignore[return-value]


def _same(image_ids: Ids | None, text_ids: Ids | None) -> Bool[Tensor, "n world_n"] | None:
    """Pairs of a row here and a row anywhere that show the same image or say the same text."""
    same = None
    for ids in (image_ids, text_ids):
        if ids is not None:
            equal = ids[:, None] == gather_rows(ids)[0][None, :]
            same = equal if same is None else same | equal
    return same


def info_nce(
    image: Features,
    text: Features,
    scale: Scalar,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
) -> Scalar:
    """Symmetric InfoNCE over in-batch pairs (van den Oord et al. 2018; Radford et al. 2021, figure 3).

    ``-½ · mean_i [ log softmax_j(s·⟨x_i, y_j⟩)_i + log softmax_j(s·⟨y_i, x_j⟩)_i ]``, the softmax over the joint batch.

    Args:
        image: unit-norm image embeddings of this rank.
        text: unit-norm text embeddings of this rank, row by row of the same pairs.
        scale: the factor ``s``, not its logarithm.
        image_ids: pairs with equal ids show one image: their texts are no negatives of each other's image.
        text_ids: likewise for equal texts. Such entries are left out of the softmax's sum, the own pair stays.

    Returns:
        The loss of this rank's rows, in the features' precision but at least float32.
    """
    image, text = _at_least_fp32(image), _at_least_fp32(text)
    all_image, offset = gather_rows(image)
    all_text, _ = gather_rows(text)
    target = torch.arange(len(image), device=image.device) + offset
    by_image = scale * image @ all_text.T
    by_text = scale * text @ all_image.T
    same = _same(image_ids, text_ids)
    if same is not None:
        left_out = same & (torch.arange(len(all_image), device=image.device) != target[:, None])
        by_image = by_image.masked_fill(left_out, -torch.inf)
        by_text = by_text.masked_fill(left_out, -torch.inf)
    return (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2


def sigmoid_loss(
    image: Features,
    text: Features,
    scale: Scalar,
    bias: Scalar,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
) -> Scalar:
    """Pairwise sigmoid loss (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1).

    ``-1/n · Σ_i Σ_j log σ( z_ij · (s·⟨x_i, y_j⟩ + b) )``, ``z_ij`` is 1 for the pair and -1 elsewhere; ``j`` runs over
    the joint batch. Arguments as in `info_nce`; pairs with equal ids other than the own one are left out.
    """
    image, text = _at_least_fp32(image), _at_least_fp32(text)
    all_text, offset = gather_rows(text)
    logits = scale * image @ all_text.T + bias
    target = torch.arange(len(image), device=image.device) + offset
    own = torch.arange(len(all_text), device=image.device) == target[:, None]
    terms = -F.logsigmoid(torch.where(own, logits, -logits))
    same = _same(image_ids, text_ids)
    if same is not None:
        terms = terms.masked_fill(same & ~own, 0)
    return terms.sum() / len(image)


def _at_least_fp32(features: Tensor) -> Tensor:
    # bf16 logits at scale 100 are off by up to a quarter; the product itself is cheap beside the towers.
    return features if features.dtype == torch.float64 else features.float()
