"""The settings of a model: its architecture, and how each of its two towers is made."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from clipkit.core import Positive, Settings

__all__ = ["ModelConfig", "TowerConfig", "TowersConfig"]


class ModelConfig(Settings):
    """An architecture in open_clip's terms, trained from scratch."""

    embed_dim: Positive
    """Dimension of the shared space."""
    vision_cfg: dict[str, Any]
    """open_clip's `CLIPVisionCfg`: layers, width, patch_size, image_size, ..., or a timm model's name."""
    text_cfg: dict[str, Any]
    """open_clip's `CLIPTextCfg`: context_length, width, heads, layers, ..."""
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float | None = None
    """Logarithm of the first factor on the similarities; ln(1/0.07) where not set."""
    init_logit_bias: float | None = None
    """Set it (SigLIP: -10) for the sigmoid loss."""


class TowerConfig(Settings):
    """How one of the two towers is trained."""

    init: str | None = None
    """Take this tower's weights from another model (`clipkit.load_model`), such as a pretrained image tower, or for
    text a Hugging Face text model's folder."""
    lock: bool = False
    """Keep it as it is (locked-image tuning: Zhai et al. 2022, "LiT"); only its projection into the shared space and
    `unlocked_layers` learn."""
    unlocked_layers: Annotated[int, Field(ge=0)] = 0
    """Of a locked tower, how many of its last layers learn all the same."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of each layer is this times that of the layer above it (Clark et al. 2020, "ELECTRA")."""

    @model_validator(mode="after")
    def _locked(self) -> "TowerConfig":
        if self.unlocked_layers and not self.lock:
            raise ValueError("unlocked_layers is for a tower with lock=true")
        return self


class TowersConfig(Settings):
    """Both towers."""

    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass (Chen et al. 2016): a third more work, less memory."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of an image's patches that training leaves out (Li et al. 2023, "FLIP"); where not set, as the model
    says."""
