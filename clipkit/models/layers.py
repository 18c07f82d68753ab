"""Which parameters of a backbone belong to which tower and to which of its layers.

Freezing, layer-wise learning rates, and taking a tower from another model are all said in these terms.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipkit.core import Side

__all__ = ["Layout", "huggingface_layouts", "openclip_layouts", "under"]

BUILT_IN_TEXT = ("token_embedding", "positional_embedding", "cls_emb", "transformer", "ln_final", "text_projection")
# What libraries call the list of a text encoder's layers: BERT's kin, T5, M2M-100.
LAYER_LISTS = ("encoder.layer", "layer", "block", "layers")


@dataclass(frozen=True)
class Layout:
    """Where the parts of one tower stand in a backbone, as names of its modules and parameters.

    What is under `root` and in none of the parts is the stem: embeddings, positions, first convolutions.
    """

    root: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    """From the input to the output: transformer blocks, residual blocks, or timm's own groups."""
    head: tuple[str, ...]
    """What comes after the last layer: the last norm, pooling."""
    projection: tuple[str, ...]
    """What maps into the shared space; it stands under `head` too where pooling and projection are one module."""

    def depth(self, name: str) -> int:
        """0 for the stem, 1 … L for the layers, L + 1 for head and projection."""
        if under(name, self.head) or under(name, self.projection):
            return len(self.layers) + 1
        return next((i for i, parts in enumerate(self.layers, 1) if under(name, parts)), 0)

    def learning(self, unlocked_layers: int) -> tuple[str, ...]:
        """What learns in a locked tower: the projection, and the last layers with what comes after them."""
        if unlocked_layers == 0:
            return self.projection
        return sum(self.layers[-unlocked_layers:], self.projection + self.head)


def under(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name is one of `parts` or inside one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def openclip_layouts(backbone: Any) -> dict[Side, Layout]:
    """The towers of an open_clip `CLIP` or `CustomTextCLIP`."""
    return {"image": _image_layout(backbone.visual), "text": _text_layout(backbone)}


def _image_layout(visual: Any) -> Layout:
    if hasattr(visual, "trunk"):
        return _timm_layout(visual)
    if hasattr(visual, "attnpool"):
        blocks = [f"visual.layer{i}.{j}" for i in (1, 2, 3, 4) for j in range(len(getattr(visual, f"layer{i}")))]
        return Layout(("visual",), tuple((name,) for name in blocks), ("visual.attnpool",), ("visual.attnpool.c_proj",))
    head = ("visual.ln_post", "visual.attn_pool", "visual.attn_pool_contrastive")
    return Layout(("visual",), _blocks("visual.transformer.resblocks", visual.transformer), head, ("visual.proj",))


def _text_layout(backbone: Any) -> Layout:
    if not hasattr(backbone, "text"):
        layers = _blocks("transformer.resblocks", backbone.transformer)
        return Layout(BUILT_IN_TEXT, layers, ("ln_final",), ("text_projection",))
    text = backbone.text
    if not hasattr(text, "pooler"):
        layers = _blocks("text.transformer.resblocks", text.transformer)
        return Layout(("text",), layers, ("text.ln_final",), ("text.text_projection",))
    encoder = text.transformer
    where, layers = next(
        (f"text.transformer.{name}", module)
        for name, module in encoder.named_modules()
        if name.endswith(LAYER_LISTS) and isinstance(module, nn.ModuleList)
    )
    head = tuple(f"text.transformer.{name}" for name in ("pooler", "final_layer_norm", "layer_norm"))
    return Layout(("text",), tuple((f"{where}.{i}",) for i in range(len(layers))), head, ("text.proj",))


def _blocks(where: str, transformer: Any) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{where}.{i}",) for i in range(len(transformer.resblocks)))


def _timm_layout(visual: Any) -> Layout:
    """timm says itself how a network falls into groups: its first one is the stem, its last one the norm and head."""
    from timm.models import group_parameters

    trunk = visual.trunk
    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    classifier = next((name for name, m in trunk.named_modules() if name and m is trunk.get_classifier()), None)
    projection = ("visual.head",) if classifier is None else ("visual.head", f"visual.trunk.{classifier}")
    # timm puts the last norm with the last block, or pooling and head into a group of their own.
    head = tuple(f"visual.trunk.{name}" for name in ("norm", "fc_norm", "attn_pool", "head"))
    named = [[f"visual.trunk.{name}" for name in groups[i]] for i in sorted(groups)]
    layers = [tuple(n for n in names if not under(n, head + projection)) for names in named[1:]]
    return Layout(("visual",), tuple(filter(None, layers)), head, projection)


def huggingface_layouts(backbone: Any) -> dict[Side, Layout]:
    """The towers of a transformers `CLIPModel` or `SiglipModel`."""

    def blocks(part: str, module: Any) -> tuple[tuple[str, ...], ...]:
        return tuple((f"{part}.encoder.layers.{i}",) for i in range(len(module.encoder.layers)))

    image, text = blocks("vision_model", backbone.vision_model), blocks("text_model", backbone.text_model)
    # SigLIP's image tower ends in attention pooling, without a projection; its text tower's head is one.
    siglip = backbone.config.model_type == "siglip"
    return {
        "image": Layout(
            ("vision_model", "visual_projection"),
            image,
            ("vision_model.post_layernorm", "vision_model.head"),
            ("visual_projection",),
        ),
        "text": Layout(
            ("text_model", "text_projection"),
            text,
            ("text_model.final_layer_norm",),
            ("text_model.head",) if siglip else ("text_projection",),
        ),
    }
