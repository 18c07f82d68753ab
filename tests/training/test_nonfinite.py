"""When a run skips a step, goes back, and gives up."""

import pytest

from clipkit.core import ClipkitError
from clipkit.training import Guard
from clipkit.training.settings import GuardConfig


def test_single_steps_are_skipped_and_counted():
    guard = Guard(GuardConfig(patience=2))
    verdicts = [guard.judge(finite, step) for step, finite in enumerate([True, False, True, False, True])]
    assert verdicts == ["step", "skip", "step", "skip", "step"]
    assert guard.skipped == 2


def test_in_a_row_they_go_back_and_in_the_end_stop():
    guard = Guard(GuardConfig(patience=2, max_rollbacks=2))
    assert [guard.judge(False, step) for step in range(4)] == ["skip", "rollback", "skip", "rollback"]
    guard.judge(False, 5)
    with pytest.raises(ClipkitError, match="2 steps in a row, the last 6, after 2 rollbacks"):
        guard.judge(False, 6)


def test_or_stop_at_once():
    guard = Guard(GuardConfig(patience=1, then="stop"))
    with pytest.raises(ClipkitError, match="lower optim.lr"):
        guard.judge(False, 1)
