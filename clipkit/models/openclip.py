"""Towers from open_clip: by configuration, by name, or from a local folder in open_clip's form."""

import gzip
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipkit.core import ClipkitError, Side, atomic_write, did_you_mean, explain_validation, read_json, write_json
from clipkit.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from clipkit.models import openclip_training
from clipkit.models.dual_encoder import MODEL_FILE, DualEncoder, Tokenizer
from clipkit.models.layers import Layout, openclip_layouts
from clipkit.models.openclip_fast import speed_up
from clipkit.models.settings import ModelConfig

__all__ = ["OpenClipEncoder", "load_openclip_tokenizer"]

OPENCLIP_CONFIG = "open_clip_config.json"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
TEXT_BACKBONE = "text_backbone"  # config.json of a Hugging Face text tower, so that no hub is asked for it


class OpenClipEncoder(DualEncoder):
    """An open_clip `CLIP` or `CustomTextCLIP` behind the common face; made by the class methods below."""

    def __init__(self, model: Any, model_cfg: dict[str, Any], tokenizer: Tokenizer, preprocess: Preprocess):
        self.model_cfg = model_cfg
        self._recompute = False
        self._patch_dropout = float(model_cfg["vision_cfg"].get("patch_dropout") or 0)
        if hasattr(model.visual, "patch_dropout"):
            model.visual.patch_dropout = openclip_training.PatchDropout(self._patch_dropout)
        super().__init__(
            speed_up(model),
            tokenizer,
            preprocess,
            context_length=_context_length(model_cfg),
            embed_dim=model_cfg["embed_dim"],
            activation="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> "OpenClipEncoder":
        """Random weights for an architecture of one's own."""
        model_cfg = config.model_dump(exclude_none=True)
        if "hf_model_name" in model_cfg["text_cfg"]:  # open_clip would take its own byte-pair encoding
            model_cfg["text_cfg"].setdefault("hf_tokenizer_name", model_cfg["text_cfg"]["hf_model_name"])
        model = _build(model_cfg)
        tokenizer = load_openclip_tokenizer(model_cfg, None)
        return cls(model, model_cfg, tokenizer, _preprocess({"size": _image_size(model)}))

    @classmethod
    def from_name(cls, name: str, tag: str | None) -> "OpenClipEncoder":
        """A named architecture, with random weights or with those of a tag (which open_clip downloads)."""
        model_cfg = open_clip.get_model_config(name)
        if model_cfg is None:
            raise ClipkitError(f"open_clip has no model {name!r}{did_you_mean(name, open_clip.list_models())}")
        if tag is None:
            model = _build(model_cfg)
            preprocess_cfg: dict[str, Any] = {}
        else:
            tags = open_clip.list_pretrained_tags_by_model(name)
            weights = open_clip.get_pretrained_cfg(name, tag)
            if not weights:
                hint = did_you_mean(tag, tags)
                raise ClipkitError(
                    f"open_clip has no weights {tag!r} for {name}{hint}; it has {', '.join(tags) or 'none'}"
                )
            # The weights know their activation; open_clip itself only warns when the name's config says otherwise.
            model_cfg["quick_gelu"] = bool(weights.get("quick_gelu", model_cfg.get("quick_gelu", False)))
            with _plain_errors(f"open_clip:{name}/{tag}"):
                model: Any = open_clip.create_model(
                    name, tag, force_quick_gelu=model_cfg["quick_gelu"], require_pretrained=True
                )
            preprocess_cfg = dict(model.visual.preprocess_cfg)
        settings = {**_known(preprocess_cfg), "size": _image_size(model)}
        return cls(model, model_cfg, load_openclip_tokenizer(model_cfg, name), _preprocess(settings))

    @classmethod
    def from_folder(cls, folder: Path) -> "OpenClipEncoder":
        """A local folder with ``open_clip_config.json`` and weights, ours or anybody's."""
        config = read_json(folder / OPENCLIP_CONFIG)
        model_cfg = config.get("model_cfg")
        if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model_cfg):
            raise ClipkitError(f"{folder / OPENCLIP_CONFIG} lacks model_cfg with embed_dim, vision_cfg and text_cfg")
        text_cfg = model_cfg["text_cfg"]
        if (folder / TEXT_BACKBONE).is_dir():
            text_cfg = {**text_cfg, "hf_model_name": str(folder / TEXT_BACKBONE)}
        with _NothingDrawn():
            model = _build({**model_cfg, "text_cfg": text_cfg})
        _load_weights(model, folder)
        if (folder / MODEL_FILE).is_file():
            settings = read_json(folder / MODEL_FILE)["preprocess"]
        else:
            settings = {**_known(config.get("preprocess_cfg", {})), "size": _image_size(model)}
        return cls(model, model_cfg, load_openclip_tokenizer(model_cfg, None, folder), _preprocess(settings))

    def _image_features(self, pixels: Tensor) -> Tensor:
        return openclip_training.image_features(self.backbone, pixels, recompute=self._recompute and self.training)

    def _text_features(self, tokens: Tensor) -> Tensor:
        return openclip_training.text_features(self.backbone, tokens)

    def _needed_lengths(self, tokens: Tensor) -> Tensor:
        return openclip_training.needed_lengths(self.backbone, tokens)

    def layouts(self) -> dict[Side, Layout]:
        return openclip_layouts(self.backbone)

    def check_image_size(self, side: int) -> None:
        openclip_training.check_image_size(self.backbone.visual, side)

    def set_patch_dropout(self, share: float | None) -> None:
        dropout = getattr(self.backbone.visual, "patch_dropout", None)
        if share and dropout is None:
            raise ClipkitError("patch_dropout: this image tower has no patches to leave out; only open_clip's ViT has")
        if share and "image" in self.locked:
            raise ClipkitError("patch_dropout: a locked image tower sees whole images; leave it unset")
        if dropout is not None:
            dropout.prob = self._patch_dropout if share is None else share

    def set_gradient_checkpointing(self, on: bool) -> None:
        openclip_training.checkpoint_gradients(self.backbone, on)
        self._recompute = on

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.backbone.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return self.backbone.logit_bias

    def _save_backbone(self, folder: Path, weights: dict[str, Tensor]) -> None:
        with atomic_write(folder / "model.safetensors") as handle:
            try:
                save_file(weights, handle.name)
            except SafetensorError as error:  # how a full disk shows here
                raise OSError(str(error)) from error
        model_cfg = json.loads(json.dumps(self.model_cfg))
        if isinstance(self.tokenizer, SimpleTokenizer):
            shutil.copyfile(default_bpe(), folder / VOCABULARY)
        else:
            self.tokenizer.save_pretrained(str(folder))  # type: ignore[attr-defined]
            # With this key open_clip looks for the tokenizer in the folder itself.
            model_cfg["text_cfg"].setdefault("hf_tokenizer_name", "saved-beside-the-weights")
        if "hf_model_name" in model_cfg["text_cfg"]:
            self.backbone.text.config.save_pretrained(folder / TEXT_BACKBONE)
        shown = self.preprocess.model_dump(mode="json")
        preprocess_cfg = {key: shown[key] for key in ("size", "mean", "std", "interpolation", "resize_mode")}
        write_json(
            folder / OPENCLIP_CONFIG,
            {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg | {"fill_color": shown["fill"]}},
        )


class _NothingDrawn(TorchFunctionMode):
    """Within it, layers do not fill their weights at random: those from a folder replace every one of them.

    Drawing takes a second for 150 million parameters on a CPU, longer than reading them. Only whole functions of
    `torch.nn.init` are left out: what draws until it likes a number would not end without numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_):
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


def _build(model_cfg: dict[str, Any]) -> Any:
    model_cfg = json.loads(json.dumps(model_cfg))  # open_clip's constructors change what they are given
    for part, known in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        names = [f.name for f in fields(known)]
        for key in model_cfg[part]:
            if key not in names:
                raise ClipkitError(f"unknown key model.{part}.{key}{did_you_mean(key, names)}")
    if "multimodal_cfg" in model_cfg:
        raise ClipkitError("CoCa models (multimodal_cfg) are not supported: they are no dual encoders")
    text_cfg = model_cfg["text_cfg"]
    custom = model_cfg.pop("custom_text", False) or "hf_model_name" in text_cfg
    if "hf_model_name" in text_cfg and Path(text_cfg["hf_model_name"]).is_dir():
        text_cfg["hf_model_pretrained"] = False  # saved weights come next, or those that towers.text.init names
    with _plain_errors("the model"):
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**model_cfg)


def _load_weights(model: Any, folder: Path) -> None:
    names = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
        also = f"; {pickles[0]} is a pickle, convert it to safetensors first" if pickles else ""
        raise ClipkitError(f"{folder} has no weights (model.safetensors){also}")
    try:
        open_clip.load_checkpoint(model, str(path))
    except SafetensorError as error:
        raise ClipkitError(f"{path} is broken ({error}); it was cut or altered") from error
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise ClipkitError(f"{path} does not fit {folder / OPENCLIP_CONFIG}: {detail}") from error


def load_openclip_tokenizer(model_cfg: dict[str, Any], name: str | None, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of an open_clip configuration: from the model's folder, by the model's name, or the usual one."""
    text_cfg = model_cfg["text_cfg"]
    length = _context_length(model_cfg)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if folder is not None and text_cfg.get("hf_tokenizer_name"):
        with _plain_errors(f"the tokenizer in {folder}"):
            mode = text_cfg.get("tokenizer_mode")
            return HFTokenizer(
                str(folder), context_length=length, tokenizer_mode=mode, local_files_only=True, **options
            )
    if folder is not None and (folder / VOCABULARY).is_file():
        try:
            return SimpleTokenizer(str(folder / VOCABULARY), context_length=length, **options)
        except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
            raise ClipkitError(f"{folder / VOCABULARY} is broken: {error}") from error
    with _plain_errors("the tokenizer"):
        if text_cfg.get("hf_tokenizer_name"):
            mode = text_cfg.get("tokenizer_mode")
            return HFTokenizer(text_cfg["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **options)
        return open_clip.get_tokenizer(name) if name else SimpleTokenizer(context_length=length, **options)


def _context_length(model_cfg: dict[str, Any]) -> int:
    return model_cfg["text_cfg"].get("context_length") or CLIPTextCfg.context_length


def _known(preprocess_cfg: dict[str, Any]) -> dict[str, Any]:
    named = {"fill_color": "fill"}
    kept = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
    return {named.get(k, k): v for k, v in preprocess_cfg.items() if k in kept and v is not None}


def _preprocess(settings: dict[str, Any]) -> Preprocess:
    defaults = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
    try:
        return Preprocess.model_validate({**defaults, **settings})
    except ValidationError as error:
        raise ClipkitError(explain_validation(error, Preprocess, "preprocess.")) from error


def _image_size(model: Any) -> Any:
    size = model.visual.image_size
    return size if isinstance(size, int) else tuple(size)


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """One line for whatever the library says, and none of its chatter."""
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise ClipkitError(f"cannot make {what}: {detail}") from error
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
