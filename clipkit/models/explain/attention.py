"""What an image tower looks at: the attention maps of a forward pass, with their gradients.

All the libraries' vision transformers attend through two functions of torch. They are watched while a tower runs, in
this thread only; no module of the tower is touched, so there is nothing to be put back.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipkit.core import ClipkitError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.explain.relevance import patch_readout, relevance, weighted_attention

__all__ = ["AttentionWatch", "NoAttention", "PatchTokens", "attention_relevance", "patch_tokens"]

HeadMaps = Float[Tensor, "n heads queries tokens"]


class NoAttention(ClipkitError):
    """The image tower has no attention over patches that could be read."""


@dataclass(frozen=True)
class PatchTokens:
    """How a vision transformer turns an image into tokens, and these into one vector."""

    patch: tuple[int, int]
    """Height and width of a patch in pixels."""
    prefix: int
    """How many tokens stand before those of the patches."""
    pooling: Literal["class", "mean", "attention"]
    """The first token; the mean of the patches; or attention with a query that is learned."""
    layers: nn.ModuleList


class AttentionWatch(TorchFunctionMode):
    """Within it, softmax attention without a mask is computed openly and its maps are kept, in order.

    >>> with AttentionWatch() as seen:                      # doctest: +SKIP
    ...     features = model.encode_image(pixels)
    >>> seen.maps[0].shape                           # doctest: +SKIP
    torch.Size([1, 12, 50, 50])

    What is computed is the same up to rounding. It takes memory for ``heads · tokens²`` numbers in each layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[HeadMaps] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            masked = any(given is not None for given in (*args[3:4], kwargs.get("attn_mask")))
            if not (masked or kwargs.get("is_causal") or kwargs.get("enable_gqa") or args[5:]):
                return self._attend(*args[:3], scale=kwargs.get("scale"), **_only(kwargs, "query", "key", "value"))
        if func is F.multi_head_attention_forward:
            special = ("attn_mask", "key_padding_mask", "static_k", "static_v")
            if all(kwargs.get(name) is None for name in special) and args[7] is None and not args[9]:
                return self._multi_head(args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        shares = (query @ key.transpose(-2, -1) * factor).softmax(-1)
        if torch.is_grad_enabled() and not shares.requires_grad:  # in a tower whose weights do not learn
            shares.requires_grad_()
        self.maps.append(shares)
        return shares @ value

    def _multi_head(self, args: Any, kwargs: Any) -> tuple[Tensor, None]:
        """`nn.MultiheadAttention`, which can also give its maps, but not those that its output was computed from."""
        inputs, heads = args[:3], args[4]  # of shape [length, n, width]
        if kwargs.get("use_separate_proj_weight"):
            weights = [kwargs[f"{name}_proj_weight"] for name in "qkv"]
        else:
            weights = args[5].chunk(3)
        biases = [None] * 3 if args[6] is None else args[6].chunk(3)
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        attended = self._attend(query, key, value, None)
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), args[11], args[12]), None


def _only(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}


def patch_tokens(model: DualEncoder) -> PatchTokens:
    """How the model's image tower makes tokens of patches.

    Raises:
        NoAttention: where it is no vision transformer, or pools its tokens in a way that is not known here.
    """
    backbone: Any = model.backbone
    if not hasattr(backbone, "visual"):
        vision = backbone.config.vision_config
        siglip = backbone.config.model_type == "siglip"
        layers = backbone.vision_model.encoder.layers
        return PatchTokens((vision.patch_size,) * 2, not siglip, "attention" if siglip else "class", layers)
    visual = backbone.visual
    if hasattr(visual, "trunk"):
        return _timm_tokens(visual.trunk)
    if not hasattr(visual, "conv1") or not hasattr(visual, "transformer"):
        raise _none("it is a convolutional network")
    if visual.attn_pool is not None:
        if visual.attn_pool_contrastive is not None:
            raise _none("it pools its patches twice")
        return PatchTokens(visual.patch_size, 1, "attention", visual.transformer.resblocks)
    pooling: dict[str, Any] = {"tok": "class", "avg": "mean"}
    if visual.pool_type not in pooling:
        raise _none(f"its pooling {visual.pool_type!r} is not known")
    return PatchTokens(visual.patch_size, 1, pooling[visual.pool_type], visual.transformer.resblocks)


def _timm_tokens(trunk: Any) -> PatchTokens:
    if not (hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens") and hasattr(trunk, "patch_embed")):
        raise _none("this timm network is no vision transformer")
    pooling: dict[str, Any] = {"token": "class", "avg": "mean", "map": "attention"}
    if trunk.global_pool not in pooling:
        raise _none(f"its pooling {trunk.global_pool!r} is not known")
    return PatchTokens(trunk.patch_embed.patch_size, trunk.num_prefix_tokens, pooling[trunk.global_pool], trunk.blocks)


def _none(why: str) -> NoAttention:
    return NoAttention(f"--method relevance cannot read this image tower ({why}); --method occlusion takes any tower")


def attention_relevance(
    model: DualEncoder, pixels: Tensor, targets: Float[Tensor, "n dim"]
) -> Float[Tensor, "n rows columns"]:
    """For each target, how much each patch of an image matters to ``embedding · target``.

    See `clipkit.models.explain.relevance.relevance`. Where patches are pooled by attention, the readout is the
    pooling's own weighted attention, where they are averaged, `clipkit.models.explain.relevance.patch_readout`. One
    forward pass and n backward passes; no parameter's gradient is touched.

    Args:
        model: in evaluation mode.
        pixels: of one image, as `DualEncoder.encode_image` takes them, ``[1, 3, height, width]``.
        targets: embeddings of texts, or differences between them.

    Raises:
        NoAttention: where the tower's attention cannot be read.
    """
    tokens = patch_tokens(model)
    rows, columns = (length // side for length, side in zip(pixels.shape[-2:], tokens.patch, strict=True))
    last: list[Any] = []
    hook = tokens.layers[-1].register_forward_hook(lambda _, __, output: last.append(output))
    try:
        with torch.enable_grad(), AttentionWatch() as seen:
            embedding = model.encode_image(pixels)[0]
    finally:
        hook.remove()
    count = tokens.prefix + rows * columns
    pooled = tokens.pooling == "attention"
    lengths = [part.shape[-1] for part in seen.maps]
    # timm leaves the tokens before the patches out of the pooling.
    if lengths not in ([count] * len(tokens.layers) + [end] * pooled for end in (count, count - tokens.prefix)):
        raise _none("its layers attend in a way of their own")
    wanted = [*seen.maps, *last] if tokens.pooling == "mean" else seen.maps
    maps = []
    for target in targets:
        with torch.enable_grad():
            score = embedding @ target.to(embedding)
        gradients = torch.autograd.grad(score, wanted, retain_graph=True)
        layers = [weighted_attention(a[0].detach(), g[0]) for a, g in zip(seen.maps, gradients, strict=False)]
        if pooled:
            readout = layers.pop().sum(0)
            readout = F.pad(readout, (count - len(readout), 0))
        elif tokens.pooling == "mean":
            readout = patch_readout(last[0][0].detach(), gradients[-1][0], tokens.prefix)
        else:
            readout = torch.zeros(count).to(layers[0])
            readout[0] = 1
            # The last layer may have computed what is read and nothing else; to the score nothing else matters.
            layers[-1] = F.pad(layers[-1], (0, 0, 0, count - len(layers[-1])))
        maps.append(relevance(layers, readout)[tokens.prefix :].view(rows, columns))
    return torch.stack(maps)
