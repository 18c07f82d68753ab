"""CLIP and SigLIP models in Hugging Face's form, from a local folder."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from clipkit.core import ClipkitError, Side, read_json
from clipkit.images import Preprocess
from clipkit.models.dual_encoder import MODEL_FILE, DualEncoder
from clipkit.models.layers import Layout, huggingface_layouts

__all__ = ["MODEL_TYPES", "HuggingFaceEncoder", "load_huggingface_tokenizer", "load_text_model"]

# Dual encoders whose text tower pools a position that padding cannot reach (CLIP: the first end token under a causal
# mask; SigLIP: the last position, trained on padded texts), so tokens alone say everything.
MODEL_TYPES = ("clip", "siglip")
PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class PaddedTokenizer:
    """A Hugging Face tokenizer called as open_clip's are: texts to int64 ``[n, context_length]``."""

    def __init__(self, tokenizer: Any, context_length: int):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        if not texts:
            return torch.zeros((0, self.context_length), dtype=torch.int64)
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return encoded["input_ids"]


class HuggingFaceEncoder(DualEncoder):
    """A transformers `CLIPModel` or `SiglipModel` behind the common face."""

    def __init__(self, model: Any, tokenizer: PaddedTokenizer, processor: Any, preprocess: Preprocess):
        self.processor = processor
        config = model.config
        super().__init__(
            model,
            tokenizer,
            preprocess,
            context_length=tokenizer.context_length,
            embed_dim=getattr(config, "projection_dim", None) or config.vision_config.hidden_size,
            activation=config.vision_config.hidden_act,
        )
        if config.model_type == "siglip":
            self.embed_dim = config.vision_config.hidden_size

    @classmethod
    def from_folder(cls, folder: Path) -> "HuggingFaceEncoder":
        """Load a folder as `save_pretrained` writes it; the network is not touched.

        Raises:
            ClipkitError: where a file is missing or broken, or the model is no CLIP or SigLIP.
        """
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type not in MODEL_TYPES:
            raise ClipkitError(f"{folder} holds a {model_type!r} model; known are {', '.join(MODEL_TYPES)}")
        local: dict[str, Any] = {"local_files_only": True}
        disable_progress_bar()  # of reading weights; it would appear where there is no terminal, too
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = AutoConfig.from_pretrained(folder, **local)
                model = AutoModel.from_pretrained(folder, config=config, use_safetensors=True, **local)
                tokenizer = AutoTokenizer.from_pretrained(folder, **local)
                processor = AutoImageProcessor.from_pretrained(folder, **local)
        except Exception as error:
            # transformers raises OSError, ValueError, KeyError and safetensors' own kinds for a folder that lacks a
            # file or holds a broken one; the user needs the folder and the reason.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ClipkitError(f"cannot load the model in {folder}: {reason}") from error
        length = config.text_config.max_position_embeddings
        if (folder / MODEL_FILE).is_file():
            preprocess = Preprocess.model_validate(read_json(folder / MODEL_FILE)["preprocess"])
        else:
            preprocess = _preprocess_of(processor, folder)
        return cls(model.float(), PaddedTokenizer(tokenizer, length), processor, preprocess)

    def _image_features(self, pixels: Tensor) -> Tensor:
        own = self.backbone.config.vision_config.image_size
        other = tuple(pixels.shape[-2:]) != (own, own)
        return self.backbone.get_image_features(pixel_values=pixels, interpolate_pos_encoding=other).pooler_output

    def _text_features(self, tokens: Tensor) -> Tensor:
        return self.backbone.get_text_features(input_ids=tokens).pooler_output

    def _needed_lengths(self, tokens: Tensor) -> Tensor:
        config = self.backbone.config
        if config.model_type != "clip":  # SigLIP pools the last position, without any mask
            return tokens.new_full((len(tokens),), tokens.shape[1])
        # Under CLIP's causal mask. With 2, a wrong value of old configurations, it pools the largest token.
        end = config.text_config.eos_token_id
        return (tokens.argmax(1) if end == 2 else (tokens == end).int().argmax(1)) + 1

    def layouts(self) -> dict[Side, Layout]:
        return huggingface_layouts(self.backbone)

    def check_image_size(self, side: int) -> None:
        vision = self.backbone.config.vision_config
        if side != vision.image_size and side % vision.patch_size:
            raise ClipkitError(f"phases.image_size={side}: this image tower needs a multiple of {vision.patch_size}")

    def set_patch_dropout(self, share: float | None) -> None:
        if share:
            raise ClipkitError("patch_dropout: transformers' image towers have none; only open_clip's ViT has")

    def set_gradient_checkpointing(self, on: bool) -> None:
        if on:
            self.backbone.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.backbone.activation_checkpointing_disable()

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.backbone.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return getattr(self.backbone, "logit_bias", None)

    def _save_backbone(self, folder: Path, weights: dict[str, Tensor]) -> None:
        # As the backbone's own save_pretrained does, which would however note its dtype, not that of these weights,
        # and then fp32 masters of a bf16 model were cut to bf16 when they are loaded.
        config = copy.deepcopy(self.backbone.config)
        config.architectures = [type(self.backbone).__name__]
        config.dtype = str(weights["logit_scale"].dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        try:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk shows here
            raise OSError(str(error)) from error
        self.tokenizer.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        self.processor.save_pretrained(folder)


def load_huggingface_tokenizer(folder: Path) -> PaddedTokenizer:
    """The tokenizer of a local folder with the context length of its model; no weights are read.

    Raises:
        ClipkitError: where a file is missing or broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return PaddedTokenizer(tokenizer, config.text_config.max_position_embeddings)
    except Exception as error:  # as in `HuggingFaceEncoder.from_folder`
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ClipkitError(f"cannot load the tokenizer in {folder}: {reason}") from error


def load_text_model(folder: Path) -> tuple[Any, set[str]]:
    """A text encoder such as XLM-R or BERT from a local folder, and the names of weights that the folder lacks.

    Raises:
        ClipkitError: where a file is missing or broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # as in `HuggingFaceEncoder.from_folder`
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ClipkitError(f"cannot load the text model in {folder}: {reason}") from error
    model, info = loaded
    missing = set(info["missing_keys"])
    if model.config.is_encoder_decoder:
        return model.encoder, {name.removeprefix("encoder.") for name in missing}
    return model, missing


def _preprocess_of(processor: Any, folder: Path) -> Preprocess:
    """Translate an image processor's settings; refuse those that would not give the same pixels."""
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    shortest = getattr(size, "shortest_edge", None)
    if shortest is not None:
        wanted = (crop.height, crop.width) if crop is not None else None
        if wanted != (shortest, shortest):
            raise ClipkitError(f"{folder}: resizing to {shortest} and cropping {wanted} is not supported")
        mode, target = "shortest", (shortest, shortest)
    else:
        mode, target = "squash", (size.height, size.width)
    if abs(processor.rescale_factor - 1 / 255) > 1e-9 or not processor.do_normalize:
        raise ClipkitError(f"{folder}: an image processor without rescaling by 1/255 and normalising is not supported")
    return Preprocess(
        size=target,
        resize_mode=mode,
        interpolation=PILLOW_FILTERS.get(int(processor.resample), "bicubic"),  # type: ignore[arg-type]
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )
