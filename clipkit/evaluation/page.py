"""The page of an evaluation: what each model scores, how sure that is, and where it goes wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, Report, atomic_write, whisker_figure, write_json
from clipkit.evaluation.baseline import Change
from clipkit.evaluation.measuring import COMPAT
from clipkit.evaluation.results import Differences, Result, as_clip_benchmark
from clipkit.evaluation.tables import markdown, readable_table
from clipkit.metrics import is_rank

__all__ = ["SUFFIXES", "check_name", "write_evaluation_page", "write_results"]

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
        path, results, apart, changes, failures: see `write_evaluation_page`.
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
        write_evaluation_page(path, results, apart, changes=changes, failures=failures)


def write_evaluation_page(
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
        apart: see `clipkit.evaluation.differences_from_first`.
        changes: beside a baseline.
        failures: what could not be measured, a line each.
    """
    models, datasets = _short([result.model for result in results]), _short([result.name for result in results])
    page = Report("Evaluation", f"{_number(datasets, 'dataset')}, {_number(models, 'model')}; intervals are of 95 %")
    if failures:
        page.heading("Not measured")
        page.table([{"what": line.partition(": ")[0], "why": line.partition(": ")[2]} for line in failures], words=True)
    if changes:
        worse = sum(change.worse for change in changes)
        page.heading("Beside the baseline", f"{worse} of {len(changes)} figures are worse than chance would have it.")
        page.table([_change(change.row(), datasets, models) for change in changes])
    _add_figures(page, results, datasets, models)
    if apart:
        _add_differences(page, results, apart, datasets, models)
    for name, task in dict.fromkeys((result.name, result.task) for result in results):
        own = [result for result in results if (result.name, result.task) == (name, task)]
        counts = ", ".join(f"{count:,} {what}" for what, count in own[0].found.counts.items())
        page.heading(f"{datasets[name]}: {task}", f"{counts}. A dotted tick is chance.")
        _bars(page, name, own, models)
        for result in own:
            if result.found.confused:
                page.subheading(f"What {models[result.model]} takes for what most often")
                page.table(result.found.confused)
    _add_left_out(page, results)
    page.write(path)


def _add_figures(page: Report, results: Sequence[Result], datasets: dict[str, str], models: dict[str, str]) -> None:
    page.heading(
        "All figures",
        "Fractions, but for median ranks, which count from 1. In brackets stands where a figure may lie; chance is "
        "what guessing scores.",
    )
    rows = readable_table(results)
    names = {**models, **{f"{model}, {COMPAT}": f"{short}, {COMPAT}" for model, short in models.items()}}
    columns = [name for name in names if any(name in row for row in rows)]
    page.table(
        [
            {"figure": f"{datasets[row['dataset']]}: {row['figure']}"}
            | {names[column]: row.get(column, "") for column in columns}
            | {"chance": row["chance"]}
            for row in rows
        ]
    )


def _add_differences(
    page: Report, results: Sequence[Result], apart: Differences, datasets: dict[str, str], models: dict[str, str]
) -> None:
    page.heading(
        f"Beside {models[results[0].model]}",
        "How much larger a figure is than that model's, on the same samples: a difference whose brackets leave out "
        "0 is more than chance.",
    )
    columns = {model: f"{model}, difference" for model in models}
    page.table(
        [
            {"figure": f"{datasets[row['dataset']]}: {row['figure']}"}
            | {models[model]: row.get(column, "") for model, column in columns.items() if model != results[0].model}
            for row in readable_table(results, apart)
            if any(column in row for column in columns.values())
        ]
    )


def _add_left_out(page: Report, results: Sequence[Result]) -> None:
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


def _number(names: Sequence[Any] | dict[str, str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) != 1)}"


def _short(names: Sequence[str]) -> dict[str, str]:
    """The fewest last parts of each name that tell it from all others: most are paths, which share their first ones."""
    different = list(dict.fromkeys(names))
    for parts in range(1, 20):
        short = ["/".join(name.rstrip("/").split("/")[-parts:]) for name in different]
        if len(set(short)) == len(short):
            return dict(zip(different, short, strict=True))
    return {name: name for name in different}


def _change(row: dict[str, Any], datasets: dict[str, str], models: dict[str, str]) -> dict[str, str]:
    ends = (row["difference_low"], row["difference_high"])
    told = "" if None in ends else f" [{ends[0]:+.4f}, {ends[1]:+.4f}]"
    return {
        "figure": f"{datasets[row['dataset']]}: {row['figure']}",
        "model": models[row["model"]],
        "value": f"{row['value']:.4f}",
        "baseline": f"{row['baseline']:.4f}",
        "difference": f"{row['difference']:+.4f}{told}",
        "": "worse" if row["regression"] else "",
    }


def _bars(page: Report, name: str, results: Sequence[Result], models: dict[str, str]) -> None:
    figures = list(dict.fromkeys(figure for result in results for figure in result.found.figures))
    for ranks in (False, True):
        own = [figure for figure in figures if is_rank(figure) == ranks]
        if not own:
            continue
        series = {models[result.model]: [_told(result, figure) for figure in own] for result in results[:BESIDE]}
        levels = [results[0].found.chance.get(figure) for figure in own]
        label = "median rank, from 1: lower is better" if ranks else "fraction"
        page.plot(whisker_figure(own, series, levels, label), f"{name}: {', '.join(own)}")


def _told(result: Result, figure: str) -> tuple[float, float, float] | None:
    value = result.found.figures.get(figure)
    if value is None:
        return None
    low, high = result.found.intervals.get(figure, [value, value])
    return value, low, high
