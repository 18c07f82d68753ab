"""A model that is loaded when it has to compute, and known before that where it was loaded once."""

import functools
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.core import ClipkitError, __version__
from clipkit.models.model_spec import model_folder
from clipkit.storage import Cache, hash_of

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder

__all__ = ["LazyModel", "ModelFacts"]


@dataclass(frozen=True)
class ModelFacts:
    """What is asked of a model without computing anything."""

    fingerprint: str
    """See `DualEncoder.fingerprint`; of the weights as they are saved."""
    precision: str
    """``bf16`` or ``fp32``: what the towers compute in on this machine."""
    dim: int
    """Of the embeddings."""
    scale: float
    """The factor on cosines, ``exp(logit_scale)``."""
    bias: float | None
    """What is added to the scaled cosines, of models trained with a sigmoid loss."""


class LazyModel:
    """Stands for a model; importing torch and loading the weights take seconds, which a second run need not spend.

    Args:
        spec: see `clipkit.models.load_model`.
        cache: remembers the facts by the names, sizes and times of the files in the model's folder; those of a model
            that is named otherwise are not remembered.
        device: by name; None for a GPU where there is one.
        precision: of the towers, see `clipkit.models.cast_for_inference`.

    Raises:
        ClipkitError: where there is no such folder.
    """

    def __init__(self, spec: str | Path, cache: Cache, *, device: str | None = None, precision: str = "auto"):
        self.spec = str(spec)
        self.device, self.precision = device, precision
        self._cache = cache
        folder = model_folder(spec)
        # What `auto` means is a matter of the machine, and home folders are shared between machines.
        where = (platform.node(), __version__, device, precision)
        self._key = None if folder is None else hash_of("model", *where, str(folder.resolve()), _stamps(folder))

    @classmethod
    def of(cls, towers: "DualEncoder") -> "LazyModel":
        """Stands for a model that is loaded; it is used as it is."""
        made = cls.__new__(cls)
        made.spec, made._key = "the model given", None
        vars(made)["_loaded"] = (towers, _facts(towers, "bf16" if towers.dtype.itemsize == 2 else "fp32"))
        return made

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """What is known of it; loads it where nothing is."""
        known = None if self._key is None else self._cache.fact(self._key)
        if known is not None:
            return ModelFacts(**known)
        return self._loaded[1]

    @property
    def towers(self) -> "DualEncoder":
        """The model, in its precision.

        Raises:
            ClipkitError: see `clipkit.models.load_model`; or where its files changed without it showing.
        """
        towers, facts = self._loaded
        if facts != self.facts:
            raise ClipkitError(f"{self.spec} is another model than it was, under the same sizes and times; touch it")
        return towers

    @functools.cached_property
    def _loaded(self) -> "tuple[DualEncoder, ModelFacts]":
        from clipkit.core import keep_freed_memory, pick_device, settled_precision
        from clipkit.models.inference import cast_for_inference
        from clipkit.models.loading import load_model

        towers = load_model(self.spec, pick_device(self.device))
        # Before the cast, which changes the values that the fingerprint is made of.
        facts = _facts(towers, settled_precision(self.precision, towers.device))
        cast_for_inference(towers, self.precision)
        if towers.device.type == "cpu":
            keep_freed_memory()
        if self._key is not None:
            self._cache.keep_fact(self._key, asdict(facts))
        return towers, facts


def _facts(towers: "DualEncoder", precision: str) -> ModelFacts:
    bias = towers.logit_bias
    return ModelFacts(
        fingerprint=towers.fingerprint(),
        precision=precision,
        dim=towers.embed_dim,
        scale=float(towers.logit_scale.detach().float().exp()),
        bias=None if bias is None else float(bias.detach().float()),
    )


def _stamps(folder: Path) -> list[Any]:
    stamps = []
    for above, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            status = Path(above, name).stat()
            stamps.append((Path(above, name).relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return stamps
