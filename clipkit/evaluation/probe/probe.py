"""Probes of a model: what its frozen embeddings let a small classifier learn, from images, texts, and both."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from clipkit.core import ClipkitError
from clipkit.evaluation.embedder import SharedWork
from clipkit.evaluation.measuring import Evaluation
from clipkit.evaluation.probe.data import ProbeSplit, ProbeTask
from clipkit.evaluation.probe.fusion import (
    IMAGE,
    TEXT,
    PairedEmbeddings,
    early_fusion,
    fit_head,
    fit_heads,
    late_fusion,
    prior_of,
    side_alone,
)
from clipkit.metrics import (
    Interval,
    PerSample,
    bootstrap,
    class_mean_of,
    mean,
    mean_of,
    packed,
    paired_bootstrap,
    recall_at_k,
    wilson_interval,
)
from clipkit.storage import hash_of

__all__ = ["PROBE_KS", "evaluate_probe", "probe_rows", "readable_rows"]

PROBE_KS = (1, 5)
BOTH = "image+text"


class Answer(NamedTuple):
    """What a probe says of the test samples, under the name that its figures begin with."""

    name: str
    probe: str
    inputs: str
    log_shares: np.ndarray
    """Logarithms of probabilities ``[n, classes]``."""


NAMES = {
    ("linear", "image"): "linear_probe",
    ("linear", "text"): "text_linear_probe",
    **{
        (f"{kind} fusion", inputs): f"{kind.replace(' ', '_')}_fusion{missing}"
        for kind in ("early", "late mean", "late weighted", "attention")
        for inputs, missing in ((BOTH, ""), ("image", "_image_only"), ("text", "_text_only"))
    },
}
"""Of each probe and what it is given: what its figures begin with."""


def evaluate_probe(
    work: SharedWork,
    task: ProbeTask,
    ks: Sequence[int] = PROBE_KS,
    *,
    seed: int = 0,
    intervals: bool = False,
) -> Evaluation:
    """Fit probes to the training and judge them on the test.

    Args:
        work: the model at work, see `evaluate_retrieval`.
        task: what to learn from what.
        ks: list lengths.
        seed: of the folds and of the attention.
        intervals: see `evaluate_retrieval`.

    Returns:
        Figures by name (`probe_rows` has them as rows): ``linear_probe_acc@k``, the share of images with their class
        among the k likeliest, ``linear_probe_mean_per_class_recall``, and with texts the same of
        ``text_linear_probe``, ``early_fusion``, ``late_mean_fusion``, ``late_weighted_fusion``, ``attention_fusion``
        and, of each of the latter, ``…_image_only`` and ``…_text_only``, where the other side is withheld from all
        test samples. ``…_fusion_gain`` is how far its accuracy lies above that of the better side alone. Chance is the
        answer with the classes that are most frequent in the test, whatever the sample. Where no groups are named what
        was right is kept, so that two models can be paired.

    Raises:
        ClipkitError: where nothing is left to train on or to test, on all ranks also where one of them fails.
    """
    lengths = tuple(sorted({1, *ks}))
    (train, learned, lost), (test, judged, missed) = (_embedded(part, task.fused, work) for part in task)
    for what, part in (("training", learned), ("test", judged)):
        if not len(part.labels):
            first = ([*lost, *missed] or [{"key": "", "reason": "no sample"}])[0]
            raise ClipkitError(f"nothing of the {what} can be used; the first: {first['key']}: {first['reason']}")
    found = work.by_the_first(lambda: _judged(task, train, learned, test, judged, lengths, seed, intervals))
    counts = {"classes": len(task.classes), "training_images": len(learned.labels), "images": len(judged.labels)}
    if task.fused:
        counts["images_without_text"] = int((~test.there[:, TEXT]).sum())
    left_out = [*task.left_out, *lost, *missed]
    return replace(found, counts=counts | {"shared": task.shared}, left_out=left_out)


def _embedded(
    part: ProbeSplit, fused: bool, work: SharedWork
) -> tuple[PairedEmbeddings, ProbeSplit, list[dict[str, Any]]]:
    """Embeddings, the part without the images that cannot be used, and ledger lines of these."""
    images = work.images(part.source)
    kept = images.rows
    texts = [part.texts[row] for row in kept]
    has = np.array([bool(of_image) for of_image in texts], bool)
    if fused:
        vectors = work.texts([text for of_image in texts for text in of_image])
        owner = np.repeat(np.arange(len(kept)), [len(of_image) for of_image in texts])
        side = np.zeros((len(kept), vectors.shape[1]), np.float32)
        np.add.at(side, owner, vectors)  # of several texts the mean, as of a class's prompts
        side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
    else:
        side = np.zeros((len(kept), 0), np.float32)
    left = ProbeSplit(part.source, part.labels[kept], texts, part.groups[kept])
    return PairedEmbeddings(images.vectors, side, np.stack([np.ones_like(has), has], axis=1)), left, images.left_out


def _answers(
    task: ProbeTask, train: PairedEmbeddings, learned: ProbeSplit, test: PairedEmbeddings, seed: int
) -> Iterator[Answer]:
    classes, groups = len(task.classes), learned.groups if task.grouped else None
    if not task.fused:
        head = fit_head(train.image, learned.labels, classes, groups=groups, seed=seed)
        yield Answer("linear_probe", "linear", "image", head(test.image))
        return

    from clipkit.evaluation.probe.attention import Training, attention_fusion, fit_attention  # imports torch

    heads = fit_heads(train, learned.labels, classes, groups=groups, seed=seed)
    attention = fit_attention(train, learned.labels, heads, groups=groups, how=Training(seed=seed))
    given = {BOTH: test, "image": test.only(IMAGE), "text": test.only(TEXT)}
    probes: dict[str, Callable[[PairedEmbeddings], np.ndarray]] = {
        "early fusion": lambda samples: early_fusion(heads, samples),
        "late mean fusion": lambda samples: late_fusion(heads, samples),
        "late weighted fusion": lambda samples: late_fusion(heads, samples, heads.weight),
        "attention fusion": lambda samples: attention_fusion(attention, samples),
    }
    yield Answer("linear_probe", "linear", "image", side_alone(heads, test, IMAGE))
    yield Answer("text_linear_probe", "linear", "text", side_alone(heads, test, TEXT))
    for inputs, samples in given.items():
        for probe, say in probes.items():
            yield Answer(NAMES[probe, inputs], probe, inputs, say(samples))


def _judged(
    task: ProbeTask,
    train: PairedEmbeddings,
    learned: ProbeSplit,
    test: PairedEmbeddings,
    judged: ProbeSplit,
    ks: Sequence[int],
    seed: int,
    intervals: bool,
) -> Evaluation:
    labels, groups = judged.labels, judged.groups if task.grouped else None
    found = Evaluation({}, {}, {}, [])
    constant = _right(np.tile(prior_of(labels, len(task.classes)), (len(labels), 1)), labels, ks)
    each: dict[str, np.ndarray] = {}

    def tell(name: str, figure: float, guessed: float, interval: Callable[[], Interval]) -> None:
        found.figures[name], found.chance[name] = figure, guessed
        if intervals:
            found.intervals[name] = list(interval()[1:])

    for answer in _answers(task, train, learned, test, seed):
        right = _right(answer.log_shares, labels, ks)
        for k, values in right.items():
            name = f"{answer.name}_acc@{k}"
            each[name] = values
            tell(name, mean(values), float(constant[k].mean()), functools.partial(_interval, values, groups))
        recall = class_mean_of(right[1], labels)
        units = np.arange(len(labels)) if groups is None else groups
        drawn = functools.partial(_drawn, recall, units)
        name = f"{answer.name}_mean_per_class_recall"
        tell(name, float(recall(np.ones((1, len(labels)), np.int64))[0]), 1 / len(np.unique(labels)), drawn)
        if answer.inputs == BOTH:
            alone = max((each[f"{side}_acc@1"] for side in ("linear_probe", "text_linear_probe")), key=np.mean)
            both = mean_of(right[1]), mean_of(alone)
            gain = functools.partial(paired_bootstrap, *both, len(labels), groups=groups)
            tell(f"{answer.name}_gain", mean(right[1]) - mean(alone), 0.0, gain)
    if intervals and groups is None:
        of = hash_of(judged.source.identity(), labels.tolist()).hex()
        found.samples = packed(PerSample.of_values(each, of))
    return found


def _interval(values: np.ndarray, groups: np.ndarray | None) -> Interval:
    # PairedEmbeddings of one group are right or wrong together, and Wilson's interval is of single ones.
    return wilson_interval(float(values.sum()), len(values)) if groups is None else _drawn(mean_of(values), groups)


def _drawn(statistic: Any, groups: np.ndarray) -> Interval:
    return bootstrap(statistic, len(groups), groups=groups)


def _right(log_shares: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> dict[int, np.ndarray]:
    """For each list length whether the class of each sample is in it; where it ties at the end, the chance of it."""
    own = log_shares[np.arange(len(labels)), labels][:, None]
    better, tied = (log_shares > own).sum(axis=1), (log_shares == own).sum(axis=1)
    return {k: recall_at_k(better, tied, np.ones_like(tied), k) for k in ks}


def probe_rows(found: Evaluation) -> list[dict[str, Any]]:
    """The figures as a table: a row for each probe and what it is given, with the accuracy and its interval."""
    rows = []
    for (probe, inputs), name in NAMES.items():
        first, gain = f"{name}_acc@1", f"{name}_gain"
        if first not in found.figures:
            continue
        row: dict[str, Any] = {"probe": probe, "inputs": inputs}
        for figure, value in found.figures.items():
            if figure.startswith((f"{name}_acc@", f"{name}_mean_per_class_recall")):
                row[figure.removeprefix(f"{name}_")] = value
            if figure == first:
                row["low"], row["high"] = found.intervals.get(first, (None, None))
        row |= {"chance": found.chance[first], "gain": found.figures.get(gain)}
        row["gain_low"], row["gain_high"] = found.intervals.get(gain, (None, None))
        rows.append(row)
    return rows


def readable_rows(found: Evaluation) -> list[dict[str, Any]]:
    """The same for people: intervals in the cells of their figures."""

    def within(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
        ends = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
        return "" if value is None else f"{value:{sign}.3f}{ends}"

    told = []
    for row in probe_rows(found):
        cells = {name: value for name, value in row.items() if name.startswith(("probe", "inputs", "acc@", "chance"))}
        cells["acc@1"] = within(row["acc@1"], row["low"], row["high"])
        cells["class recall"] = row["mean_per_class_recall"]
        told.append(cells | {"gain": within(row["gain"], row["gain_low"], row["gain_high"], "+")})
    return told
