"""Results of evaluations: computed once, kept for as long as data, model and code are the same."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, read_json
from clipkit.evaluation.embedder import SharedWork
from clipkit.evaluation.measuring import Evaluation
from clipkit.metrics import Interval
from clipkit.storage import hash_of

__all__ = ["Differences", "Result", "as_clip_benchmark", "code_version", "from_clip_benchmark", "known_or_new"]

Differences = dict[tuple[str, str, str], dict[str, Interval]]
"""By dataset, task and model: of each figure the difference from another model's, with its interval."""

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
    "choice_acc": "text_acc",
    "winoground_text": "text_acc",
    "winoground_image": "image_acc",
    "winoground_group": "acc",
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
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        hasher.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()


def known_or_new(
    about: Sequence[object],
    compute: Callable[[], Evaluation],
    work: SharedWork,
    lasts: Callable[[Evaluation], bool] = lambda _: True,
) -> Evaluation:
    """A result that was computed before from the same things by the same code, or a new one.

    Args:
        about: all that it depends on: fingerprint and precision of the model, the data's identity, prompts, lengths.
        compute: gives a new one, on all ranks.
        work: of whose ranks the first knows, from its cache.
        lasts: whether a new one would come out again; one that might not is not kept.
    """
    key = hash_of("result", code_version(), *about)
    known = work.by_the_first(lambda: work.cache.fact(key))
    if known is not None:
        return Evaluation(**known)
    result = compute()
    if work.rank == 0 and lasts(result):
        work.cache.keep_fact(key, asdict(result))
    return result


def as_clip_benchmark(result: Result) -> dict[str, Any]:
    """A result in the form of CLIP_benchmark's JSON files, under its names where it has any.

    Where its own definitions were asked for, ``metrics`` are those; and each interval stands there as ``…_low`` and
    ``…_high``. What it knows nothing of is beside, under ``clipkit``: our own figures, chance, counts, and what the
    model made of each sample, so that a later model can be paired with this one.
    """
    found = result.found
    metrics: dict[str, Any] = {THEIR_FIGURES.get(name, name): value for name, value in found.figures.items()}
    for name, (low, high) in found.intervals.items():
        metrics |= {f"{THEIR_FIGURES.get(name, name)}_low": low, f"{THEIR_FIGURES.get(name, name)}_high": high}
    about = asdict(found) | {"left_out": len(found.left_out)}
    return {
        "dataset": result.name,
        "model": result.model,
        "pretrained": result.fingerprint,
        "task": THEIR_TASKS.get(result.task, result.task),
        "metrics": metrics | found.compat,
        "language": "en",
        "clipkit": about,
    }


def from_clip_benchmark(path: Path) -> list[Result]:
    """The results of a file that `as_clip_benchmark` made, or CLIP_benchmark itself, of which we know less.

    Raises:
        ClipkitError: where it is no such file.
    """
    found = read_json(path)
    ours = {theirs: name for name, theirs in THEIR_TASKS.items()}
    results = []
    for entry in found if isinstance(found, list) else [found]:
        if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict) or "task" not in entry:
            raise ClipkitError(f"{path} holds no results; give what --out wrote (.json), or CLIP_benchmark's file")
        metrics = entry["metrics"]
        known = entry.get("clipkit")
        if isinstance(known, dict):
            names = {field.name for field in fields(Evaluation)} - {"left_out"}
            try:
                result = Evaluation(**{name: known[name] for name in names & known.keys()}, left_out=[])
            except TypeError as error:
                raise ClipkitError(f"{path} is no result of this version ({error}); evaluate it again") from error
        else:
            figures = {name: metrics[theirs] for name, theirs in THEIR_FIGURES.items() if theirs in metrics}
            figures |= {name: value for name, value in metrics.items() if name not in THEIR_FIGURES.values()}
            result = Evaluation(figures, {}, {}, [])
        task = ours.get(str(entry["task"]), str(entry["task"]))
        name, model, fingerprint = (str(entry.get(key, "")) for key in ("dataset", "model", "pretrained"))
        results.append(Result(name, task, model, fingerprint, result))
    return results
