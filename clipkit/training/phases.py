"""Phases of a run: smaller images, shorter texts and fewer patches first (Li et al. 2023, "CLIPA")."""

from itertools import pairwise

from torch import Tensor

from clipkit.images import Preprocess
from clipkit.models import DualEncoder
from clipkit.training.settings import PhaseConfig, TrainConfig

__all__ = ["Phases"]


class Phases:
    """What each step of a run sees of its samples.

    Args:
        config: its phases, in order; after the last one everything is as the model says.
        steps: of the whole run.
        model: whose sizes are the full ones.

    Raises:
        ClipkitError: where the model cannot see images of a phase's size, or drop patches.
    """

    def __init__(self, config: TrainConfig, steps: int, model: DualEncoder):
        self.model = model
        self.ends = [(round(phase.until * steps), phase) for phase in config.phases]
        self.patch_dropout = config.towers.patch_dropout
        self.multiple = 8 if config.compile else 1  # a compiled model wants few shapes
        for phase in config.phases:
            if phase.image_size is not None:
                model.check_image_size(phase.image_size)
        self._entered: PhaseConfig | None = None
        self._share: float | None = None
        for phase in (*config.phases, None):  # so that what cannot be done is said before anything begins
            self._enter(phase)

    def at(self, step: int) -> PhaseConfig | None:
        """The phase that a step belongs to."""
        return next((phase for end, phase in self.ends if step < end), None)

    def stretches(self, first: int, steps: int) -> list[tuple[int, int]]:
        """First and last step (exclusive) of what is left of each phase from a step on, and of the rest of the run."""
        ends = [first, *(end for end, _ in self.ends if first < end < steps), steps]
        return list(pairwise(ends))

    def enter(self, step: int) -> None:
        """Make the model ready for this step."""
        if (phase := self.at(step)) is not self._entered:
            self._enter(phase)

    def _enter(self, phase: PhaseConfig | None) -> None:
        self._entered = phase
        own = phase.patch_dropout if phase is not None else None
        share = self.patch_dropout if own is None else own
        if share != self._share:
            self._share = share
            self.model.set_patch_dropout(share)

    def tokens(self, tokens: Tensor, step: int) -> Tensor:
        """The tokens as the step sees them: cut to the phase's length, and without columns that are padding only."""
        phase = self.at(step)
        if phase is not None and phase.context_length is not None:
            tokens = self.model.shorten(tokens, phase.context_length)
        return self.model.trim(tokens, self.multiple)

    def preprocessing(self, jumped: int, batch_size: int) -> list[tuple[int, Preprocess]]:
        """Up to which position of the sequence images are prepared in which other way.

        Args:
            jumped: steps' worth of samples that the run has passed over.
            batch_size: of all ranks.
        """
        full = self.model.preprocess
        return [
            (
                (end + jumped) * batch_size,
                full if phase.image_size is None else full.model_copy(update={"size": (phase.image_size,) * 2}),
            )
            for end, phase in self.ends
        ]
