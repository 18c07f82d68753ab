"""The settings of a training run as typed models: what a recipe may say, and what it means.

Reading recipes, overrides and their errors are `clipkit.training.recipe`. Unknown keys are errors.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clipkit.core import ClipkitError, Positive, Settings, Share
from clipkit.images import AugmentConfig
from clipkit.models import ModelConfig, TowersConfig

__all__ = [
    "CHANGEABLE",
    "LENGTHS",
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "GuardConfig",
    "LogConfig",
    "LossConfig",
    "OptimConfig",
    "PartConfig",
    "PhaseConfig",
    "TrainConfig",
    "ValidationConfig",
]


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
    """fast: large JPEGs are decoded to little more than is needed (`clipkit.images.augment`); exact: open_clip's
    pixels; gpu: baseline JPEGs are decoded by the GPU (nvJPEG), everything else as under fast."""
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


class PhaseConfig(Settings):
    """A stretch of the run that sees smaller images or shorter texts (Li et al. 2023, "CLIPA")."""

    until: Annotated[float, Field(gt=0, lt=1)]
    """Where it ends, as a share of the run; after the last phase everything is as the model says."""
    image_size: Positive | None = None
    """Side of the images in pixels; positions are interpolated."""
    context_length: Positive | None = None
    """Of the texts, in tokens."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class OptimConfig(Settings):
    """The optimizer, linear warmup, cosine to `min_lr`."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw: Loshchilov & Hutter 2019; muon: Jordan et al. 2024 for the towers' matrices, AdamW for everything else."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Cut to a fifth of the run where the run is short."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices and kernels only: gains, biases, the scale and position embeddings are spared."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    momentum: Share = 0.95
    """Of Muon."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights (Polyak & Juditsky 1992), which then is what is
    evaluated and published; it ramps up as (1 + step) / (10 + step)."""

    @property
    def schedule(self) -> dict[str, Any]:
        """What `clipkit.training.learning_rate` wants to know."""
        return {"peak": self.lr, "warmup": self.warmup_steps, "floor": self.min_lr}


class DistillConfig(Settings):
    """Learn from a teacher's stored embeddings of the same samples (written by `clipkit embed`), beside the data."""

    teacher: str
    """The embeddings folder; it must hold every image and caption that is trained on."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the teacher's term; the contrastive one has 1."""
    scale: Annotated[float, Field(gt=0)] = 100.0
    """The factor on the teacher's similarities."""


class LossConfig(Settings):
    """The contrastive objective."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    form: Literal["tiled", "plain"] = "tiled"
    """tiled: never holds the N x N similarities; plain: holds them. Both give the same."""
    exchange: Literal["gather", "ring"] = "gather"
    """Between ranks. gather: everybody's texts at once; ring: one rank's at a time, so that memory does not grow with
    the number of ranks (tiled only)."""
    multi_positive: bool = True
    """Captions of one image, and identical captions, are not negatives of each other."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over the whole batch (infonce only)."""
    max_logit_scale: Annotated[float, Field(gt=0)] = 100.0
    """Upper clamp of the factor on the similarities (Radford et al. 2021)."""
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> "LossConfig":
        if self.exchange == "ring" and self.form == "plain":
            raise ValueError("exchange=ring needs form=tiled")
        if self.label_smoothing and self.kind != "infonce":
            raise ValueError("label_smoothing is for kind=infonce; the sigmoid loss has no softmax to smooth")
        return self


class GuardConfig(Settings):
    """What happens where a loss or gradient is not finite: all ranks skip the step and its samples are named."""

    patience: Positive = 3
    """That many such steps in a row, and the run does what `then` says."""
    then: Literal["rollback", "stop"] = "rollback"
    """rollback: to the last checkpoint, and on with the samples after the bad ones; stop: with an error."""
    max_rollbacks: Positive = 3
    """After so many the run stops."""


class ValidationConfig(Settings):
    """Measured while training, on all ranks, by the functions of `clipkit evaluate`; at the end of the run always."""

    retrieval: str | None = None
    """Any source with captions (list, folder, shards): recall at 1, 5 and 10 both ways."""
    zeroshot: str | None = None
    """A folder with a sub-folder of images per class: accuracy."""
    templates: Literal["plain", "openai80"] = "plain"
    """How classes are put into words."""
    every_steps: Positive | None = None
    """Only at the end of the run where not set."""
    best: str | None = None
    """Keep the checkpoint (``RUN@best``) where this figure was highest, such as ``image_retrieval_recall@1``."""
    precision: Literal["fp32", "auto", "bf16"] = "fp32"
    """Of the towers, as in `clipkit evaluate`."""


class CheckpointConfig(Settings):
    """When a run saves itself. The end of the run and a signal to stop are always saved."""

    every_steps: Positive | None = 1000
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Beside `every_steps`."""
    keep: Positive = 2
    """How many of the last checkpoints stay, beside the best one (`validation.best`)."""


class LogConfig(Settings):
    """How often the run reports."""

    every_steps: Positive = 10
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Beside metrics.jsonl."""


class TrainConfig(Settings):
    """Everything that a training run is made of."""

    model: str | ModelConfig
    """An architecture, ``open_clip:NAME`` (random weights), or trained weights to start from (`clipkit.load_model`)."""
    preprocess: dict[str, Any] = {}
    """Fields of `clipkit.images.Preprocess` to set differently from the model's own."""
    data: DataConfig = DataConfig()
    batch_size: Positive = 256
    """Over all ranks together."""
    steps: Positive | None = None
    samples: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """`steps`, `samples` and `epochs` say the same thing; the one set last wins."""
    seed: Annotated[int, Field(ge=0)] = 0
    micro_batch: Positive | None = None
    """Samples per rank that go through the towers at a time; the loss is over the whole batch all the same, at the
    price of a second forward pass (Gao et al. 2021, "GradCache")."""
    precision: Literal["auto", "fp32", "bf16", "amp_bf16"] = "auto"
    """bf16: the towers compute in bf16 weights, the optimizer keeps fp32 masters; amp_bf16: autocast, as open_clip does
    by default; auto: bf16 where the device is fast at it."""
    sharding: Literal["none", "full"] = "none"
    """none: every rank holds everything (DDP); full: weights, gradients and optimizer are divided (FSDP2)."""
    compile: bool = False
    """Compile the towers (torch.compile)."""
    towers: TowersConfig = TowersConfig()
    phases: list[PhaseConfig] = []
    """What the run sees first, in order of `until`."""
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same thing; keep one")
        if self.sharding == "full" and self.precision == "amp_bf16":
            raise ValueError("sharding=full computes in precision=bf16 or fp32, not under autocast")
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)):
            raise ValueError("phases must stand in the order of their until, each later than the one before")
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
# What may differ between a run and its resumption: the length, what is watched and kept, the hands that load, the ways
# to compute the same thing on other devices, and the place of the shards (that they are the same ones is told by their
# identity in the checkpoint).
CHANGEABLE = (
    *LENGTHS,
    "checkpoint",
    "guard",
    "log",
    "validation",
    "micro_batch",
    "sharding",
    "compile",
    "loss.form",
    "loss.exchange",
    "towers.gradient_checkpointing",
    *(f"data.{name}" for name in ("train", "workers", "threads", "timeout", "cache_gib", "max_bad_share")),
)
