"""Softmax cross-entropy in both directions whose memory grows with N·D: `info_nce` and `distillation_loss` in tiles.

Each rank goes once over the similarities of its own images with everybody's texts, a tile at a time, and keeps of each
row and column what the losses need (`clipkit.training.loss.targets`); a column's is complete once all ranks' are
merged. The backward pass computes each tile again, as FlashAttention does (Dao et al. 2022): one product in the forward
pass and three in the backward pass, where the plain form has one and two, but keeps and moves N² floats several times.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkit.training.loss.exchange import gather_sweep, rank_and_size, ring_sweep
from clipkit.training.loss.plain import Features, Ids, Scalar, TeacherFeatures, at_least_fp32
from clipkit.training.loss.targets import OwnPair, Teacher
from clipkit.training.loss.tiles import tiles

__all__ = ["tiled_distillation_loss", "tiled_info_nce"]


class _BothWays(torch.autograd.Function):
    """``1/(2n) · Σ_i [ row i's cross-entropy + column i's ]`` of ``s·⟨x_i, y_j⟩`` with a target, for own rows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, target: OwnPair | Teacher, ring: bool, side: int | None
    ) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            x, _ = at_least_fp32(image, text)
            scaled = x * scale.to(x.dtype)
            first, count = rank_and_size()[0] * len(x), len(x)
            rows = target.start(count, x)

            def visit(offset: int, y: Tensor, *visitors: Tensor) -> Tensor:
                y = y.to(x.dtype)
                columns = target.start(len(y), y)
                for tile in tiles(count, len(y), first - offset, like=x, side=side, buffers=target.buffers):
                    torch.mm(scaled[tile.rows], y[tile.columns].T, out=tile.buffers[0])
                    target.measure(tile, list(visitors), rows[:, tile.rows], columns[:, tile.columns])
                return columns.T

            sweep = ring_sweep if ring else gather_sweep
            columns = sweep([text, *target.visitors], visit, lambda one, other: target.merge(one.T, other.T).T)
            row_losses, row_figures = target.finish(rows)
            column_losses, column_figures = target.finish(columns.T)  # type: ignore[union-attr]
            ctx.save_for_backward(image, text, scale, row_figures, column_figures)
            ctx.target, ctx.ring, ctx.side = target, ring, side
            return (row_losses + column_losses).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, text, scale, row_figures, column_figures = ctx.saved_tensors
        target: OwnPair | Teacher = ctx.target
        of_image, of_text, of_scale = ctx.needs_input_grad[:3]
        with torch.autocast(image.device.type, enabled=False):
            x, _ = at_least_fp32(image, text)
            factor = scale.to(x.dtype)
            scaled = x * factor
            first, count = rank_and_size()[0] * len(x), len(x)
            # The scale's gradient comes with either side's; alone it costs as much as the images'.
            by_image = torch.zeros_like(x) if of_image or not of_text else None
            by_scale = x.new_zeros(())

            def visit(offset: int, y: Tensor, column_figures: Tensor, *visitors: Tensor) -> Tensor | None:
                y, column_figures = y.to(x.dtype), column_figures.T.contiguous()
                by_text = torch.zeros_like(y) if of_text else None
                for tile in tiles(count, len(y), first - offset, like=x, side=ctx.side, buffers=target.buffers):
                    i, j, gradient = tile.rows, tile.columns, tile.buffers[0]
                    torch.mm(scaled[i], y[j].T, out=gradient)
                    target.gradient(tile, list(visitors), row_figures[:, i], column_figures[:, j])
                    if by_image is not None:
                        by_image[i].addmm_(gradient, y[j])
                    if by_text is not None:
                        by_text[j].addmm_(gradient.T, x[i])
                if by_image is None and by_text is not None:
                    by_scale.add_((by_text * y).sum())
                return by_text

            sweep = ring_sweep if ctx.ring else gather_sweep
            by_text = sweep([text, column_figures.T, *target.visitors], visit, torch.add)
            share = grad / (2 * count)
            if by_image is not None:
                by_scale = (by_image * x).sum()
                by_image.mul_(share * factor)
            return (
                by_image.to(image.dtype) if of_image and by_image is not None else None,
                by_text.mul_(share * factor).to(text.dtype) if by_text is not None else None,
                (by_scale * share).to(scale.dtype) if of_scale else None,
                *(None,) * 3,
            )


def tiled_info_nce(
    image: Features,
    text: Features,
    scale: Scalar,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    label_smoothing: float = 0.0,
    ring: bool = False,
    side: int | None = None,
) -> Scalar:
    """`clipkit.training.loss.info_nce` without ever holding the similarities.

    Args:
        image: as all up to `label_smoothing` in `clipkit.training.loss.info_nce`.
        ring: one rank's texts visit at a time, so that memory does not grow with the number of ranks; else all texts
            are gathered.
        side: of the tiles in rows; where not set, by the device (`clipkit.training.loss.tiles`).
    """
    target = OwnPair(image_ids, text_ids, label_smoothing)
    return _BothWays.apply(image, text, scale, target, ring, side)  # type: ignore[return-value]


def tiled_distillation_loss(
    image: Features,
    text: Features,
    scale: Scalar,
    teacher_image: TeacherFeatures,
    teacher_text: TeacherFeatures,
    teacher_scale: Scalar | float,
    *,
    ring: bool = False,
    side: int | None = None,
) -> Scalar:
    """`clipkit.training.loss.distillation_loss` without ever holding the similarities; `ring` and `side` as in
    `tiled_info_nce`.

    The teacher's similarities are computed along with the student's, in both passes.
    """
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        target = Teacher(teacher_image, teacher_text, teacher_scale, at_least_fp32(image, text)[0].dtype)
    return _BothWays.apply(image, text, scale, target, ring, side)  # type: ignore[return-value]
