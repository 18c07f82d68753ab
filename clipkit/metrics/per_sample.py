"""What a model made of each sample: enough to say how far each figure may be off, and to pair two models.

Kept beside a result, it lets a later one be compared on the same samples by the paired bootstrap, without the model or
the data. It holds ranks, not scores, wherever ranks are all that the figures need.
"""

import base64
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.metrics.average_precision import mean_average_precision_of
from clipkit.metrics.intervals import (
    Interval,
    Statistic,
    bootstrap_all,
    class_mean_of,
    mean_of,
    paired_bootstrap,
    unit_mean_of,
    unit_share_of,
    wilson_interval,
)
from clipkit.metrics.ranking import RankCounts, median_rank_of, recall_at_k
from clipkit.metrics.retrieval import RetrievalRanks, retrieval_per_sample
from clipkit.metrics.roc import auroc_of, fpr_at_tpr_of

__all__ = [
    "MEAN_AVERAGE_PRECISION",
    "PerSample",
    "differences",
    "intervals_of",
    "is_rank",
    "lower_is_better",
    "packed",
    "served_share",
    "unpacked",
]

Array = np.ndarray
MEAN_AVERAGE_PRECISION = "zeroshot_mean_average_precision"
CENTRED = frozenset({MEAN_AVERAGE_PRECISION})  # an image that is drawn twice ties with itself, which lifts precision
LARGEST = 4_000_000  # scores that are kept with a result: some 16 MB; beyond, it can be compared by its interval only
DRAWN = 2 * 10**8  # samples in all draws together, some seconds; the draws become fewer where there are more


@dataclass(frozen=True)
class PerSample:
    """What a model made of each sample of some data."""

    form: str
    """What is known of each: ``retrieval``, ``classes``, ``labels``, ``values`` or ``unknown``; see ``of_…``."""
    of: str
    """A hash of which samples they are, in which order: only of the same ones two models can be paired."""
    arrays: dict[str, Array]
    ks: list[int] = field(default_factory=list)

    @classmethod
    def of_retrieval(
        cls, ranks: RetrievalRanks, ks: list[int], of: str, served: Mapping[str, Array] | None = None
    ) -> "PerSample":
        """Where the right items rank, whose figures are those of `retrieval_figures`. An image is drawn with captions.

        `served` may add what else is a mean over the same queries, 0 or 1 of each, under names from ``served_``.
        """
        arrays: dict[str, Array] = dict(served or {})
        arrays |= {f"{side}_{name}": values for side in ("by_text", "by_image") for name, values in _ranks(ranks, side)}
        arrays["image_of_text"] = ranks.image_of_text
        return cls("retrieval", of, arrays, ks)

    @classmethod
    def of_classes(cls, ranks: RankCounts, labels: Array, ks: list[int], of: str) -> "PerSample":
        """Where the class of each image ranks, for `zeroshot_figures`."""
        return cls("classes", of, {**ranks._asdict(), "labels": labels}, ks)

    @classmethod
    def of_labels(cls, scores: Array, labels: Array, of: str) -> "PerSample":
        """The scores ``[n, classes]`` of images of which several classes may be true, for mean average precision."""
        return cls("labels", of, {"scores": scores, "labels": labels.astype(np.uint8)})

    @classmethod
    def of_values(cls, values: Mapping[str, Array], of: str) -> "PerSample":
        """What each sample adds to figures that are means, by the figure's name: float ``[n]``, 0 to 1."""
        return cls("values", of, dict(values))

    @classmethod
    def of_unknown(cls, known: Mapping[str, Array], unknown: Mapping[str, Array], of: str) -> "PerSample":
        """Scores ``[n]`` of samples of known classes and ``[m]`` of others, by the name that their figures begin with.

        Places in their order are kept, from the lowest: neither figure depends on more.
        """
        arrays = {name: np.unique(np.append(known[name], unknown[name]), return_inverse=True)[1] for name in known}
        counts = [len(next(iter(scores.values()))) for scores in (known, unknown)]
        return cls("unknown", of, {**arrays, "known": np.repeat(np.array([1, 0], np.uint8), counts)})

    def statistics(self) -> tuple[int, dict[str, Statistic]]:
        """How many units can be drawn, and every figure as a function of how often each is."""
        return FORMS[self.form](self)

    def shares(self) -> dict[str, Array]:
        """The values of those figures that are shares of independent samples, for Wilson's interval."""
        if self.form == "values":
            return self.arrays
        if self.form == "classes":
            ranks = RankCounts(*(self.arrays[name] for name in RankCounts._fields))
            return {f"zeroshot_acc@{k}": recall_at_k(*ranks, k) for k in self.ks}
        if self.form == "retrieval":
            ranks = _retrieval_ranks(self)
            values = retrieval_per_sample(ranks, self.ks)
            values |= {
                name: each.astype(np.float64) for name, each in self.arrays.items() if name.startswith("served_")
            }
            # Captions of one image stand and fall together, so that they tell less than as many images would.
            alone = len(np.unique(ranks.image_of_text)) == len(ranks.image_of_text)
            return {n: each for n, each in values.items() if "recall@" in n and (alone or "text_retrieval" in n)}
        return {}


def _ranks(ranks: RetrievalRanks, side: str) -> list[tuple[str, Array]]:
    return list(getattr(ranks, side)._asdict().items())


def _retrieval_ranks(samples: PerSample) -> RetrievalRanks:
    by_text, by_image = (
        RankCounts(*(samples.arrays[f"{side}_{name}"].astype(np.int64) for name in RankCounts._fields))
        for side in ("by_text", "by_image")
    )
    return RetrievalRanks(by_text, by_image, samples.arrays["image_of_text"])


def _of_retrieval(samples: PerSample) -> tuple[int, dict[str, Statistic]]:
    by_text, by_image, image_of_text = ranks = _retrieval_ranks(samples)
    unit_of = np.unique(image_of_text, return_inverse=True)[1].reshape(-1)
    units = len(by_image.better)
    each = np.arange(units)
    median_of_texts, median_of_images = median_rank_of(by_text), median_rank_of(by_image)
    exactly = retrieval_per_sample(ranks, samples.ks)
    found = {
        name: unit_mean_of(values, unit_of if name.startswith("image_") else each, units)
        for name, values in exactly.items()
    }
    for name, values in samples.arrays.items():
        if name.startswith("served_"):
            hits, unit = values.astype(np.float64), unit_of if "_image_" in name else each
            found[name] = unit_mean_of(hits, unit, units)
            share, exact = served_share(name), exactly[name.removeprefix("served_")]
            found[share] = unit_share_of(hits * exact, exact, unit, units)
    found["image_retrieval_median_rank"] = lambda counts: median_of_texts(counts[:, unit_of])
    found["text_retrieval_median_rank"] = median_of_images
    return units, found


def served_share(name: str) -> str:
    """What the share of an exact recall that an index answers is called, given ``served_…_recall@k``."""
    side, _, k = name.removeprefix("served_").partition("_recall@")
    return f"{side}_served_share@{k}"


def _of_classes(samples: PerSample) -> tuple[int, dict[str, Statistic]]:
    found: dict[str, Statistic] = {name: mean_of(values) for name, values in samples.shares().items()}
    ranks = RankCounts(*(samples.arrays[name].astype(np.int64) for name in RankCounts._fields))
    labels = samples.arrays["labels"].astype(np.int64)
    found["zeroshot_mean_per_class_recall"] = class_mean_of(recall_at_k(*ranks, 1), labels)
    return len(labels), found


def _of_labels(samples: PerSample) -> tuple[int, dict[str, Statistic]]:
    scores, labels = samples.arrays["scores"], samples.arrays["labels"].astype(bool)
    return len(scores), {MEAN_AVERAGE_PRECISION: mean_average_precision_of(scores, labels)}


def _of_values(samples: PerSample) -> tuple[int, dict[str, Statistic]]:
    found: dict[str, Statistic] = {name: mean_of(values) for name, values in samples.arrays.items()}
    return len(next(iter(samples.arrays.values()))), found


def _of_unknown(samples: PerSample) -> tuple[int, dict[str, Statistic]]:
    known = samples.arrays["known"].astype(bool)
    statistics: dict[str, Statistic] = {}
    for name, places in samples.arrays.items():
        if name != "known":
            statistics |= {f"{name}_auroc": auroc_of(places, known), f"{name}_fpr95": fpr_at_tpr_of(places, known)}
    return len(known), statistics


FORMS: dict[str, Callable[[PerSample], tuple[int, dict[str, Statistic]]]] = {
    "retrieval": _of_retrieval,
    "classes": _of_classes,
    "labels": _of_labels,
    "values": _of_values,
    "unknown": _of_unknown,
}


def _draws(samples: PerSample) -> int:
    size = max(len(values.reshape(-1)) for values in samples.arrays.values())
    return min(1000, max(200, DRAWN // max(size, 1)))


def intervals_of(samples: PerSample, level: float = 0.95) -> dict[str, Interval]:
    """Every figure with its interval: Wilson's for shares of independent samples, else by the bootstrap over images.

    The bootstrap draws a thousand times, and down to 200 times where there are very many samples. The mean average
    precision's draws are centred on it, see `clipkit.metrics.bootstrap`.
    """
    units, statistics = samples.statistics()
    shares = {
        name: wilson_interval(float(values.sum()), len(values), level) for name, values in samples.shares().items()
    }
    others = {name: statistic for name, statistic in statistics.items() if name not in shares}
    drawn = bootstrap_all(others, units, level=level, draws=_draws(samples), centred=CENTRED)
    for name in drawn.keys() & CENTRED:  # shifted, they may leave the range of a precision
        value, low, high = drawn[name]
        drawn[name] = Interval(value, max(low, 0.0), min(high, 1.0))
    return shares | drawn


def differences(first: PerSample, second: PerSample, level: float = 0.95) -> dict[str, Interval] | None:
    """How much larger each figure of the first model is than the second's, by the paired bootstrap.

    Returns:
        By name, for the figures that both have; a model beside itself differs by 0 with an interval from 0 to 0. None
        where the samples are not the same ones.
    """
    if (first.form, first.of) != (second.form, second.of):
        return None
    (units, one), (others, two) = first.statistics(), second.statistics()
    if units != others:
        return None
    both = {name: (statistic, two[name]) for name, statistic in one.items() if name in two}
    how: dict[str, Any] = {"level": level, "draws": _draws(first)}
    return {
        name: paired_bootstrap(ours, theirs, units, centred=name in CENTRED, **how)
        for name, (ours, theirs) in both.items()
    }


def lower_is_better(figure: str) -> bool:
    """Whether a smaller value of this figure is the better one, as of a rank or of a rate of false positives."""
    return is_rank(figure) or figure.endswith("_fpr95")


def is_rank(figure: str) -> bool:
    """Whether a figure counts from 1, and is no fraction."""
    return figure.endswith("_median_rank")


def packed(samples: PerSample) -> dict[str, Any] | None:
    """As plain values for JSON: arrays as narrow as they can be, deflated, in base64; None where they are too large."""
    if samples.form == "labels" and samples.arrays["scores"].size > LARGEST:
        return None
    arrays = {}
    for name, values in samples.arrays.items():
        narrow = values
        if values.dtype.kind in "iu":
            narrow = values.astype(np.min_scalar_type(int(values.max(initial=0))))
        data = base64.b64encode(zlib.compress(np.ascontiguousarray(narrow).tobytes(), 6)).decode()
        arrays[name] = {"dtype": narrow.dtype.str, "shape": list(narrow.shape), "data": data}
    return {"form": samples.form, "of": samples.of, "ks": samples.ks, "arrays": arrays}


def unpacked(found: Mapping[str, Any]) -> PerSample:
    """What `packed` gave.

    Raises:
        ClipkitError: where it is something else.
    """
    try:
        if found["form"] not in FORMS:
            raise ValueError(f"form {found['form']!r}")
        arrays = {}
        for name, about in found["arrays"].items():
            values = np.frombuffer(zlib.decompress(base64.b64decode(about["data"])), np.dtype(about["dtype"]))
            values = values.reshape(about["shape"])
            arrays[name] = values.astype(np.int64) if values.dtype.kind in "iu" else values
        return PerSample(found["form"], found["of"], arrays, list(found["ks"]))
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise ClipkitError(f"what is kept of each sample cannot be read ({error}); evaluate it again") from error
