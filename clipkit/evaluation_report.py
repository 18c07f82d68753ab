"""The page of an evaluation: what each model scores, how sure that is, and where it goes wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.artifact import atomic_write, write_json
from clipkit.baselines import Change
from clipkit.comparison import lower_is_better
from clipkit.errors import ClipkitError
from clipkit.report import Report, whisker_figure
from clipkit.results import Differences, Result, as_clip_benchmark, markdown, readable

__all__ = ["SUFFIXES", "check_name", "write_page", "write_results"]

SUFFIXES = (".json", ".md", ".html")

BESIDE = 12  # models in one plot; of more the table tells


def check_name(path: Path) -> None:
    """Refuse, before anything is measured, a name that says nothing of the form.

    Raises:
        ClipkitError: for any other end.
    """
    if path.suffix not in SUFFIXES:
        raise ClipkitError(f"--out {path}: the name of a result ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def write_results(
    path: Path,
    results: Sequence[Result],
    apart: Differences,
    *,
    changes: Sequence[Change] = (),
    failures: Sequence[str] = (),
) -> None:
    """Write results in the form that the name says: a list in CLIP_benchmark's form, a Markdown table, or a page.

    Args:
        path, results, apart, changes, failures: see `write_page`.
    """
    if path.suffix == ".json":
        write_json(path, [as_clip_benchmark(result) for result in results])
    elif path.suffix == ".md":
        with atomic_write(path, "w") as handle:
            handle.write(markdown(results, apart))
            if changes:
                handle.write("\n" + "".join(f"- {change.line()}\n" for change in changes if change.worse))
            if failures:
                handle.write("\nNot measured:\n\n" + "".join(f"- {line}\n" for line in failures))
    else:
        write_page(path, results, apart, changes=changes, failures=failures)


def write_page(
    path: Path,
    results: Sequence[Result],
    apart: Differences,
    *,
    changes: Sequence[Change] = (),
    failures: Sequence[str] = (),
) -> None:
    """Write a self-contained page.

    Args:
        path: of the page.
        results: of any models on any datasets.
        apart: see `clipkit.results.differences_from_first`.
        changes: beside a baseline.
        failures: what could not be measured, a line each.
    """
    models = list(dict.fromkeys(result.model for result in results))
    datasets = list(dict.fromkeys((result.name, result.task) for result in results))
    page = Report("Evaluation", f"datasets: {len(datasets)}, models: {len(models)}; intervals are of 95 %")
    if failures:
        page.heading("Not measured")
        page.table([{"what": line.partition(": ")[0], "why": line.partition(": ")[2]} for line in failures], words=True)
    if changes:
        worse = sum(change.worse for change in changes)
        page.heading("Beside the baseline", f"{worse} of {len(changes)} figures are worse than chance would have it.")
        page.table([_change(change.row()) for change in changes])
    page.heading(
        "All figures",
        "Fractions, but for median ranks, which count from 1. In brackets stands where a figure, or a difference from "
        "the first model on the same samples, may lie; chance is what guessing scores.",
    )
    rows = readable(results, apart)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    page.table([{column: row.get(column, "") for column in columns} for row in rows])
    for name, task in datasets:
        own = [result for result in results if (result.name, result.task) == (name, task)]
        counts = ", ".join(f"{count:,} {what}" for what, count in own[0].found.counts.items())
        page.heading(f"{name}: {task}", f"{counts}. A dashed tick is chance.")
        _bars(page, name, own)
        for result in own:
            if result.found.confused:
                page.subheading(f"What {result.model} takes for what most often")
                page.table(result.found.confused)
    left_out = [
        {
            "dataset": result.name,
            "model": result.model,
            "left out": f"{len(result.found.left_out):,}",
            "the first": f"{result.found.left_out[0]['key']}: {result.found.left_out[0]['reason']}",
        }
        for result in results
        if result.found.left_out
    ]
    if left_out:
        page.heading("Left out")
        page.table(left_out, words=True)
    page.write(path)


def _change(row: dict[str, Any]) -> dict[str, str]:
    ends = (row["difference_low"], row["difference_high"])
    told = "" if None in ends else f" [{ends[0]:+.4f}, {ends[1]:+.4f}]"
    return {
        "figure": f"{row['dataset']}: {row['figure']}",
        "model": row["model"],
        "value": f"{row['value']:.4f}",
        "baseline": f"{row['baseline']:.4f}",
        "difference": f"{row['difference']:+.4f}{told}",
        "": "worse" if row["regression"] else "",
    }


def _bars(page: Report, name: str, results: Sequence[Result]) -> None:
    figures = list(dict.fromkeys(figure for result in results for figure in result.found.figures))
    for ranks in (False, True):
        own = [figure for figure in figures if lower_is_better(figure) == ranks]
        if not own:
            continue
        series = {result.model: [_told(result, figure) for figure in own] for result in results[:BESIDE]}
        levels = [results[0].found.chance.get(figure) for figure in own]
        label = "median rank, from 1: lower is better" if ranks else "fraction"
        page.plot(whisker_figure(own, series, levels, label), f"{name}: {', '.join(own)}")


def _told(result: Result, figure: str) -> tuple[float, float, float] | None:
    value = result.found.figures.get(figure)
    if value is None:
        return None
    low, high = result.found.intervals.get(figure, [value, value])
    return value, low, high
