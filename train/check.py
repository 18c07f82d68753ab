"""Check a set of images and captions: broken samples, duplicates, leaks into a test set, lengths and sizes.

Reads every sample once. What cannot be trained on is remembered beside the shards, and training leaves it out.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job
from clipkit.options import format_option, list_options, model_option

SHOWN = 5  # findings of a kind in the table for people


@click.command(cls=Job)
@click.argument("source")
@list_options
@click.option("--against", multiple=True, metavar="OTHER", help="A set that must share no image; may be repeated.")
@click.option(
    "--near",
    default=6,
    show_default=True,
    type=click.IntRange(0, 12),
    help="Most of 64 bits in which pictures that look alike differ: 6 finds copies, 12 shots of one scene too.",
)
@model_option
@click.option("--quick", is_flag=True, help="Headers, sizes and bytes only: no decoding, no looks.")
@click.option("--strict", is_flag=True, help="Notes count too: near duplicates, duplicate and cut captions.")
@click.option("--fix", is_flag=True, help="Write a copy into --out without what is wrong and without duplicates.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the shards of --fix.")
@click.option("--overwrite", is_flag=True, help="Replace another artifact that stands in --out.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder or .html file for a page with pictures.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the page's random samples.")
@click.option("--threads", type=click.IntRange(1), help="That decode images [default: one per core].")
@format_option
def main(
    source: str,
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None,
    against: tuple[str, ...],
    model: str | None,
    fix: bool,
    out: Path | None,
    overwrite: bool,
    report: Path | None,
    seed: int,
    fmt: str,
    **options: Any,
) -> int:
    """Check SOURCE (shards, a list, or a folder): what is broken, empty, twice there, cut, or in another set too.

    Status 1 where there is a defect. Captions are measured with the model's own tokenizer; without a model with
    open_clip's, of 77 tokens.
    """
    from time import perf_counter

    from clipkit.core import ClipkitError, note, warn
    from clipkit.data.check import CheckOptions, check_summary, judge, pack_clean, scan, write_check_page
    from clipkit.models import token_counter
    from clipkit.storage import refuse_own_input

    if fix != (out is not None):
        raise ClipkitError("--fix and --out belong together: clipkit check SOURCE --fix --out CLEAN")
    if out is not None:
        refuse_own_input(out, [source, *against])
    chosen, tokens = CheckOptions(**options), token_counter(model)
    began = perf_counter()
    columns: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column, "image_root": image_root}
    mine = scan(source, chosen, count_tokens=tokens.count, **columns)
    others = [scan(other, chosen, captions=False) for other in against]
    seconds = perf_counter() - began
    verdict = judge(mine, others, chosen, context_length=tokens.context_length)
    if not chosen.quick:
        mine.keep_defects()
    looked = len(mine) + sum(len(other) for other in others)
    note(f"{looked:,} samples in {seconds:,.1f} s, {looked / max(seconds, 1e-9):,.0f} per second")
    show(check_summary(mine, verdict), fmt)
    for other in verdict.against:
        if other["unreadable"]:
            warn(f"{other['unreadable']:,} samples or shards of {other['source']} cannot be read and were not compared")
    if report is not None:
        note(f"report: {write_check_page(mine, verdict, others, report, seed)}")
    if out is not None:
        counts = pack_clean(mine, verdict, out, overwrite=overwrite)["counts"]
        left = f"{len(verdict.left_out):,} left out, listed in {out / 'ledger.jsonl'}" if verdict.left_out else "all"
        note(f"{out}: {counts['samples']:,} samples in {counts['shards']:,} shards; {left}")
    return 0 if verdict.clean else 1


def show(summary: dict[str, Any], fmt: str) -> None:
    """Print what was found: all of it as JSON, the findings line by line, or a digest for people."""
    from clipkit.core import emit

    if fmt == "json":
        emit(summary, fmt)
    elif fmt == "human":
        show_to_people(summary)
    else:
        emit(summary["findings"], fmt)


def show_to_people(summary: dict[str, Any]) -> None:
    """The figures and the first findings, for people."""
    from clipkit.core import emit, note
    from clipkit.data.check import FIGURES, FINDING_KINDS

    always = {"samples", "captions", "bytes", "defects"}
    rows = [
        {"figure": name, "value": summary[name], "meaning": FIGURES.get(name) or FINDING_KINDS[name][1]}
        for name in [*FIGURES, *FINDING_KINDS]
        if name in always or (summary[name] and name != "shared")
    ]
    rows += [
        {"figure": "shared", "value": other["shared"], "meaning": f"images that are also in {other['source']}"}
        for other in summary["against"]
    ]
    emit(rows, "human", title=summary["source"])
    shown = ("kind", "shard", "key", "reason")
    first = [[line for line in summary["findings"] if line["kind"] == kind][:SHOWN] for kind in FINDING_KINDS]
    lines = [{name: line[name] for name in shown} for of_kind in first for line in of_kind]
    if lines:
        emit(lines, "human")
    if len(lines) < len(summary["findings"]):
        note(f"… and {len(summary['findings']) - len(lines):,} more: --format jsonl lists all, --report shows them")


if __name__ == "__main__":
    main()
