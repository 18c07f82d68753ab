"""Results of evaluations: computed once, told in the field's forms, compared with one another."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import clipkit
from clipkit.cache import Cache, entry_key
from clipkit.evaluation import Evaluation
from clipkit.shared_work import SharedWork

__all__ = ["Result", "as_clip_benchmark", "code_version", "known_or_new", "markdown", "side_by_side"]

# CLIP_benchmark's names for what we call by names that are unique among all tasks.
THEIR_TASKS = {
    "zeroshot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "choice": "image_caption_selection",
    "probe": "linear_probe",
}
THEIR_FIGURES = {
    "zeroshot_acc@1": "acc1",
    "zeroshot_acc@5": "acc5",
    "zeroshot_mean_per_class_recall": "mean_per_class_recall",
    "zeroshot_mean_average_precision": "mean_average_precision",
    "linear_probe_acc@1": "lp_acc1",
    "linear_probe_acc@5": "lp_acc5",
    "linear_probe_mean_per_class_recall": "lp_mean_per_class_recall",
}


@dataclass(frozen=True)
class Result:
    """What an evaluation of one model on one source gave."""

    name: str
    """Of the dataset."""
    task: str
    model: str
    """As the user named it."""
    fingerprint: str
    found: Evaluation


@functools.cache
def code_version() -> str:
    """A hash over the library's source, so that no result outlives the code that it was computed with."""
    hasher = hashlib.blake2b(digest_size=16)
    folder = Path(clipkit.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        hasher.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()


def known_or_new(
    cache: Cache, about: Sequence[object], work: Callable[[], Evaluation], share: SharedWork
) -> Evaluation:
    """A result that was computed before from the same things by the same code, or a new one.

    Args:
        cache: that keeps them.
        about: all that it depends on: fingerprint and precision of the model, the data's identity, prompts, lengths.
        work: computes it, on all ranks.
        share: of the ranks; the first one knows.
    """
    key = entry_key("result", code_version(), *about)
    known = share.by_the_first(lambda: cache.fact(key))
    if known is not None:
        return Evaluation(**known)
    found = work()
    if share.rank == 0:
        cache.keep_fact(key, asdict(found))
    return found


def as_clip_benchmark(result: Result) -> dict[str, Any]:
    """A result in the form of CLIP_benchmark's JSON files, under its names where it has any."""
    return {
        "dataset": result.name,
        "model": result.model,
        "pretrained": result.fingerprint,
        "task": THEIR_TASKS.get(result.task, result.task),
        "metrics": {THEIR_FIGURES.get(name, name): value for name, value in result.found.figures.items()},
        "language": "en",
    }


def side_by_side(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per dataset and figure, a column per model, and what guessing scores."""
    models = list(dict.fromkeys(result.model for result in results))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for name, value in result.found.figures.items():
            row = rows.setdefault((result.name, name), {"dataset": result.name, "figure": name})
            row[result.model] = value
            row["chance"] = result.found.chance.get(name)
    order = ("dataset", "figure", *models, "chance")
    return [{column: row.get(column) for column in order} for row in rows.values()]


def markdown(results: Sequence[Result]) -> str:
    """The same as a table in Markdown."""
    rows = side_by_side(results)
    heads = list(rows[0]) if rows else []
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}{'---:|' * (len(heads) - 2)}"]
    for row in rows:
        cells = ["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
