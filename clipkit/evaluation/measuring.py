"""From embeddings to the figures of an evaluation: with chance, intervals, and what is kept of each sample.

One function per task, over arrays in memory or on the disk, whoever embedded them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.metrics import (
    MEAN_AVERAGE_PRECISION,
    WINOGROUND_CHANCE,
    Interval,
    PerSample,
    VectorBlocks,
    auroc,
    chance_of,
    choice_per_sample,
    choice_scores,
    clamped,
    clip_benchmark_choice,
    clip_benchmark_classification,
    clip_benchmark_mean_average_precision,
    clip_benchmark_retrieval,
    confusion_matrix,
    differences,
    fpr_at_tpr,
    guessed_retrieval,
    inner_products,
    intervals_of,
    mean,
    mean_average_precision,
    packed,
    rank_pairs,
    retrieval_figures,
    retrieval_per_sample,
    retrieval_ranks,
    served_share,
    unpacked,
    winoground_per_sample,
    zeroshot_chance,
    zeroshot_figures,
)

__all__ = [
    "CHOICE",
    "COMPAT",
    "Evaluation",
    "Further",
    "measure_choice",
    "measure_classes",
    "measure_labels",
    "measure_retrieval",
    "measure_unknown",
    "measured_values",
    "paired_differences",
]

Array = np.ndarray
COMPAT = "clip_benchmark"
CHOICE = "choice_acc"
SHOWN = 20  # pairs of classes that were taken for each other
CHUNK = 4096  # images at a time
COMPAT_ROWS = 100_000  # of either side: those definitions sort every row of scores


@dataclass
class Evaluation:
    """Figures of an evaluation, and what they were measured on; the same on every rank."""

    figures: dict[str, float]
    """Fractions, as `clipkit.metrics` names them; median ranks are ranks from 1."""
    chance: dict[str, float]
    """What guessing scores, under the same names."""
    counts: dict[str, int]
    """How many ``images`` were used, and ``captions``, ``classes`` or ``instances``."""
    left_out: list[dict[str, Any]]
    """Ledger lines of what could not be used, with ``key`` and ``reason``; ``unread`` where it may be another time."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """The 95 % interval of each figure, low and high; none where there is too little to tell."""
    samples: dict[str, Any] | None = None
    """What the model made of each sample, see `clipkit.metrics.packed`."""
    unknown_samples: dict[str, Any] | None = None
    """The same of the samples that are told from those of no class, see `measure_unknown`."""
    compat: dict[str, float] = field(default_factory=dict)
    """What CLIP_benchmark's definitions say, under its own names."""
    confused: list[dict[str, Any]] = field(default_factory=list)
    """Classes that were taken for others, most often first: ``shown``, ``said``, ``images``."""

    def flat(self) -> dict[str, Any]:
        """Every number under a name of its own: figures, ``…_low`` and ``…_high``, ``chance_…``, counts."""
        found: dict[str, Any] = dict(self.figures)
        for name, (low, high) in self.intervals.items():
            found |= {f"{name}_low": low, f"{name}_high": high}
        found |= {f"chance_{name}": value for name, value in self.chance.items()}
        found |= {f"{COMPAT}_{name}": value for name, value in self.compat.items()}
        return found | self.counts | {"left_out": len(self.left_out)}


@dataclass(frozen=True)
class Further:
    """What is wanted beside the figures; during training nothing is."""

    of: str | None = None
    """A hash of which samples they are: with it intervals are worked out, and samples kept."""
    compat: bool = False
    """Also what CLIP_benchmark's definitions say."""


def _evaluation(
    figures: dict[str, float],
    chance: dict[str, float],
    counts: dict[str, int],
    samples: Callable[[str], PerSample],
    further: Further,
) -> Evaluation:
    found = Evaluation(figures, chance, counts, [])
    if further.of is not None:
        of = samples(further.of)
        found.samples = packed(of)
        found.intervals = {
            name: [interval.low, interval.high]
            for name, interval in intervals_of(of).items()
            if name in figures and interval.low == interval.low
        }
    return found


def measure_retrieval(
    image: VectorBlocks,
    text: VectorBlocks,
    image_of_text: Array,
    ks: Sequence[int],
    further: Further = Further(),
    *,
    served: Mapping[str, Array] | None = None,
    advance: Callable[[int], object] | None = None,
) -> Evaluation:
    """Recall at k, mean reciprocal rank and median rank, both ways (`clipkit.metrics.retrieval_figures`).

    Args:
        image, text, image_of_text, advance: see `clipkit.metrics.retrieval_ranks`.
        ks: list lengths.
        further: what else is wanted. CLIP_benchmark has no recall at lists longer than a side; it is left out.
        served: whether each query's own item was among the answers of an index, see `clipkit.evaluation.index_recall`.

    Raises:
        ClipkitError: see `retrieval_ranks`; or for CLIP_benchmark's definitions of too much.
    """
    ranks = retrieval_ranks(image, text, image_of_text, advance=advance)
    images = len(image) if isinstance(image, np.ndarray) else sum(map(len, image))
    figures, chance = (retrieval_figures(each, ks) for each in (ranks, guessed_retrieval(images, image_of_text)))
    exact = retrieval_per_sample(ranks, ks) if served else {}
    for name, hits in (served or {}).items():
        plain = name.removeprefix("served_")
        figures[name], chance[name] = mean(hits.astype(np.float64)), chance[plain]
        # Of what the exact search finds, in the mean over the orders of ties.
        figures[served_share(name)] = float((hits * exact[plain]).sum() / max(exact[plain].sum(), 1e-12))
    found = _evaluation(
        figures,
        chance,
        {"images": images, "captions": len(image_of_text)},
        lambda of: PerSample.of_retrieval(ranks, list(ks), of, served),
        further,
    )
    if further.compat:
        sides = _as_one_array(image), _as_one_array(text)
        fitting = [k for k in ks if k not in clamped(ks, min(map(len, sides)))]
        found.compat = clip_benchmark_retrieval(*sides, image_of_text, fitting) if fitting else {}
    return found


def _as_one_array(vectors: VectorBlocks) -> Array:
    """All of it in memory as float32, for definitions that need it so.

    Raises:
        ClipkitError: where that is too much.
    """
    parts = [vectors] if isinstance(vectors, np.ndarray) else vectors
    if (rows := sum(map(len, parts))) > COMPAT_ROWS:
        raise ClipkitError(
            f"--compat {COMPAT} sorts every row of scores, which takes too long for {rows:,} rows; ask for it on no "
            f"more than {COMPAT_ROWS:,}"
        )
    return np.concatenate([part.astype(np.float32) for part in parts])


def measure_classes(
    image: VectorBlocks,
    vectors: Array,
    labels: Array,
    ks: Sequence[int],
    names: Sequence[str],
    further: Further = Further(),
) -> Evaluation:
    """Accuracy of images of one class each (`clipkit.metrics.accuracy.zeroshot_accuracy`).

    Args:
        image: unit-norm embeddings ``[n, dim]``, see `clipkit.metrics.retrieval_ranks`.
        vectors: a unit-norm vector per class.
        labels: int64 ``[n]``, the class of each.
        ks: list lengths.
        names: of the classes.
        further: what else is wanted.
    """
    ranks, _ = rank_pairs(image, vectors, labels, names=("image", "class"))
    found = _evaluation(
        zeroshot_figures(ranks, labels, ks),
        zeroshot_chance(len(names), ks),
        {"images": len(labels), "classes": len(names)},
        lambda of: PerSample.of_classes(ranks, labels, list(ks), of),
        further,
    )
    if further.of is not None:
        found.confused = _confused(_nearest(image, vectors), labels, names)
    if further.compat:
        theirs = clip_benchmark_classification(_as_one_array(image), vectors, labels)
        found.compat = {name: value for name, value in theirs.items() if value == value}
    return found


def _nearest(image: VectorBlocks, vectors: Array) -> Array:
    parts = [image] if isinstance(image, np.ndarray) else image
    blocks = (part[at : at + CHUNK] for part in parts for at in range(0, len(part), CHUNK))
    return np.concatenate([inner_products(block, vectors).argmax(axis=1) for block in blocks])


def _confused(said: Array, labels: Array, names: Sequence[str]) -> list[dict[str, Any]]:
    if len(names) ** 2 > 10**7:  # a matrix of more would take more than the embeddings
        return []
    counts = confusion_matrix(labels, said.astype(np.int64), len(names))
    np.fill_diagonal(counts, 0)
    most = np.argsort(-counts, axis=None, kind="stable")[:SHOWN]
    pairs = zip(*(part.tolist() for part in np.unravel_index(most, counts.shape)), strict=True)
    return [
        {"shown": names[row], "said": names[column], "images": int(counts[row, column])}
        for row, column in pairs
        if counts[row, column]
    ]


def measure_labels(image: Array, vectors: Array, labels: Array, further: Further = Further()) -> Evaluation:
    """Mean average precision of images of any number of classes each (`clipkit.metrics.average_precision`).

    Args:
        image: unit-norm embeddings ``[n, dim]``.
        vectors: a unit-norm vector per class.
        labels: bool ``[n, classes]``.
        further: what else is wanted.
    """
    scores = inner_products(image, vectors).astype(np.float32)
    found = _evaluation(
        {MEAN_AVERAGE_PRECISION: mean_average_precision(scores, labels)},
        {MEAN_AVERAGE_PRECISION: chance_of(labels)},
        {"images": len(labels), "classes": labels.shape[1]},
        lambda of: PerSample.of_labels(scores, labels, of),
        further,
    )
    if further.compat:
        found.compat = {"mean_average_precision": clip_benchmark_mean_average_precision(scores, labels)}
    return found


def measure_unknown(
    known: Mapping[str, Array], unknown: Mapping[str, Array], further: Further = Further()
) -> Evaluation:
    """How well scores tell samples of known classes from those that show none of them.

    ``…_auroc`` is the chance that a known one scores higher than an unknown one, ties counting half (Mann & Whitney
    1947); ``…_fpr95`` the share of the unknown that pass where 95 % of the known do, which is better the lower it is
    (Liang et al. 2018). Guessing scores 0.5 and 0.95.

    Args:
        known: float64 ``[n]``, the higher the surer, by the name that the figures begin with.
        unknown: the same of the others ``[m]``.
        further: what else is wanted.
    """
    figures, chance = {}, {}
    for name, scores in known.items():
        figures |= {f"{name}_auroc": auroc(scores, unknown[name]), f"{name}_fpr95": fpr_at_tpr(scores, unknown[name])}
        chance |= {f"{name}_auroc": 0.5, f"{name}_fpr95": 0.95}
    counts = {"unknown_images": len(next(iter(unknown.values())))}
    return _evaluation(figures, chance, counts, lambda of: PerSample.of_unknown(known, unknown, of), further)


def paired_differences(first: Evaluation, second: Evaluation) -> dict[str, Interval]:
    """How much larger each figure of the first is (`clipkit.metrics.differences`).

    Figures are left out whose samples are not kept by both, or are not the same ones.
    """
    pairs = ((first.samples, second.samples), (first.unknown_samples, second.unknown_samples))
    found: dict[str, Interval] = {}
    for ours, theirs in pairs:
        if ours and theirs:
            found |= differences(unpacked(ours), unpacked(theirs)) or {}
    return found


def measure_choice(image: Array, text: Array, further: Further = Further()) -> Evaluation:
    """The choice of the right caption and, of two images, of the right image (`clipkit.metrics.choice`).

    Args:
        image: unit-norm embeddings ``[n, images, dim]`` of one or two images in each instance.
        text: of its two captions; of one image the first is the right one, of two the i-th goes with the i-th.
        further: what else is wanted.
    """
    scores = choice_scores(image, text)
    if image.shape[1] == 1:
        values, chance = {CHOICE: choice_per_sample(scores[:, 0])}, {CHOICE: 1 / text.shape[1]}
    else:
        values, chance = winoground_per_sample(scores), WINOGROUND_CHANCE
    found = measured_values(values, chance, {"instances": len(scores)}, further)
    if further.compat:
        found.compat = clip_benchmark_choice(image.astype(np.float32), text.astype(np.float32))
    return found


def measured_values(
    values: Mapping[str, Array], chance: Mapping[str, float], counts: dict[str, int], further: Further = Further()
) -> Evaluation:
    """Figures that are the means of values of the samples, such as whether each was right.

    Args:
        values: float64 ``[n]``, 0 to 1, by the figure's name.
        chance: what guessing scores, by the same names.
        counts: of what.
        further: what else is wanted.
    """
    figures = {name: mean(of_samples) for name, of_samples in values.items()}
    return _evaluation(figures, dict(chance), counts, lambda of: PerSample.of_values(values, of), further)
