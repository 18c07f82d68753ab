"""The pairwise sigmoid loss whose memory grows with N·D: `sigmoid_loss` in tiles.

No pair's term depends on another's, so that a tile's gradient is known as soon as the tile is: the forward pass
computes the gradients too, with three products in all, as many as the plain form has; the backward pass only scales.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkit.training.loss.exchange import gather_sweep, rank_and_size, ring_sweep
from clipkit.training.loss.plain import Features, Ids, Scalar, at_least_fp32, same_pairs
from clipkit.training.loss.tiles import tiles

__all__ = ["tiled_sigmoid_loss"]

# From here on softplus(x) is x to the last bit of a float64, and exp(x) is far from float32's largest number.
_LINEAR_FROM = 40.0


class _Pairwise(torch.autograd.Function):
    """``1/n · Σ_i Σ_j softplus(-z_ij · (s·⟨x_i, y_j⟩ + b))`` for own rows ``i``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: list[Tensor],
        ring: bool,
        side: int | None,
        gradients: bool,
    ) -> Tensor:
        of_image, of_text, of_scale, of_bias = (needed and gradients for needed in ctx.needs_input_grad[:4])
        with torch.autocast(image.device.type, enabled=False):
            x, _ = at_least_fp32(image, text)
            factor, shift = scale.to(x.dtype), bias.to(x.dtype)
            scaled = x * factor
            first, count = rank_and_size()[0] * len(x), len(x)
            by_image = torch.zeros_like(x) if of_image or (of_scale and not of_text) else None
            by_scale = x.new_zeros(())
            losses, by_bias = [], []

            def visit(offset: int, y: Tensor, *visitors: Tensor) -> Tensor | None:
                y = y.to(x.dtype)
                by_text = torch.zeros_like(y) if of_text else None
                for tile in tiles(count, len(y), first - offset, like=x, side=side, buffers=2):
                    i, j, (wrong, scratch) = tile.rows, tile.columns, tile.buffers
                    # The logit of being told wrong, l for strangers and -l for the pair; its softplus is the loss.
                    torch.mm(scaled[i], y[j].T, out=wrong).add_(shift)
                    tile.diagonal(wrong).neg_()
                    same = same_pairs([known[i] for known in ids], [known[j] for known in visitors], tile.own)
                    if same is not None:
                        wrong.masked_fill_(same, -torch.inf)
                    losses.append(F.softplus(wrong, threshold=_LINEAR_FROM, out=scratch).sum())  # type: ignore[call-arg]
                    if by_image is None and by_text is None and not of_bias:
                        continue
                    gradient = wrong.sigmoid_()
                    tile.diagonal(gradient).neg_()
                    if of_bias:
                        by_bias.append(gradient.sum())
                    if by_image is not None:
                        by_image[i].addmm_(gradient, y[j])
                    if by_text is not None:
                        by_text[j].addmm_(gradient.T, x[i])
                if by_image is None and by_text is not None and of_scale:
                    by_scale.add_((by_text * y).sum())
                return by_text

            by_text = (ring_sweep if ring else gather_sweep)([text, *ids], visit, torch.add)
            if by_image is not None and of_scale:
                by_scale = (by_image * x).sum()
            ctx.save_for_backward(
                by_image.mul_(factor / count) if of_image and by_image is not None else None,
                by_text.mul_(factor / count) if by_text is not None else None,
                by_scale / count if of_scale else None,
                torch.stack(by_bias).sum() / count if of_bias else None,
            )
            ctx.dtypes = [given.dtype for given in (image, text, scale, bias)]
            return torch.stack(losses).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        known = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((grad * found).to(dtype) if found is not None else None for found, dtype in known), *(None,) * 4)


def tiled_sigmoid_loss(
    image: Features,
    text: Features,
    scale: Scalar,
    bias: Scalar,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    ring: bool = False,
    side: int | None = None,
) -> Scalar:
    """`clipkit.training.loss.sigmoid_loss` without ever holding the similarities.

    Args:
        image: as all up to `text_ids` in `clipkit.training.loss.sigmoid_loss`.
        ring: one rank's texts visit at a time, so that memory does not grow with the number of ranks; else all texts
            are gathered.
        side: of the tiles in rows; where not set, by the device (`clipkit.training.loss.tiles`).
    """
    ids = [given for given in (image_ids, text_ids) if given is not None]
    return _Pairwise.apply(image, text, scale, bias, ids, ring, side, torch.is_grad_enabled())  # type: ignore[return-value]
