"""Models made and loaded by name or folder, whichever library they come from.

open_clip and transformers are imported only when a model is made or loaded.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from clipkit.core import SIDES, ClipkitError, explain_validation, note
from clipkit.images import Preprocess
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.model_spec import model_folder, refuse_another, spec_of
from clipkit.models.settings import ModelConfig, TowersConfig
from clipkit.storage import kind_of, relative_to_artifact

if TYPE_CHECKING:
    import torch

__all__ = ["create_model", "download", "load_model", "load_model_of", "model_reference", "openai_templates"]

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def create_model(
    config: str | ModelConfig, preprocess: dict[str, Any] | None = None, towers: TowersConfig | None = None
) -> DualEncoder:
    """Make the model that a training run starts from.

    Args:
        config: an architecture of one's own; ``open_clip:NAME``, a named architecture with random weights; or anything
            that `load_model` takes, for starting from trained weights.
        preprocess: fields of `clipkit.images.Preprocess` to set differently.
        towers: whose ``init`` names models that the image or the text tower is taken from; an image tower brings its
            preprocessing.

    Raises:
        ClipkitError: where there is no such model, a setting does not exist, or a tower does not fit.
    """
    from clipkit.models.openclip import OpenClipEncoder

    if isinstance(config, ModelConfig):
        model = OpenClipEncoder.from_config(config)
    elif config.startswith("open_clip:") and "/" not in config:
        model = OpenClipEncoder.from_name(config.removeprefix("open_clip:"), None)
    else:
        model = load_model(config)
    starts = {side: getattr(towers or TowersConfig(), side).init for side in SIDES}
    for side in SIDES:
        if starts[side] is not None:
            from clipkit.models.tower_init import take_tower

            take_tower(model, side, starts[side], load_model)
    if preprocess:
        try:
            model.set_preprocess(Preprocess.model_validate({**model.preprocess.model_dump(), **preprocess}))
        except ValidationError as error:
            raise ClipkitError(explain_validation(error, Preprocess, "preprocess.")) from error
    backbone = config.text_cfg.get("hf_model_name") if isinstance(config, ModelConfig) else None
    if backbone and starts["text"] is None and any(Path(backbone).glob("*.safetensors")):
        note(f"the text tower starts from random weights; towers.text.init={backbone} takes those in the folder")
    return model


def load_model(spec: str | Path, device: "str | torch.device" = "cpu") -> DualEncoder:
    """Load a trained model, ready for inference.

    Args:
        spec: a run folder (its last weights), ``RUN@best`` or ``RUN@step-420`` (a checkpoint), a local folder in
            open_clip's or Hugging Face's form, ``open_clip:ViT-B-32/laion2b_s34b_b79k``, or
            ``hf:openai/clip-vit-base-patch32``. A local folder never touches the network.
        device: where to put it.

    Returns:
        The model in evaluation mode.

    Raises:
        ClipkitError: where there is no such model, or it is broken or of a kind that is not known.
    """
    spec = str(spec)
    folder = model_folder(spec)
    if folder is not None:
        model = _load_folder(folder)
    elif spec.startswith("open_clip:"):
        from clipkit.models.openclip import OpenClipEncoder

        name, _, tag = spec.removeprefix("open_clip:").partition("/")
        if not tag:
            raise ClipkitError(f"{spec} names no weights; say which: open_clip:{name}/TAG")
        model = OpenClipEncoder.from_name(name, tag)
    elif spec.startswith("hf:"):
        model = _load_folder(download(spec.removeprefix("hf:")))
    else:
        forms = "a run or model folder, open_clip:NAME/TAG, or hf:ORG/NAME"
        raise ClipkitError(f"no such model: {spec}; name {forms}")
    return model.eval().to(device)


def model_reference(model: DualEncoder, spec: str | Path, artifact: Path) -> dict[str, Any]:
    """What an artifact's manifest says of the model it was made with: fingerprint, and where to find it again."""
    folder = model_folder(spec)
    where = {"spec": str(spec)} if folder is None else {"path": relative_to_artifact(folder, artifact)}
    return {"fingerprint": model.fingerprint(), **where}


def load_model_of(
    manifest: dict[str, Any], artifact: Path, spec: str | None = None, device: "str | torch.device" = "cpu"
) -> DualEncoder:
    """Load the model that an artifact was made with, and make sure that it is that one.

    Args:
        manifest: of the artifact.
        artifact: its folder; the model's path in the manifest is relative to it.
        spec: load this one instead of looking where the manifest says.
        device: where to put it.

    Raises:
        ClipkitError: where the model is not found, or another stands in its place; both fingerprints are named.
    """
    spec = spec_of(manifest, artifact, spec)
    model = load_model(spec, device)
    refuse_another(manifest, artifact, spec, model.fingerprint())
    return model


def _load_folder(folder: Path) -> DualEncoder:
    if (folder / "open_clip_config.json").is_file():
        from clipkit.models.openclip import OpenClipEncoder

        return OpenClipEncoder.from_folder(folder)
    if (folder / "config.json").is_file():
        from clipkit.models.huggingface import HuggingFaceEncoder

        return HuggingFaceEncoder.from_folder(folder)
    kind = kind_of(folder)
    what = f"it holds {kind}" if kind else "it has neither open_clip_config.json nor config.json"
    raise ClipkitError(f"{folder} is no model: {what}")


def download(name: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Fetch the files of a model on the Hugging Face hub that match patterns; returns the local folder.

    Raises:
        ClipkitError: where it does not come.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ClipkitError(f"hf:{name} is no model name; it has the form hf:ORG/NAME")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        # huggingface_hub raises a dozen kinds here, httpx's among them; each means that the model did not come.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ClipkitError(f"cannot fetch hf:{name}: {reason}") from error


def openai_templates() -> list[str]:
    """The 80 ImageNet prompt templates of Radford et al. 2021 (as open_clip ships them), with ``{}`` for the class."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
