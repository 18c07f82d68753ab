"""What a person or a program sees: notes and progress on stderr, results on stdout.

Progress bars appear only on a terminal and only on the main process, so logs and pipes stay clean.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["FORMATS", "console", "emit", "is_main_process", "meter", "note", "progress", "warn"]

FORMATS = ("human", "json", "jsonl", "csv")

Item = TypeVar("Item")


def is_main_process() -> bool:
    """Whether this is rank 0 of a torchrun-like launch, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """A rich console on the present stderr (looked up now, so that redirection works)."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def _in_one_line(text: str) -> str:
    # Names of files may hold line ends, and codes that a terminal obeys.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def note(message: str, *, everywhere: bool = False) -> None:
    """One line for the person who watches.

    Args:
        message: the line.
        everywhere: whether any process says it, and not the main one alone.
    """
    if everywhere or is_main_process():
        console().print(_in_one_line(message), markup=False)


def warn(message: str, *, everywhere: bool = False) -> None:
    """One line that should not be missed; see `note`."""
    if everywhere or is_main_process():
        console().print(f"warning: {_in_one_line(message)}", style="yellow", markup=False)


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """Iterate with a bar, a count, a rate and the time that remains, where somebody watches."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with meter(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def meter(what: str, total: int | None, unit: str = "", done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar as `progress` shows it, for work that is told in steps: gives ``advance(steps, bytes=0)``.

    Args:
        what: stands before the bar.
        total: steps; None where it is not known.
        unit: of a step.
        done: steps that were done before.
    """
    if not (is_main_process() and sys.stderr.isatty()):
        yield lambda steps, size=0: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="")
        seen, seen_bytes = 0, 0

        def advance(steps: int, size: int = 0) -> None:
            nonlocal seen, seen_bytes
            seen, seen_bytes = seen + steps, seen_bytes + size
            speed = bar.tasks[task].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            if speed and seen_bytes:
                rate += f" {speed * seen_bytes / max(seen, 1) / 1e6:,.1f} MB/s"
            bar.update(task, advance=steps, rate=rate)

        yield advance


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list, tuple)) else value


def emit(rows: Iterable[Mapping[str, Any]] | Mapping[str, Any], fmt: str, title: str = "") -> None:
    """Print results on stdout.

    Args:
        rows: several rows with the same keys, or one mapping of figures.
        fmt: ``json`` prints the value as it is, ``jsonl`` a line per row, ``csv`` a header and a line per row, both as
            the rows come; ``human`` a table.
        title: stands above the table.
    """
    # A mapping is an iterable too, to a type checker.
    many = cast("Iterable[Mapping[str, Any]]", [rows] if isinstance(rows, Mapping) else rows)
    if fmt in ("json", "human"):
        _emit_whole(cast("Mapping[str, Any]", rows) if isinstance(rows, Mapping) else list(many), fmt, title)
        return
    writer: csv.DictWriter[str] | None = None
    for row in many:
        if fmt == "jsonl":
            sys.stdout.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            continue
        if writer is None:
            writer = csv.DictWriter(sys.stdout, fieldnames=list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: _plain(value) for key, value in row.items()})
    sys.stdout.flush()


def _emit_whole(rows: Sequence[Mapping[str, Any]] | Mapping[str, Any], fmt: str, title: str) -> None:
    if fmt == "json":
        sys.stdout.write(json.dumps(rows, ensure_ascii=False, indent=2, default=str) + "\n")
        sys.stdout.flush()
        return
    many = [{"": key, "value": value} for key, value in rows.items()] if isinstance(rows, Mapping) else rows
    table = Table(*(many[0] if many else ["nothing found"]), title=title or None, title_justify="left")
    for row in many:
        table.add_row(*(escape(_shown(value)) for value in row.values()))
    wide = Console(file=sys.stdout, soft_wrap=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    wide.print(table)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _in_one_line(str(_plain(value) if value is not None else ""))
