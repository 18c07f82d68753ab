"""Start one tower of a model from another model's weights."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import QuickGELU
from torch import Tensor

from clipkit.core import ClipkitError, Side, note, read_json
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.huggingface import MODEL_TYPES, load_text_model
from clipkit.models.layers import under
from clipkit.models.model_spec import model_folder
from clipkit.models.openclip import OpenClipEncoder

__all__ = ["take_tower"]

# Settings that change what equal weights compute, and do not show in their shapes.
VISION_SETTINGS = {
    "head_width",
    "attn_pooler_heads",
    "pool_type",
    "final_ln_after_pool",
    "timm_model_name",
    "timm_pool",
}
TEXT_SETTINGS = {"heads", "no_causal_mask", "pool_type", "final_ln_after_pool", "eos_id", "pad_id", "hf_pooler_type"}
CUSTOM_SETTINGS = {"norm_kwargs", "act_kwargs", "scaled_cosine_attn"}
HUGGING_FACE_SETTINGS = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")


def take_tower(model: DualEncoder, side: Side, spec: str, load: Callable[[str], DualEncoder]) -> None:
    """Give a model's tower the weights of another model's, and with an image tower the preprocessing it was trained on.

    The projection into the shared space is taken where its shape is the same, and otherwise left as it is.

    Args:
        model: changed in place.
        side: which tower.
        spec: anything that `clipkit.models.load_model` takes; for texts also a local folder with one of Hugging Face's
            text models, such as XLM-R, for a model whose ``text_cfg.hf_model_name`` is such a model.
        load: `clipkit.models.load_model`, which itself may start a tower.

    Raises:
        ClipkitError: where there is no such model, or its tower has another shape, settings or tokenizer.
    """
    where = f"towers.{side}.init={spec}"
    folder = model_folder(spec)
    if side == "text" and folder is not None and _model_type(folder) not in (None, *MODEL_TYPES):
        _take_text_model(model, folder, where)
        return
    source = load(spec)
    if type(source) is not type(model):
        raise ClipkitError(f"{where} is of another library than the model; both must be open_clip's, or both not")
    layouts = {m: m.layouts()[side] for m in (model, source)}
    ours, theirs = (_states(m, side) for m in (model, source))
    projection = tuple(name.removeprefix("text.") for name in layouts[model].projection + layouts[source].projection)
    inside = {name: t for name, t in ours.items() if not under(name, projection)}
    _same_shapes(inside, {name: t for name, t in theirs.items() if not under(name, projection)}, where)
    _same_settings(_settings(model, side), _settings(source, side), where)
    if side == "text" and model.tokenizer_state != source.tokenizer_state:
        raise ClipkitError(f"{where} has another tokenizer; set the same model.text_cfg.hf_tokenizer_name and lengths")
    outside = ours.keys() - inside.keys()
    if {(n, ours[n].shape) for n in outside} == {(n, t.shape) for n, t in theirs.items() if under(n, projection)}:
        inside = ours
    else:
        note(f"{where}: its projection has another shape than the model's, which starts from random weights")
    _copy(inside, theirs)
    if side == "image":
        model.set_preprocess(source.preprocess)


def _take_text_model(model: DualEncoder, folder: Path, where: str) -> None:
    text: Any = getattr(model.backbone, "text", None)
    if not hasattr(text, "pooler"):
        raise ClipkitError(f"{where} is a Hugging Face text model; set model.text_cfg.hf_model_name={folder} too")
    loaded, missing = load_text_model(folder)
    theirs = {name: t for name, t in loaded.state_dict().items() if name not in missing}
    # Published text models come from masked language modelling, which has no use for BERT's pooling layer.
    ours = {n: t for n, t in text.transformer.state_dict().items() if n in theirs or not n.startswith("pooler.")}
    _same_shapes(ours, {name: t for name, t in theirs.items() if not name.startswith("pooler.") or name in ours}, where)
    _same_settings(_of_config(text.config), _of_config(loaded.config), where)
    if len(ours) < len(text.transformer.state_dict()):
        note(f"{where}: it has no pooling layer; the model's starts from random weights")
    _copy(ours, theirs)


def _model_type(folder: Path) -> str | None:
    """Of a folder in Hugging Face's form."""
    if (folder / "open_clip_config.json").is_file() or not (folder / "config.json").is_file():
        return None
    return read_json(folder / "config.json").get("model_type")


def _states(model: DualEncoder, side: Side) -> dict[str, Tensor]:
    """A tower's parameters and buffers; texts named alike whether the tower is a module or taken apart."""
    root = model.layouts()[side].root
    return {n.removeprefix("text."): t for n, t in model.backbone.state_dict().items() if under(n, root)}


def _same_shapes(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    for name in (*ours, *theirs):
        shapes = [str(list(side[name].shape)) if name in side else "missing" for side in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ClipkitError(f"{where} does not fit the model: {name} is {shapes[0]} there and {shapes[1]} here")


def _same_settings(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    for name in ours:
        if ours[name] != theirs[name]:
            raise ClipkitError(f"{where} does not fit the model: {name} is {theirs[name]} there and {ours[name]} here")


def _settings(model: DualEncoder, side: Side) -> dict[str, Any]:
    if not isinstance(model, OpenClipEncoder):
        config = model.backbone.config
        return _of_config(config.vision_config if side == "image" else config.text_config)
    part, kind = ("vision_cfg", CLIPVisionCfg) if side == "image" else ("text_cfg", CLIPTextCfg)
    given, wanted = model.model_cfg[part], VISION_SETTINGS | TEXT_SETTINGS | CUSTOM_SETTINGS
    settings = {f.name: given.get(f.name, f.default) for f in fields(kind) if f.name in wanted}
    root = model.layouts()[side].root
    modules = [m for name, m in model.backbone.named_modules() if under(name, root)]
    return settings | {"quick_gelu": any(isinstance(m, QuickGELU) for m in modules)}


def _of_config(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in HUGGING_FACE_SETTINGS}


@torch.no_grad()
def _copy(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
