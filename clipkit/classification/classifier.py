"""Images to be classified by a classifier, and the rows that come of it."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.classification.decisions import CHUNK, OK, STATUSES, Decisions, Rule, decide, joined
from clipkit.classification.images import ImageOptions, Images, open_images
from clipkit.classification.labels import LabelSet, as_label_set
from clipkit.classification.prompts import PROMPTS, class_vectors
from clipkit.core import ClipkitError
from clipkit.data.sources import Source
from clipkit.embedding import Embeddings, cached_texts
from clipkit.metrics import inner_products, on_grid
from clipkit.models import LazyModel, beside_background, fused, probabilities
from clipkit.storage import Cache

if TYPE_CHECKING:
    from clipkit.models import DualEncoder

__all__ = ["Classifier", "classify", "classify_images", "rows_of", "summary", "zero_shot"]

NOTHING = {"label": None, "score": None, "probability": None, "margin": None, "top": []}


@dataclass(frozen=True)
class Classifier:
    """How one model's embeddings become probabilities."""

    vectors: np.ndarray
    """float32 ``[classes, dim]``, unit norm: what the cosines are with."""
    shares: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Of embeddings ``[n, dim]`` and their cosines ``[n, classes]``: probabilities ``[n, classes]``."""


def zero_shot(
    labels: LabelSet,
    prompts: Sequence[str],
    model: LazyModel,
    cache: Cache,
    *,
    scale: float | None = None,
    several: bool = False,
) -> Classifier:
    """By the class vectors of the labels (see `class_vectors`), texts that the cache holds taken from there.

    Args:
        labels, prompts: what the classes are called.
        model: whose texts.
        cache: of texts.
        scale: the factor on the cosines; the model's own where not given.
        several: give each class a probability of its own: by the sigmoid that the model was trained with, else beside
            the background (see `beside_background`).

    Raises:
        ClipkitError: for several classes at once, where the model has no sigmoid and the labels no background.
    """
    facts = model.facts
    factor = facts.scale if scale is None else scale
    if several and facts.bias is None and not labels.background:
        raise ClipkitError(
            f"{model.spec} was trained to tell labels from each other, so a label alone has no probability; name what "
            "the others are told from: --background 'a photo of something else'"
        )
    vectors = class_vectors(labels, prompts, lambda texts: cached_texts(texts, model, cache))

    def shares(_: np.ndarray, cosines: np.ndarray) -> np.ndarray:
        if several and facts.bias is None:
            return beside_background(cosines, factor, labels.background)
        return probabilities(cosines, factor, facts.bias if several else None)

    return Classifier(vectors, shares)


def classify_images(
    images: Images,
    classifiers: Sequence[Classifier],
    rule: Rule,
    *,
    top: int = 5,
    weights: Sequence[float] | None = None,
) -> Decisions:
    """Decide for every image. What is said of one is the same to the last digit whichever others are asked for.

    Args:
        images: with embeddings by as many models as there are classifiers.
        classifiers: of the same classes; the probabilities of several are joined by `fused`.
        rule: what is sure.
        top: how many classes to keep.
        weights: of the classifiers.
    """
    gridded = [on_grid(one.vectors) for one in classifiers]
    parts = []
    for start in range(0, len(images), CHUNK):
        at = slice(start, min(start + CHUNK, len(images)))
        blocks = [images.block(number, at) for number in range(len(classifiers))]
        cosines = [inner_products(block, names, gridded=True) for block, names in zip(blocks, gridded, strict=True)]
        each = [one.shares(block, near) for one, block, near in zip(classifiers, blocks, cosines, strict=True)]
        shares = each[0] if len(each) == 1 else fused(each, weights)
        parts.append(decide(shares, cosines[0] if len(each) == 1 else None, rule, top))
    classes = len(classifiers[0].vectors)
    return joined(parts) if parts else decide(np.zeros((0, classes)), None, rule, top)


def rows_of(
    images: Images, labels: LabelSet, decisions: Decisions, examples: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each image and for each that has no embedding, in source order; see `clipkit.classify`.

    With groups there is ``groups`` too: those of the first class, the widest first, with the probability of each. Where
    an image may be of several classes ``labels`` names all that it is of. Where it is told which images are among the
    examples (bool ``[n]``), ``example`` says so.
    """
    names, groups = labels.names, {name: at for at, name in enumerate(labels.groups)}
    rows = range(len(images)) if images.rows is None else images.rows
    # Embeddings tell of what they left out, but no more where in the source it and they were.
    places = [len(images) if images.rows is None else line.get("row", -1) for line in images.unreadable]
    lines = sorted((place, 0, number) for number, place in enumerate(places))
    for _, is_image, at in heapq.merge(lines, ((row, 1, at) for at, row in enumerate(rows))):
        row = _row(images.paths[at], names, decisions, at) if is_image else _unreadable(images.unreadable[at])
        if groups:
            own = labels.labels[int(decisions.classes[at, 0])].groups if is_image else ()
            row["groups"] = [[name, float(decisions.groups[at, groups[name]])] for name in own]
        if decisions.present.shape[1]:
            row["labels"] = [names[c] for c in np.flatnonzero(decisions.present[at])] if is_image else []
        if examples is not None:
            row["example"] = bool(is_image and examples[at])
        yield row


def summary(labels: LabelSet, decisions: Decisions) -> list[dict[str, Any]]:
    """For each label that any image got: how many did, how many of these surely, and their mean probability."""
    first = decisions.classes[:, 0]
    found = []
    for at, name in enumerate(labels.names):
        own = first == at
        if own.any():
            sure = int((decisions.statuses[own] == OK).sum())
            mean = float(decisions.probabilities[own, 0].mean())
            found.append({"label": name, "images": int(own.sum()), "sure": sure, "mean_probability": mean})
    return sorted(found, key=lambda row: -row["images"])


def classify(
    source: str | Path | Source | Embeddings,
    labels: Sequence[str] | LabelSet,
    model: "DualEncoder | LazyModel",
    *,
    prompts: Sequence[str] = PROMPTS["default"],
    rule: Rule | None = None,
    top: int = 5,
    batch_size: int = 64,
    cache: Cache | None = None,
    show: str | None = None,
) -> list[dict[str, Any]]:
    """Say for every image of a source which of the names fits best.

    Args:
        source: a folder, list, shards, embeddings or an index (of the last two no image is encoded again).
        labels: the class names, or all that is known of the classes.
        model: for texts and images alike.
        prompts: templates with ``{}``, see `clipkit.classification.prompt_set`.
        rule: what is sure; everything where not given.
        top: how many classes to list in ``top``.
        batch_size: images at a time.
        cache: of what was embedded before; none where not given.
        show: title of a progress bar.

    Returns:
        One row per image in source order: ``path``, ``label``, ``score`` (cosine), ``probability`` (softmax over the
        labels at the model's own scale), ``margin`` (to the second's probability), ``top`` (labels with probability),
        ``status``: ``ok``, ``unsure``, ``background`` (a label for "none of these" is first), or ``unreadable`` with
        the reason in ``reason``.

    Raises:
        ClipkitError: where the embeddings come from another model, or labels are wrong.
    """
    cache = cache or Cache(None)
    lazy = model if isinstance(model, LazyModel) else LazyModel.of(model)
    known = as_label_set(labels)
    rule = replace(rule or Rule(), background=known.background, groups=list(known.groups.values()))
    classifier = zero_shot(known, prompts, lazy, cache, several=rule.several)
    images = open_images(source, [lazy], cache, ImageOptions(batch_size=batch_size, show=show)).embed()
    return list(rows_of(images, known, classify_images(images, [classifier], rule, top=top)))


def _row(path: str, names: Sequence[str], decisions: Decisions, at: int) -> dict[str, Any]:
    classes, shares = decisions.classes[at].tolist(), decisions.probabilities[at].tolist()
    cosine = float(decisions.cosines[at, 0])
    return {
        "path": path,
        "label": names[classes[0]],
        "score": None if np.isnan(cosine) else cosine,
        "probability": shares[0],
        "margin": float(decisions.margins[at]),
        "top": [[names[c], share] for c, share in zip(classes, shares, strict=True)],
        "status": STATUSES[decisions.statuses[at]],
        "reason": None,
    }


def _unreadable(line: dict[str, Any]) -> dict[str, Any]:
    return {"path": line["key"], **NOTHING, "status": "unreadable", "reason": line["reason"]}
