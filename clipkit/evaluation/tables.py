"""Results told in tables: side by side, with their differences, for people and as Markdown."""

from collections.abc import Sequence
from typing import Any

from clipkit.core import emit
from clipkit.evaluation.baseline import Change, with_baseline
from clipkit.evaluation.measuring import COMPAT, paired_differences
from clipkit.evaluation.probe import probe_rows, readable_rows
from clipkit.evaluation.results import THEIR_FIGURES, Differences, Result
from clipkit.metrics import Interval

__all__ = ["differences_from_first", "emit_results", "markdown", "readable_table", "side_by_side"]


def differences_from_first(results: Sequence[Result]) -> Differences:
    """For every other model how much larger each figure is than the first result's model has it on the same dataset.

    A dataset on which that model was not measured is passed over: beside another one a difference would say less than
    it seems to.
    """
    first: dict[tuple[str, str], Result] = {}
    found: Differences = {}
    for result in results:
        base = first.setdefault((result.name, result.task), result)
        if base is result or base.model != results[0].model:
            continue
        if paired := paired_differences(result.found, base.found):
            found[result.name, result.task, result.model] = paired
    return found


def side_by_side(results: Sequence[Result], apart: Differences | None = None) -> list[dict[str, Any]]:
    """A row per dataset and figure, columns per model, and what guessing scores.

    Args:
        results: of any models on any datasets.
        apart: see `differences_from_first`.

    Returns:
        Rows with ``dataset``, ``figure``, each model's value under its name, its interval under the name with ``_low``
        and ``_high``, the difference from the first model under ``_difference``, ``_difference_low`` and
        ``_difference_high``, CLIP_benchmark's definition under ``_clip_benchmark``, and ``chance``. Columns that would
        be empty throughout are left out.
    """
    apart = apart or {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        told = apart.get((result.name, result.task, result.model), {})
        for name, value in result.found.figures.items():
            row = rows.setdefault((result.name, name), {"dataset": result.name, "figure": name})
            row[result.model] = value
            if name in result.found.intervals:
                row[f"{result.model}_low"], row[f"{result.model}_high"] = result.found.intervals[name]
            if name in told:
                row |= {f"{result.model}_difference{end}": number for end, number in _ends(told[name])}
            theirs = THEIR_FIGURES.get(name, name)
            if theirs in result.found.compat:
                row[f"{result.model}_{COMPAT}"] = result.found.compat[theirs]
            row["chance"] = result.found.chance.get(name)
    models = list(dict.fromkeys(result.model for result in results))
    ends = ("", "_low", "_high", "_difference", "_difference_low", "_difference_high", f"_{COMPAT}")
    order = ["dataset", "figure", *(f"{model}{end}" for model in models for end in ends), "chance"]
    there = [column for column in order if any(column in row for row in rows.values())]
    return [{column: row.get(column) for column in there} for row in rows.values()]


def _ends(interval: Interval) -> list[tuple[str, float | None]]:
    low, high = (None if value != value else value for value in (interval.low, interval.high))
    return [("", interval.value), ("_low", low), ("_high", high)]


def readable_table(results: Sequence[Result], apart: Differences | None = None) -> list[dict[str, str]]:
    """As `side_by_side`, with each interval in the cell of its figure, for people."""
    models = list(dict.fromkeys(result.model for result in results))
    found = []
    for row in side_by_side(results, apart):
        shown = {"dataset": str(row["dataset"]), "figure": str(row["figure"])}
        for model in models:
            shown[model] = _cell(row, model)
            if f"{model}_difference" in row:
                shown[f"{model}, difference"] = _cell(row, f"{model}_difference", "+")
            if f"{model}_{COMPAT}" in row:
                shown[f"{model}, {COMPAT}"] = _cell(row, f"{model}_{COMPAT}")
        found.append(shown | {"chance": _cell(row, "chance")})
    return found


def _cell(row: dict[str, Any], column: str, sign: str = "") -> str:
    value, low, high = (row.get(f"{column}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + (f" [{low:{sign}.4f}, {high:{sign}.4f}]" if low is not None else "")


def markdown(results: Sequence[Result], apart: Differences | None = None) -> str:
    """The same as a table in Markdown."""
    rows = readable_table(results, apart)
    heads = list(rows[0]) if rows else []
    lines = [f"| {' | '.join(_escaped(head) for head in heads)} |", f"|{'---|' * 2}{'---:|' * (len(heads) - 2)}"]
    lines += [f"| {' | '.join(_escaped(cell) for cell in row.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def emit_results(
    results: Sequence[Result],
    apart: Differences,
    changes: Sequence[Change],
    fmt: str,
    *,
    baseline: str | None = None,
    alone: bool = False,
) -> None:
    """Print results: a table of several, or of one that stands alone every number under a name of its own.

    Args:
        results: of any models on any datasets.
        apart: see `differences_from_first`.
        changes: beside a baseline.
        fmt: see `clipkit.core.emit`.
        baseline: what it is called.
        alone: whether the only result is meant by itself.
    """
    first = results[0].found
    probe = alone and results[0].task == "probe"
    if fmt == "human":
        title = ", ".join(f"{count:,} {what}" for what, count in first.counts.items()) if alone else ""
        emit(readable_rows(first) if probe else readable_table(results, apart), fmt, title)
        if changes:
            emit([change.row() for change in changes], fmt, f"beside {baseline}")
    elif probe and fmt != "json":
        emit(probe_rows(first), fmt)
    elif not alone:
        emit(with_baseline(side_by_side(results, apart), changes), fmt)
    else:
        row = first.flat() | {name: value for change in changes for name, value in change.flat().items()}
        regressions = {"regressions": [change.figure for change in changes if change.worse]} if changes else {}
        emit(row | {"model": results[0].fingerprint} | regressions, fmt)
