"""The same towers with less work: open_clip's blocks compute what they always did, by shorter ways.

Only the way changes: parameters, their names and the mathematics stay those of the library's modules, which the tests
take as the slow twin.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["PooledBlock", "SelfAttention", "attend_qkv", "speed_up"]


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of a sequence with itself, batch first, without its transposes and copies."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor | None = None, *_: Any, attn_mask: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """What positions of a sequence take from it, ``[n, queries, width]``.

        Args:
            query: the sequence, ``[n, length, width]``; or some positions of it, ``[n, queries, width]``.
            key: the sequence, where `query` is not all of it.
            attn_mask: as in `attend_qkv`; for some positions ``[n, queries, length]``.
        """
        if key is not None and key is not query:
            return self.out_proj(self._of_some(query, key, attn_mask)), None
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attend_qkv(projected, self.num_heads, attn_mask)), None

    def _of_some(self, query: Tensor, whole: Tensor, mask: Tensor | None) -> Tensor:
        parts = [self.embed_dim, 2 * self.embed_dim]
        weights = self.in_proj_weight.split(parts)
        biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(parts)
        q = F.linear(query, weights[0], biases[0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        both = F.linear(whole, weights[1], biases[1]).unflatten(-1, (2, self.num_heads, -1))
        k, v = both.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if mask is None else mask.to(q.dtype)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class PooledBlock(ResidualAttentionBlock):
    """The last block of a transformer that is read at one position: it computes the output of that one only.

    Keys and values are of all positions; queries, projection and MLP, five sixths of a block's products, of one. The
    others' output changes nothing, so the gradients too are those of the whole block.
    """

    first: bool = False
    """Whether the first position is read, whatever is asked; an image tower's class token."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """``[n, 1, width]`` of the positions `at`, int64 ``[n]``; of all where neither they nor the first are meant."""
        if at is None and not self.first:
            return super().forward(q_x, k_x, v_x, attn_mask)
        normed = self.ln_1(q_x)
        if at is None:
            x, query, mask = q_x[:, :1], normed[:, :1], None
        else:
            rows = torch.arange(len(at), device=at.device)
            x, query = q_x[rows, at][:, None], normed[rows, at][:, None]
            mask = None if attn_mask is None else attn_mask[at][:, None]
        x = x + self.ls_1(self.attn(query, normed, normed, attn_mask=mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def attend_qkv(qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """``softmax(q·kᵀ/√d + mask)·v`` in each head, as `F.scaled_dot_product_attention`, with its gradient.

    Args:
        qkv: queries, keys and values, ``[n, length, 3 * heads * d]``.
        heads: how many.
        mask: added to the similarities, ``[length, length]`` or ``[n * heads, length, length]``.

    Returns:
        ``[n, length, heads * d]``.
    """
    # Under no_grad torch's own is as fast, and needs no room for the similarities.
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return _Bf16Attention.apply(qkv, heads, mask)  # type: ignore[return-value]
    n, length, width = qkv.shape
    q, k, v = qkv.view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if mask is not None:
        mask = mask.to(q.dtype)
        mask = mask if mask.ndim == 2 else mask.view(n, heads, length, length)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attended.transpose(1, 2).reshape(n, length, width // 3)


class _Bf16Attention(torch.autograd.Function):
    """Attention in bf16 for CPUs, where that of torch takes 5 times as long, and 2 at 577 tokens: its backward pass
    multiplies small tiles one by one (torch 2.15, AVX512-BF16).

    Similarities and their softmax are fp32 there and here. The price is memory: 2 bytes for each pair of tokens in
    each head are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        n, length, width = qkv.shape
        depth = width // 3 // heads
        parts = qkv.view(n, length, 3, heads, depth).permute(2, 0, 3, 1, 4).reshape(3, n * heads, length, depth)
        q, k = parts[:2].float()
        similarities = torch.bmm(q, k.transpose(1, 2)).mul_(depth**-0.5)
        if mask is not None:
            similarities += mask
        shares = similarities.softmax(-1).to(qkv.dtype)
        ctx.save_for_backward(parts, shares)
        return torch.bmm(shares, parts[2]).view(n, heads, length, depth).transpose(1, 2).reshape(n, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        parts, shares = ctx.saved_tensors
        q, k, v = parts
        n, length, width = gradient.shape
        depth = q.shape[-1]
        of_found = gradient.view(n, length, -1, depth).transpose(1, 2).reshape(q.shape)
        of_shares = torch.bmm(of_found, v.transpose(1, 2))
        of_similarities = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        gradients = torch.empty_like(parts)
        torch.bmm(of_similarities, k, out=gradients[0])
        torch.bmm(of_similarities.transpose(1, 2), q, out=gradients[1])
        torch.bmm(shares.transpose(1, 2), of_found, out=gradients[2])
        gradients[:2] *= depth**-0.5
        return gradients.view(3, n, -1, length, depth).permute(1, 3, 0, 2, 4).reshape(n, length, 3 * width), None, None


def speed_up(backbone: nn.Module) -> nn.Module:
    """Let open_clip's blocks compute by shorter ways, in place; what is not known to be the same stays as it is."""
    for block in backbone.modules():
        if type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv"):
            attention = block.attn
            if type(attention) is nn.MultiheadAttention and attention.batch_first and not attention.dropout:
                attention.__class__ = SelfAttention  # so that the parameters keep their names
    visual, text = getattr(backbone, "visual", None), getattr(backbone, "text", backbone)
    if type(visual) is VisionTransformer and visual.pool_type == "tok" and visual.attn_pool is None:
        _read_at_one_position(visual.transformer, first=not visual.output_tokens)
    if hasattr(getattr(text, "transformer", None), "resblocks"):
        _read_at_one_position(text.transformer)
    return backbone


def _read_at_one_position(transformer: Any, *, first: bool = False) -> None:
    block: Any = transformer.resblocks[-1]
    if type(block) is ResidualAttentionBlock and type(block.attn) is SelfAttention:
        block.__class__ = PooledBlock
        vars(block)["first"] = first
