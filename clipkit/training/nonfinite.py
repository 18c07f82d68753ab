"""What a run does where a loss or a gradient is not finite: skip the step, go back, or stop."""

from dataclasses import dataclass
from typing import Literal

from clipkit.core import ClipkitError
from clipkit.training.settings import GuardConfig

__all__ = ["Guard"]


@dataclass
class Guard:
    """Counts steps that could not be taken. Every rank sees the same norms, so every rank decides alike."""

    config: GuardConfig
    skipped: int = 0
    """Steps of the whole run."""
    rollbacks: int = 0
    in_a_row: int = 0

    def judge(self, finite: bool, step: int) -> Literal["step", "skip", "rollback"]:
        """What to do after this step's gradient.

        Args:
            finite: whether loss and gradient are.
            step: its number, for the message.

        Raises:
            ClipkitError: where the run must stop.
        """
        if finite:
            self.in_a_row = 0
            return "step"
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self.config.patience:
            return "skip"
        steps = f"{self.in_a_row} steps in a row, the last {step}"
        hint = "look at nonfinite.jsonl and metrics.jsonl, and lower optim.lr"
        if self.config.then == "stop":
            raise ClipkitError(f"loss or gradient is not finite in {steps}; {hint}")
        if self.rollbacks == self.config.max_rollbacks:
            raise ClipkitError(f"loss or gradient is not finite in {steps}, after {self.rollbacks} rollbacks; {hint}")
        self.rollbacks += 1
        self.in_a_row = 0
        return "rollback"
