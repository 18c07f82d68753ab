"""Probes of a model: what its frozen embeddings let a small classifier learn, from images, texts, and both."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipkit.cache import Cache
from clipkit.confidence import Interval, bootstrap, class_mean_of, mean_of, paired_bootstrap, wilson_interval
from clipkit.errors import ClipkitError
from clipkit.evaluation import Evaluation
from clipkit.fusion_probe import (
    IMAGE,
    TEXT,
    Samples,
    early_fusion,
    fit_head,
    fit_heads,
    late_fusion,
    prior_of,
    side_alone,
)
from clipkit.lazy_model import LazyModel
from clipkit.probe_data import Part, ProbeTask
from clipkit.ranking import recall_at_k
from clipkit.results import known_or_new
from clipkit.shared_work import Gather, SharedWork, towers_of

__all__ = ["PROBE_KS", "evaluate_probe", "probe_rows"]

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
    task: ProbeTask,
    model: LazyModel,
    cache: Cache,
    ks: Sequence[int] = PROBE_KS,
    *,
    seed: int = 0,
    batch_size: int = 64,
    show: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Evaluation:
    """Fit probes to the training and judge them on the test; the result of the last time where all is the same.

    Args:
        task: what to learn from what.
        model: the same on all ranks.
        cache: of results and embeddings; where ranks do not share it, it must hold the same for each.
        ks: list lengths.
        seed: of the folds and of the attention.
        batch_size, show, rank, world_size, gather: see `evaluate_retrieval`.

    Returns:
        Figures by name (`probe_rows` has them as rows): ``linear_probe_acc@k``, the share of images with their class
        among the k likeliest, ``linear_probe_mean_per_class_recall``, and with texts the same of
        ``text_linear_probe``, ``early_fusion``, ``late_mean_fusion``, ``late_weighted_fusion``, ``attention_fusion``
        and, of each of the latter, ``…_image_only`` and ``…_text_only``, where the other side is withheld from all
        test samples. ``…_fusion_gain`` is how far its accuracy lies above that of the better side alone. Each has a
        95 % interval in ``…_low`` and ``…_high``. Chance is the answer with the classes that are most frequent in the
        test, whatever the sample.

    Raises:
        ClipkitError: where nothing is left to train on or to test, on all ranks also where one of them fails.
    """
    lengths = tuple(sorted({1, *ks}))
    ranks = SharedWork(towers_of(model, cache), rank, world_size, gather)

    def work() -> Evaluation:
        (train, learned, lost), (test, labels, missed) = (
            _embedded(part, task.fused, ranks, batch_size, show) for part in task
        )
        for what, part in (("training", learned), ("test", labels)):
            if not len(part.labels):
                first = ([*lost, *missed] or [{"key": "", "reason": "no sample"}])[0]
                raise ClipkitError(f"nothing of the {what} can be used; the first: {first['key']}: {first['reason']}")
        figures, chance = ranks.by_the_first(lambda: _judged(task, train, learned, test, labels, lengths, seed))
        counts = {"classes": len(task.classes), "training_images": len(learned.labels), "images": len(labels.labels)}
        if task.fused:
            counts["images_without_text"] = int((~test.there[:, TEXT]).sum())
        return Evaluation(figures, chance, counts | {"shared": task.shared}, [*task.left_out, *lost, *missed])

    about = ["probe", model.facts.fingerprint, model.facts.precision, batch_size, lengths, seed, *task.identity()]
    return known_or_new(cache, about, work, ranks)


def _embedded(
    part: Part, fused: bool, ranks: SharedWork, batch_size: int, show: str | None
) -> tuple[Samples, Part, list[dict[str, Any]]]:
    """Embeddings, the part without the images that cannot be used, and ledger lines of these."""
    images = ranks.images(part.source, batch_size, show)
    kept = images.rows
    texts = [part.texts[row] for row in kept]
    has = np.array([bool(of_image) for of_image in texts], bool)
    if fused:
        vectors = ranks.texts([text for of_image in texts for text in of_image], 4 * batch_size)
        owner = np.repeat(np.arange(len(kept)), [len(of_image) for of_image in texts])
        side = np.zeros((len(kept), vectors.shape[1]), np.float32)
        np.add.at(side, owner, vectors)  # of several texts the mean, as of a class's prompts
        side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
    else:
        side = np.zeros((len(kept), 0), np.float32)
    left = Part(part.source, part.labels[kept], texts, part.groups[kept])
    return Samples(images.vectors, side, np.stack([np.ones_like(has), has], axis=1)), left, images.left_out


def _answers(task: ProbeTask, train: Samples, learned: Part, test: Samples, seed: int) -> Iterator[Answer]:
    classes, groups = len(task.classes), learned.groups if task.grouped else None
    if not task.fused:
        head = fit_head(train.image, learned.labels, classes, groups=groups, seed=seed)
        yield Answer("linear_probe", "linear", "image", head(test.image))
        return

    from clipkit.attention_probe import Training, attention_fusion, fit_attention  # imports torch

    heads = fit_heads(train, learned.labels, classes, groups=groups, seed=seed)
    attention = fit_attention(train, learned.labels, heads, groups=groups, how=Training(seed=seed))
    given = {BOTH: test, "image": test.only(IMAGE), "text": test.only(TEXT)}
    probes: dict[str, Callable[[Samples], np.ndarray]] = {
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
    task: ProbeTask, train: Samples, learned: Part, test: Samples, judged: Part, ks: Sequence[int], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    labels, groups = judged.labels, judged.groups if task.grouped else None
    figures: dict[str, float] = {}
    chance: dict[str, float] = {}
    constant = _right(np.tile(prior_of(labels, len(task.classes)), (len(labels), 1)), labels, ks)
    firsts: dict[str, np.ndarray] = {}

    def tell(name: str, found: Interval, guessed: float | None) -> None:
        figures.update({name: found.value, f"{name}_low": found.low, f"{name}_high": found.high})
        if guessed is not None:
            chance[name] = guessed

    for answer in _answers(task, train, learned, test, seed):
        right = _right(answer.log_shares, labels, ks)
        for k, values in right.items():
            # Samples of one group are right or wrong together, and Wilson's interval is of single ones.
            single = groups is None
            found = wilson_interval(float(values.sum()), len(values)) if single else _drawn(mean_of(values), groups)
            tell(f"{answer.name}_acc@{k}", found, float(constant[k].mean()))
        recall = _drawn(class_mean_of(right[1], labels), np.arange(len(labels)) if groups is None else groups)
        tell(f"{answer.name}_mean_per_class_recall", recall, 1 / len(np.unique(labels)))
        firsts[answer.name] = right[1]
        if answer.inputs == BOTH:
            alone = max((firsts["linear_probe"], firsts["text_linear_probe"]), key=lambda values: values.mean())
            both = (mean_of(right[1]), mean_of(alone))
            tell(f"{answer.name}_gain", paired_bootstrap(*both, len(labels), groups=groups), 0.0)
    return figures, chance


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
        first = f"{name}_acc@1"
        if first not in found.figures:
            continue
        row: dict[str, Any] = {"probe": probe, "inputs": inputs}
        for figure in found.chance:
            if figure.startswith((f"{name}_acc@", f"{name}_mean_per_class_recall")):
                row[figure.removeprefix(f"{name}_")] = found.figures[figure]
            if figure == first:
                row |= {"low": found.figures[f"{first}_low"], "high": found.figures[f"{first}_high"]}
        gain = f"{name}_gain"
        row |= {"chance": found.chance[first], "gain": found.figures.get(gain)}
        row |= {f"gain_{edge}": found.figures.get(f"{gain}_{edge}") for edge in ("low", "high")}
        rows.append(row)
    return rows
