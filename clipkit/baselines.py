"""Whether a model has become worse than an earlier result, by more than chance would have it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.comparison import differences, lower_is_better, unpacked
from clipkit.confidence import Interval
from clipkit.errors import ClipkitError
from clipkit.results import Result

__all__ = ["Change", "beside", "changes", "changes_of_all", "matching"]


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


def matching(result: Result, baselines: Sequence[Result]) -> Result | None:
    """The baseline of a result: of the same task and dataset, or the only one of its task; None where there is none.

    Raises:
        ClipkitError: where several models' results are meant.
    """
    of_task = [each for each in baselines if each.task == result.task]
    same = [each for each in of_task if each.name == result.name] or (of_task if len(baselines) == 1 else [])
    if len(same) > 1:
        models = ", ".join(each.model for each in same)
        raise ClipkitError(
            f"the baseline holds several results of {result.task} on {result.name} ({models}); keep one model's"
        )
    return same[0] if same else None


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
    paired: dict[str, Interval] = {}
    if result.found.samples and baseline.found.samples:
        paired = differences(unpacked(result.found.samples), unpacked(baseline.found.samples)) or {}
    found = []
    for name, value in result.found.figures.items():
        if name not in baseline.found.figures:
            continue
        held = baseline.found.figures[name]
        apart = paired.get(name)
        if apart is None or apart.low != apart.low:
            low, high = result.found.intervals.get(name, [value, value])
            apart = Interval(value - held, low - held, high - held)
        if lower_is_better(name):
            worse = apart.low > tolerance * held
        else:
            worse = apart.high < -tolerance
        found.append(Change(result.name, name, result.model, value, held, apart, name in paired, worse))
    return found


def changes_of_all(results: Sequence[Result], baselines: Sequence[Result], tolerance: float = 0.0) -> list[Change]:
    """`changes` of every result that has a baseline.

    Raises:
        ClipkitError: where none has; or see `matching`.
    """
    pairs = [(result, matching(result, baselines)) for result in results]
    if not any(baseline for _, baseline in pairs):
        held = ", ".join(dict.fromkeys(f"{each.task} on {each.name}" for each in baselines))
        raise ClipkitError(
            f"the baseline has no {results[0].task} on {results[0].name} to compare with; it holds {held}"
        )
    return [
        change for result, baseline in pairs if baseline is not None for change in changes(result, baseline, tolerance)
    ]


def beside(rows: Sequence[dict[str, Any]], changed: Sequence[Change]) -> list[dict[str, Any]]:
    """Rows of `clipkit.results.side_by_side` with each model's baseline and the difference from it."""
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
