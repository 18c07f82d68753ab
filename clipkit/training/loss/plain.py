"""The objectives as one would write them down, holding all similarities at once: the tiled forms' contract."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clipkit.training.loss.exchange import all_rows, gather_rows, rank_and_size

__all__ = ["at_least_fp32", "distillation_loss", "info_nce", "same_pairs", "sigmoid_loss"]

Features = Float[Tensor, "n dim"]
TeacherFeatures = Float[Tensor, "n teacher_dim"]
Ids = Int64[Tensor, " n"]
Scalar = Float[Tensor, ""]


def at_least_fp32(*features: Tensor) -> list[Tensor]:
    """All in the widest precision among them, and at least in float32.

    bf16 logits at scale 100 are off by up to a quarter; the product itself is cheap beside the towers.
    """
    dtype = torch.float32
    for tensor in features:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in features]


def same_pairs(
    ids: list[Int64[Tensor, " rows"]], others: list[Int64[Tensor, " columns"]], own: int
) -> Bool[Tensor, "rows columns"] | None:
    """Which pairs show the same image or say the same text as another and are therefore not its negatives.

    Args:
        ids: of the rows, by image, by text, or both; nothing is the same where there are none.
        others: of the columns, likewise.
        own: the column that is row 0's own pair, which may lie outside; row 1's is the next. Own pairs are not marked.
    """
    same = None
    for mine, theirs in zip(ids, others, strict=True):
        equal = mine[:, None] == theirs
        same = equal if same is None else same.logical_or_(equal)
    if same is not None and -same.shape[0] < own < same.shape[1]:
        same.diagonal(own).fill_(False)
    return same


def _left_out(image_ids: Ids | None, text_ids: Ids | None) -> Bool[Tensor, "n world_n"] | None:
    ids = [given for given in (image_ids, text_ids) if given is not None]
    return same_pairs(ids, [all_rows(given) for given in ids], rank_and_size()[0] * len(ids[0])) if ids else None


def _both_ways(
    image: Float[Tensor, "n any_dim"], text: Float[Tensor, "n any_dim"], scale: Scalar | float
) -> tuple[Float[Tensor, "n world_n"], Float[Tensor, "n world_n"]]:
    """Scaled similarities of this rank's images with all texts, and of its texts with all images."""
    by_image = scale * image @ gather_rows(text)[0].T
    if rank_and_size()[1] == 1:
        return by_image, by_image.T
    return by_image, scale * text @ gather_rows(image)[0].T


def info_nce(
    image: Features,
    text: Features,
    scale: Scalar,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    label_smoothing: float = 0.0,
) -> Scalar:
    """Symmetric InfoNCE over in-batch pairs (van den Oord et al. 2018; Radford et al. 2021, figure 3).

    ``-½ · mean_i [ Σ_j t_ij · log softmax_j(s·⟨x_i, y_j⟩) + Σ_j t_ij · log softmax_j(s·⟨y_i, x_j⟩) ]``, the softmax
    over the joint batch, the target ``t_i`` 1 for the own pair and 0 elsewhere.

    Args:
        image: unit-norm image embeddings of this rank.
        text: unit-norm text embeddings of this rank, row by row of the same pairs.
        scale: the factor ``s``, not its logarithm.
        image_ids: pairs with equal ids show one image: their texts are no negatives of each other's image.
        text_ids: likewise for equal texts. Such entries are left out of the softmax's sum, the own pair stays.
        label_smoothing: this share of the target is spread evenly over the own pair and all that are not left out
            (Szegedy et al. 2016, section 7); 0 to less than 1.

    Returns:
        The loss of this rank's rows, in the features' precision but at least float32.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = at_least_fp32(image, text)
        left_out = _left_out(image_ids, text_ids)
        target = torch.arange(len(image), device=image.device) + rank_and_size()[0] * len(image)
        loss = image.new_zeros(())
        for logits in _both_ways(image, text, scale):
            if left_out is None:
                loss = loss + F.cross_entropy(logits, target, label_smoothing=label_smoothing)
                continue
            logits = logits.masked_fill(left_out, -torch.inf)
            loss = loss + (1 - label_smoothing) * F.cross_entropy(logits, target)
            if label_smoothing:
                kept = (~left_out).sum(1)
                spread = logits.log_softmax(1).masked_fill(left_out, 0).sum(1) / kept
                loss = loss - label_smoothing * spread.mean()
        return loss / 2


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
    with torch.autocast(image.device.type, enabled=False):
        image, text = at_least_fp32(image, text)
        all_text, offset = gather_rows(text)
        logits = scale * image @ all_text.T + bias
        target = torch.arange(len(image), device=image.device) + offset
        own = torch.arange(len(all_text), device=image.device) == target[:, None]
        terms = -F.logsigmoid(torch.where(own, logits, -logits))
        left_out = _left_out(image_ids, text_ids)
        if left_out is not None:
            terms = terms.masked_fill(left_out, 0)
        return terms.sum() / len(image)


def distillation_loss(
    image: Features,
    text: Features,
    scale: Scalar,
    teacher_image: TeacherFeatures,
    teacher_text: TeacherFeatures,
    teacher_scale: Scalar | float,
) -> Scalar:
    """Cross-entropy with a teacher's softmax over the batch as the target, in both directions.

    ``-½ · mean_i [ Σ_j p_ij · log softmax_j(s·⟨x_i, y_j⟩) + Σ_j q_ij · log softmax_j(s·⟨y_i, x_j⟩) ]`` with ``p_i``
    and ``q_i`` the softmax of the teacher's own scaled similarities over the joint batch: affinity mimicking (Wu et al.
    2023, "TinyCLIP", section 3.1), halved as in open_clip's `DistillClipLoss`, which also computes it so.

    Args:
        image: unit-norm image embeddings of this rank.
        text: unit-norm text embeddings of this rank, row by row of the same pairs.
        scale: the factor ``s``, not its logarithm.
        teacher_image: the teacher's image embeddings of the same pairs, unit-norm, of any dimension; a constant.
        teacher_text: likewise of the texts.
        teacher_scale: the factor on the teacher's similarities.

    Returns:
        The loss of this rank's rows, in the features' precision but at least float32.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = at_least_fp32(image, text)
        with torch.no_grad():
            teacher = _both_ways(teacher_image.to(image.dtype), teacher_text.to(image.dtype), teacher_scale)
        students = _both_ways(image, text, scale)
        loss = image.new_zeros(())
        for logits, target in zip(students, teacher, strict=True):
            loss = loss - (target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return loss / 2
