"""Whether a model has become worse than an earlier result, by more than chance would have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.core import ClipkitError
from clipkit.evaluation.measuring import paired_differences
from clipkit.evaluation.results import Result
from clipkit.metrics import Interval, is_rank, lower_is_better

__all__ = ["Change", "changes", "changes_of_all", "matches", "matching", "with_baseline"]


@dataclass(frozen=True)
class Change:
    """One figure beside the baseline's."""

    dataset: str
    figure: str
    model: str
    value: float
    baseline: float
    difference: Interval
    """From the baseline's figure to this one; with an interval of the figure itself where samples cannot be paired."""
    paired: bool
    worse: bool

    def line(self) -> str:
        """What a person is told."""
        low, high = self.difference.low, self.difference.high
        how = "paired" if self.paired else "not paired: by this result's own interval"
        told = f", 95 % interval {low:+.4f} to {high:+.4f}, {how}" if low == low else f", {how}"
        return (
            f"{self.dataset}: {self.figure} of {self.model} is {self.value:.4f}, the baseline's {self.baseline:.4f} "
            f"({self.difference.value:+.4f}{told})"
        )

    def flat(self) -> dict[str, Any]:
        """The same as numbers under names of their own."""
        row = self.row()
        ends = {f"difference_{self.figure}_{end}": row[f"difference_{end}"] for end in ("low", "high")}
        return {f"baseline_{self.figure}": self.baseline, f"difference_{self.figure}": row["difference"], **ends}

    def row(self) -> dict[str, Any]:
        """As a result."""
        low, high = (None if value != value else value for value in (self.difference.low, self.difference.high))
        ends = {"difference_low": low, "difference_high": high, "paired": self.paired, "regression": self.worse}
        named = {"dataset": self.dataset, "figure": self.figure, "model": self.model, "value": self.value}
        return named | {"baseline": self.baseline, "difference": self.difference.value} | ends


def matching(task: str, name: str, baselines: Sequence[Result], *, alone: bool = False) -> Result | None:
    """The baseline of a task on a dataset: of the same ones; None where there is none.

    Args:
        task, name: of the result that is judged.
        baselines: to choose from.
        alone: whether nothing else is judged. Then a baseline of one result of the task is meant, whatever its dataset
            is called; with several datasets there is no telling which of them it would be of.

    Raises:
        ClipkitError: where several models' results are meant.
    """
    of_task = [each for each in baselines if each.task == task]
    same = [each for each in of_task if each.name == name] or (of_task if alone and len(baselines) == 1 else [])
    if len(same) > 1:
        models = ", ".join(each.model for each in same)
        raise ClipkitError(f"the baseline holds several results of {task} on {name} ({models}); keep one model's")
    return same[0] if same else None


def matches(asked: Sequence[tuple[str, str]], baselines: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """The baseline of each task and dataset that has one; it can be asked before anything is measured.

    Raises:
        ClipkitError: where none has; or see `matching`.
    """
    once = list(dict.fromkeys(asked))  # those that fail among them: what is left would not be alone
    found = {each: matching(*each, baselines, alone=len(once) == 1) for each in once}
    if once and not any(found.values()):
        held = ", ".join(dict.fromkeys(f"{each.task} on {each.name}" for each in baselines))
        raise ClipkitError(f"the baseline has no {once[0][0]} on {once[0][1]} to compare with; it holds {held}")
    return {each: baseline for each, baseline in found.items() if baseline is not None}


def changes(result: Result, baseline: Result, tolerance: float = 0.0) -> list[Change]:
    """Every figure that both have beside the baseline's.

    A figure is worse where the interval of the difference on the same samples (the paired bootstrap) lies wholly beyond
    the tolerance. Without the baseline's samples, or on others, it is worse where the interval of the figure itself
    lies wholly beyond the baseline's plus the tolerance; and where it has no interval, where its value does.

    Args:
        result: of the model that is judged.
        baseline: what it is held against.
        tolerance: how much worse is no matter: of the figures a fraction, of a median rank a share of the baseline's.
    """
    paired = paired_differences(result.found, baseline.found)
    found = []
    for name, value in result.found.figures.items():
        if name not in baseline.found.figures:
            continue
        held = baseline.found.figures[name]
        apart = paired.get(name)
        told = apart is not None and apart.low == apart.low
        if apart is None or not told:
            low, high = result.found.intervals.get(name, [value, value])
            apart = Interval(value - held, low - held, high - held)
        if lower_is_better(name):
            worse = apart.low > (tolerance * held if is_rank(name) else tolerance)
        else:
            worse = apart.high < -tolerance
        found.append(Change(result.name, name, result.model, value, held, apart, told, worse))
    return found


def changes_of_all(
    results: Sequence[Result], held: Mapping[tuple[str, str], Result], tolerance: float = 0.0
) -> list[Change]:
    """`changes` of every result whose task and dataset have a baseline (`matches`)."""
    return [
        change
        for result in results
        if (baseline := held.get((result.task, result.name))) is not None
        for change in changes(result, baseline, tolerance)
    ]


def with_baseline(rows: Sequence[dict[str, Any]], changed: Sequence[Change]) -> list[dict[str, Any]]:
    """Rows of `clipkit.evaluation.side_by_side` with each model's baseline and the difference from it."""
    if not changed:
        return list(rows)
    ends = ("baseline", "baseline_difference", "baseline_difference_low", "baseline_difference_high", "regression")
    columns = [f"{model}_{end}" for model in dict.fromkeys(change.model for change in changed) for end in ends]
    found = {(row["dataset"], row["figure"]): {**row, **dict.fromkeys(columns)} for row in rows}
    for change in changed:
        row = change.row()
        told = (row["baseline"], row["difference"], row["difference_low"], row["difference_high"], row["regression"])
        named = zip((f"{change.model}_{end}" for end in ends), told, strict=True)
        found[change.dataset, change.figure].update(named)
    return list(found.values())
