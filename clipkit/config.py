"""Settings of a training run: typed models, recipe files, ``--set`` overrides.

Precedence: defaults < recipe YAML < ``--set a.b=c``, each later one over the earlier. Unknown keys are errors that
name the nearest key. What a run resolved to stands in its folder as ``config.yaml`` and can be trained from again.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clipkit.errors import ClipkitError, did_you_mean

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "changed_keys",
    "dump_yaml",
    "explain_validation",
    "load_config",
    "load_yaml",
]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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


class AugmentConfig(Settings):
    """Random changes of training images, each a function of (seed, position) alone."""

    shift: Share = 0.0
    """Largest shift in each direction, as a share of the side; the border is repeated."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Share of the image's area that a random crop keeps (torchvision's RandomResizedCrop, aspect kept)."""
    flip: Share = 0.0
    """Chance of a horizontal mirror image."""
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Strengths of torchvision's ColorJitter."""
    grayscale: Share = 0.0
    """Chance of losing the colours."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError("scale must be two shares of the area in order, such as [0.9, 1.0]")
        return self


class PartConfig(Settings):
    """One of several sets of shards that are trained on together."""

    shards: str
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of the samples, in any unit; all parts have one or none has."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"shards": value} if isinstance(value, str) else value


class DataConfig(Settings):
    """Where samples come from and how they are turned into batches."""

    train: str | list[PartConfig] | None = None
    """Shards to train on: a folder, a tar or a brace pattern, also as URLs, or ``pipe:COMMAND``; or several of them,
    one after another in an epoch, or mixed by weight."""
    val: str | None = None
    """Any source (list, folder with captions, shards) for retrieval while training."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes per rank; 0 loads in threads of the training process. Where not set: 0 with up to 4 cores per
    rank, where threads are as fast and copy nothing, else a process per core, at most 8."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """That decode, in each loader process; where not set, 1, or as many as cores where `workers` is 0."""
    window: Positive | None = None
    """How many samples are shuffled among each other; where not set, all of them, or 65,536 where shards are remote."""
    replacement: bool = False
    """Draw every sample from the whole set, instead of each once per epoch."""
    caption: Literal["random", "first"] = "random"
    """Which of an image's captions stands for it."""
    caption_weights: str | None = None
    """A column of the shards' json with a number per caption: how often each is drawn."""
    templates: list[str] = []
    """Texts to put the caption and other columns into, such as ``a photo of {caption}``; one is drawn each time."""
    missing: Literal["skip", "stop"] = "skip"
    """What to do with samples that have no image or no caption."""
    max_bad_share: Share = 0.1
    """The run stops where more of the samples than this cannot be used."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds after which a sample that is not read is given up, with the name of its shard."""
    cache_gib: Annotated[float, Field(gt=0)] = 64.0
    """Most GiB of remote shards that are kept on the local disk."""
    decode: Literal["fast", "exact", "gpu"] = "fast"
    """fast: large JPEGs are decoded to little more than is needed (`clipkit.augment`); exact: open_clip's pixels; gpu:
    baseline JPEGs are decoded by the GPU (nvJPEG), everything else as under fast."""
    augment: AugmentConfig = AugmentConfig()

    @property
    def parts(self) -> list[PartConfig]:
        """`train` as a list, whichever way it was written."""
        return [PartConfig(shards=self.train)] if isinstance(self.train, str) else list(self.train or [])

    @model_validator(mode="after")
    def _all_or_none(self) -> "DataConfig":
        if len({part.weight is None for part in self.parts}) > 1:
            raise ValueError("give every part of train a weight, or none of them")
        return self


class OptimConfig(Settings):
    """AdamW with decoupled decay (Loshchilov & Hutter 2019), linear warmup, cosine to `min_lr`."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Cut to a fifth of the run where the run is short."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices and kernels only: gains, biases, the scale and position embeddings are spared."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0


class LossConfig(Settings):
    """The contrastive objective."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    multi_positive: bool = True
    """Captions of one image, and identical captions, are not negatives of each other."""
    max_logit_scale: Annotated[float, Field(gt=0)] = 100.0
    """Upper clamp of the factor on the similarities (Radford et al. 2021)."""


class CheckpointConfig(Settings):
    """When a run saves itself. The end of the run is always saved."""

    every_steps: Positive = 1000
    keep: Positive = 2
    """How many of the last checkpoints stay."""


class LogConfig(Settings):
    """How often the run reports."""

    every_steps: Positive = 10
    val_every_steps: Positive | None = None
    """Retrieval on `data.val`; only at the end where not set."""


class TrainConfig(Settings):
    """Everything that a training run is made of."""

    model: str | ModelConfig
    """An architecture, ``open_clip:NAME`` (random weights), or trained weights to start from (`clipkit.load_model`)."""
    preprocess: dict[str, Any] = {}
    """Fields of `clipkit.preprocess.Preprocess` to set differently from the model's own."""
    data: DataConfig = DataConfig()
    batch_size: Positive = 256
    """Over all ranks together."""
    steps: Positive | None = None
    samples: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """`steps`, `samples` and `epochs` say the same thing; the one set last wins."""
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device is fast at it."""
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same thing; keep one")
        return self

    def total_steps(self, dataset_size: int | None) -> int:
        """How many steps the run has, given how many samples an epoch has. Epochs are filled up to a whole batch.

        Raises:
            ClipkitError: where no length is set.
        """
        if self.steps:
            return self.steps
        if self.samples:
            return max(1, round(self.samples / self.batch_size))
        if self.epochs:
            if dataset_size is None:
                raise ClipkitError("nobody knows how long an epoch of a pipe is; set steps=N or samples=N")
            return max(1, math.ceil(self.epochs * dataset_size / self.batch_size))
        raise ClipkitError("the recipe sets no length; add --set steps=N (or samples=N, or epochs=N)")


LENGTHS = ("steps", "samples", "epochs")
# What may differ between a run and its resumption: the length, the logging, the cadence, the hands that load, and the
# place of the shards (that they are the same ones is told by their identity in the checkpoint).
CHANGEABLE = (
    *LENGTHS,
    "checkpoint",
    "log",
    *(f"data.{name}" for name in ("train", "workers", "threads", "timeout", "cache_gib", "max_bad_share")),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; here it is a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Raises:
        ClipkitError: naming `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ClipkitError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(config: BaseModel) -> str:
    """The settings as YAML that `load_config` reads back to the same."""
    values = config.model_dump(mode="json")
    # A length that is not set is left out; any other null is a choice, such as no gradient clipping.
    kept = {key: value for key, value in values.items() if value is not None or key not in LENGTHS}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Resolve a recipe with overrides.

    Args:
        recipe: a YAML file.
        overrides: strings ``a.b=value``; values are YAML, so ``[0.9, 1.0]``, ``1e-3`` and ``null`` mean what they say.

    Raises:
        ClipkitError: for a file that cannot be read, an unknown key (naming the nearest) or a wrong value.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
    except OSError as error:
        raise ClipkitError(f"cannot read the recipe {recipe}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClipkitError(f"the recipe {recipe} is not UTF-8 text: {error}") from error
    values = load_yaml(text, str(recipe))
    if not isinstance(values, dict):
        raise ClipkitError(f"{recipe} is no recipe: it has no keys")
    for override in overrides:
        _apply(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ClipkitError(explain_validation(error, TrainConfig)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ClipkitError(f"--set takes KEY=VALUE, as in --set optim.lr=1e-3; got {override!r}")
    if path[0] in LENGTHS:
        for name in LENGTHS:
            values.pop(name, None)
    node = values
    for part in path[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = {}
        node[part] = child
        node = child
    node[path[-1]] = load_yaml(text, f"--set {override}")


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a settings model has."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def explain_validation(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for the first thing that is wrong, in the user's keys."""
    # Of a union's complaints the deepest one is about the branch that the user meant.
    problem = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    # pydantic puts the union's branch into the location; the user never wrote that.
    parts = [str(p) for p in problem["loc"] if p not in ("str", "ModelConfig", "list[PartConfig]")]
    key = prefix + ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{did_you_mean(key, known_keys(model, prefix))}"
    if problem["type"] == "missing":
        return f"{key} is not set"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, Mapping) else f", got {given!r}"
    return f"{key}: {message}{shown}" if key else message


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, child in value.items() for k, v in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def changed_keys(before: TrainConfig, after: TrainConfig, allowed: Iterable[str] = CHANGEABLE) -> list[str]:
    """The keys in which two configurations differ, leaving out those that a resumption may change."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and not any(key == a or key.startswith(f"{a}.") for a in allowed)
    )
