"""From the embeddings of images to probabilities and decisions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipkit.classification.decisions import CHUNK, Decisions, Rule, decide, joined
from clipkit.classification.images import Images
from clipkit.classification.labels import LabelSet
from clipkit.classification.prompts import class_vectors
from clipkit.core import ClipkitError
from clipkit.embedding import cached_texts
from clipkit.metrics import inner_products, on_grid
from clipkit.models import LazyModel, beside_background, fused, probabilities
from clipkit.storage import Cache

__all__ = ["Classifier", "classify_images", "zero_shot"]


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
) -> Decisions:
    """Decide for every image. What is said of one is the same to the last digit whichever others are asked for.

    Args:
        images: with embeddings by as many models as there are classifiers.
        classifiers: of the same classes; the probabilities of several are joined by `fused`.
        rule: what is sure.
        top: how many classes to keep.
    """
    gridded = [on_grid(one.vectors) for one in classifiers]
    parts = []
    for start in range(0, len(images), CHUNK):
        at = slice(start, min(start + CHUNK, len(images)))
        blocks = [images.block(number, at) for number in range(len(classifiers))]
        cosines = [inner_products(block, names, gridded=True) for block, names in zip(blocks, gridded, strict=True)]
        each = [one.shares(block, near) for one, block, near in zip(classifiers, blocks, cosines, strict=True)]
        shares = each[0] if len(each) == 1 else fused(each)
        parts.append(decide(shares, cosines[0] if len(each) == 1 else None, rule, top))
    classes = len(classifiers[0].vectors)
    return joined(parts) if parts else decide(np.zeros((0, classes)), None, rule, top)
