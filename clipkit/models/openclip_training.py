"""open_clip's towers in training: texts of any length, images of another size, patches left out, activations computed
again. At a model's own sizes these are open_clip's own forward passes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import CustomResidualAttentionBlock, text_global_pool
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from clipkit.core import ClipkitError
from clipkit.models.openclip_fast import PooledBlock

__all__ = [
    "PatchDropout",
    "check_image_size",
    "checkpoint_gradients",
    "image_features",
    "needed_lengths",
    "resize_positions",
    "text_features",
]

RESNET_STRIDE = 32


class PatchDropout(OpenClipPatchDropout):
    """open_clip's, with the same draws, on the device of the patches: open_clip's draws and sorts on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """The class token and a random `prob` fewer of the patches, ``[n, 1 + patches, width]``, in training only."""
        if not self.training or self.prob == 0:
            return x
        patches = x[:, 1:]
        kept = max(1, int(patches.shape[1] * (1 - self.prob)))
        chosen = torch.randn(patches.shape[:2], device=x.device).topk(kept, dim=-1).indices
        return torch.cat([x[:, :1], patches.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))], dim=1)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings for another grid of patches, as open_clip resizes those of a checkpoint, differentiably.

    Args:
        positions: ``[1 + height * width, dim]``; the first one, of the class token or the mean, is kept.
        old: height and width of the grid that they are for.
        new: those wanted.

    Returns:
        ``[1 + new height * new width, dim]``, bicubic with antialiasing, computed in float32 at least.
    """
    grid = positions[1:].to(torch.promote_types(positions.dtype, torch.float32))
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)])


def image_features(backbone: Any, pixels: Tensor, *, recompute: bool = False) -> Tensor:
    """Image embeddings before normalisation, ``[n, dim]``, of images that `check_image_size` allows.

    Args:
        backbone: open_clip's model.
        pixels: normalised, ``[n, 3, height, width]``.
        recompute: of a `ModifiedResNet`, compute activations again in the backward pass; the other towers know.
    """
    visual = backbone.visual
    height, width = pixels.shape[-2:]
    same = (height, width) == _pair(visual.image_size)
    resnet = hasattr(visual, "attnpool")
    if hasattr(visual, "trunk") or (same and not (resnet and recompute)):
        return visual(pixels)
    if not resnet:
        new = (height // visual.patch_size[0], width // visual.patch_size[1])
        positions = resize_positions(visual.positional_embedding, visual.grid_size, new)
        return functional_call(visual, {"positional_embedding": positions}, (pixels,))
    x = _resnet_layers(visual, pixels, recompute)
    if same:
        return visual.attnpool(x)
    old = _pair(visual.image_size // RESNET_STRIDE)
    positions = resize_positions(visual.attnpool.positional_embedding, old, (x.shape[2], x.shape[3]))
    return functional_call(visual.attnpool, {"positional_embedding": positions}, (x,))


def check_image_size(visual: Any, side: int) -> None:
    """Refuse a side of square images that the tower cannot see.

    Raises:
        ClipkitError: where it is no multiple of what the tower divides it by, or a timm network does not take it.
    """
    if _pair(side) == _pair(visual.image_size):
        return
    if hasattr(visual, "trunk"):
        twin = copy.deepcopy(visual).to("meta").eval()
        try:
            with torch.no_grad():
                twin(torch.empty(1, 3, side, side, device="meta", dtype=next(twin.parameters()).dtype))
        except (RuntimeError, AssertionError, ValueError) as error:
            own = "x".join(map(str, _pair(visual.image_size)))
            raise ClipkitError(f"phases.image_size={side}: this timm image tower takes only {own}") from error
        return
    units = (RESNET_STRIDE,) if hasattr(visual, "attnpool") else visual.patch_size
    if any(side % unit for unit in units):
        raise ClipkitError(f"phases.image_size={side}: this image tower needs a multiple of {max(units)}")


def text_features(backbone: Any, tokens: Tensor) -> Tensor:
    """Text embeddings before normalisation, ``[n, dim]``, of tokens of any length up to the context."""
    text = getattr(backbone, "text", backbone)
    length = tokens.shape[1]
    if hasattr(text, "pooler") or getattr(text, "cls_emb", None) is not None:
        return backbone.encode_text(tokens)
    # open_clip's own lines, with positions and mask cut, and the last block for what is pooled.
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    at = _pooled_at(text, tokens)
    if at is not None and isinstance(text.transformer.resblocks[-1], PooledBlock):
        pooled = text.ln_final(_at_positions(text.transformer, x, mask, at))[:, 0]
    else:
        x = text.ln_final(text.transformer(x, attn_mask=mask))
        pooled = text_global_pool(x, tokens, *_pooling(text))
    if text.text_projection is None:
        return pooled
    if isinstance(text.text_projection, nn.Linear):
        return text.text_projection(pooled)
    return pooled @ text.text_projection


def needed_lengths(backbone: Any, tokens: Tensor) -> Tensor:
    """How many of its tokens can change each text's output, int64 ``[n]``; those after them provably cannot.

    Under a causal mask nothing after the pooled position is seen, whatever stands there. A Hugging Face encoder is
    given a mask of the padding, which is not seen either.
    """
    text, all_of_them = getattr(backbone, "text", backbone), tokens.new_full((len(tokens),), tokens.shape[1])
    if hasattr(text, "pooler"):
        seen = tokens != text.config.pad_token_id
        last = tokens.shape[1] - seen.flip(1).int().argmax(1)
        return torch.where(seen.any(1), last, all_of_them)  # attention over nothing at all is over everything
    if text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        return all_of_them
    at = _pooled_at(text, tokens)
    return all_of_them if at is None else at + 1


def checkpoint_gradients(backbone: Any, on: bool) -> None:
    """Compute the towers' activations again in the backward pass, or not; `image_features` does so for a ResNet.

    Raises:
        ClipkitError: for a tower that cannot.
    """
    visual, text = backbone.visual, getattr(backbone, "text", backbone)
    transformers = [
        part.transformer for part in (visual, text) if hasattr(getattr(part, "transformer", None), "resblocks")
    ]
    if on and any(isinstance(t.resblocks[0], CustomResidualAttentionBlock) for t in transformers):
        raise ClipkitError("towers.gradient_checkpointing: open_clip's custom blocks (qk_norm, scale_...) have none")
    if hasattr(visual, "trunk"):
        if on and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in visual.trunk.modules()):
            raise ClipkitError(
                "towers.gradient_checkpointing: in this timm image tower it would count BatchNorm's statistics twice"
            )
        try:
            visual.trunk.set_grad_checkpointing(on)
        except (AssertionError, AttributeError) as error:
            if on:
                raise ClipkitError("towers.gradient_checkpointing: this timm image tower has none") from error
    for transformer in transformers:
        transformer.grad_checkpointing = on
    if hasattr(text, "pooler"):
        if on:
            text.transformer.activation_checkpointing_enable({"use_reentrant": False})
        else:
            text.transformer.activation_checkpointing_disable()


def _resnet_layers(visual: Any, x: Tensor, recompute: bool) -> Tensor:
    blocks = [block for i in (1, 2, 3, 4) for block in getattr(visual, f"layer{i}")]
    for part in (visual.stem, *blocks):
        if recompute:
            x = checkpoint(part, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _same_statistics(visual)))
        else:
            x = part(x)
    return x


@contextmanager
def _same_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises as before and leaves its running statistics alone: they were updated the first time."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _at_positions(transformer: Any, x: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
    """A transformer's output at one position of each sequence, ``[n, 1, width]``."""
    *blocks, last = transformer.resblocks
    again = transformer.grad_checkpointing
    for block in blocks:
        x = checkpoint(block, x, None, None, mask, use_reentrant=False) if again else block(x, attn_mask=mask)
    if again:
        return checkpoint(last, x, None, None, mask, at, use_reentrant=False)  # type: ignore[return-value]
    return last(x, attn_mask=mask, at=at)


def _pooled_at(text: Any, tokens: Tensor) -> Tensor | None:
    """The position that each text's embedding is read at, int64 ``[n]``; None where that is not one of its tokens'."""
    pool, end = _pooling(text)
    if pool == "argmax":
        return tokens.argmax(1)
    return (tokens == end).int().argmax(1) if pool == "eos" else None


def _pooling(text: Any) -> tuple[str, int]:
    if hasattr(text, "text_pool_type"):  # the text tower that an open_clip `CLIP` has taken apart
        return text.text_pool_type, text.text_eos_id
    return text.pool_type, text.eos_id


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
