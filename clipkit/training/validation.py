"""What a training run is measured on while it goes on, by the same functions as `clipkit evaluate`."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipkit.core import ClipkitError, Gather, did_you_mean, warn
from clipkit.data.sources import Source, open_source
from clipkit.evaluation import (
    RETRIEVAL_KS,
    ZEROSHOT_KS,
    Evaluation,
    LabelledImages,
    SharedWork,
    evaluate_retrieval,
    evaluate_zeroshot,
    open_classes,
)
from clipkit.metrics import guessed_retrieval, lower_is_better, retrieval_figures, zeroshot_chance
from clipkit.models import DualEncoder, cast_for_inference, evaluating
from clipkit.training.settings import ValidationConfig

__all__ = ["Validation", "open_validation", "validate"]


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    # Nothing here draws, but towers and tokenizers are other libraries', and a run must not depend on being measured.
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@dataclass
class Validation:
    """What a training run is measured on, opened once."""

    config: ValidationConfig
    retrieval: Source | None
    zeroshot: LabelledImages | None

    def run(
        self, model: DualEncoder, *, rank: int = 0, world_size: int = 1, gather: Gather | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Measure a model, all ranks together.

        Neither the modes of its modules change nor any random generator, but the weights are cast in place to
        `ValidationConfig.precision`: give a copy where they are to be trained on.

        Args:
            model: the same on all ranks.
            rank, world_size, gather: see `SharedWork`.

        Returns:
            The figures, named as `clipkit evaluate` does, and ledger lines of what could not be used.
        """
        work = SharedWork(model, rank=rank, world_size=world_size, gather=gather)
        evaluations: list[Evaluation] = []
        with _generators_kept(model.device), evaluating(model):
            cast_for_inference(model, self.config.precision)
            if self.retrieval is not None:
                evaluations.append(evaluate_retrieval(work, self.retrieval))
            if self.zeroshot is not None:
                evaluations.append(evaluate_zeroshot(work, self.zeroshot, templates=self.config.templates))
        figures = {name: value for each in evaluations for name, value in each.figures.items()}
        return figures, [line for each in evaluations for line in each.left_out]


def open_validation(config: ValidationConfig) -> Validation | None:
    """Open what a run is measured on; None where it names nothing.

    Raises:
        ClipkitError: where something cannot be opened, or `best` is none of the figures.
    """
    guessed = retrieval_figures(guessed_retrieval(1, np.zeros(1, np.int64)), RETRIEVAL_KS)
    # The best checkpoint is the one with the highest figure.
    names = [name for name in guessed if not lower_is_better(name)] if config.retrieval is not None else []
    names += zeroshot_chance(1, ZEROSHOT_KS) if config.zeroshot is not None else []
    if config.best is not None and config.best not in names:
        known = f"there are {', '.join(names)}" if names else "set validation.retrieval or validation.zeroshot too"
        raise ClipkitError(f"validation.best={config.best} is no figure{did_you_mean(config.best, names)}; {known}")
    if not names:
        return None
    return Validation(
        config,
        None if config.retrieval is None else open_source(config.retrieval, captions_required=True),
        None if config.zeroshot is None else open_classes(config.zeroshot),
    )


def validate(validation: Validation, model: DualEncoder, share: dict[str, Any]) -> dict[str, float]:
    """The figures of a run in the middle of its training, which what it is measured on must not end.

    What cannot be used is told in a warning, and so is a source that is gone: then there are no figures.

    Args:
        validation: what is measured.
        model: a copy, as in `Validation.run`.
        share: this rank and how many there are.
    """
    try:
        figures, left_out = validation.run(model, **share)
    except ClipkitError as error:  # the same on all ranks
        warn(f"no validation: {error}")
        return {}
    if left_out:
        warn(f"{len(left_out)} samples cannot be used for validation; the first: {left_out[0]['reason']}")
    return figures
