"""Figures as other programs define them where clipkit's own differ, to be set beside what was measured with those.

They differ in ties, which come in the order of the items here, and in what is missing. CLIP_benchmark (1.6.2) is meant
as its modules below ``clip_benchmark/metrics`` compute it in float32 (``--no_amp``). It leaves the order of ties to
``torch.topk`` and ``torch.sort``, which do not say which comes first; its figure lies between those of the best and of
the worst order. Without ties, and with nothing missing, all agree with `clipkit.metrics`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.core import ClipkitError
from clipkit.metrics.choice import choice_scores

__all__ = [
    "clip_benchmark_choice",
    "clip_benchmark_classification",
    "clip_benchmark_mean_average_precision",
    "clip_benchmark_retrieval",
]

Array = np.ndarray
CHUNK = 1024  # queries at a time


def clip_benchmark_retrieval(
    image: Float[Array, "images dim"],
    text: Float[Array, "texts dim"],
    image_of_text: Int[Array, " texts"],
    ks: Sequence[int] = (5,),
) -> dict[str, float]:
    """Recall as ``zeroshot_retrieval.py`` has it: `clipkit.metrics.retrieval.retrieval_recall` but for the order of
    ties.

    An image without a caption is a query that fails; there it is none.

    Args:
        image: unit-norm image embeddings, float32.
        text: unit-norm caption embeddings.
        image_of_text: row of each caption's image.
        ks: list lengths.

    Raises:
        ClipkitError: where there is no pair, or a list is longer than a side, on which CLIP_benchmark fails, too.
    """
    if not len(text) or max(ks) > min(len(image), len(text)):
        raise ClipkitError(
            f"CLIP_benchmark has no recall at {max(ks)} for {len(image)} images and {len(text)} captions; ask for less"
        )
    own = np.arange(len(image))
    return {
        f"{side}_retrieval_recall@{k}": float((places < k).mean())
        for side, places in (
            ("image", _first_places(text, image, image_of_text, own)),
            ("text", _first_places(image, text, own, image_of_text)),
        )
        for k in ks
    }


def _first_places(queries: Array, items: Array, of_query: Array, of_item: Array) -> Array:
    """Where, from 0, each query's first relevant item stands; as many as there are items where it has none."""
    found = []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK].astype(np.float32) @ items.astype(np.float32).T
        order = np.argsort(-scores, axis=1, kind="stable")
        relevant = of_item[order] == of_query[start : start + CHUNK, None]
        found.append(np.where(relevant.any(axis=1), relevant.argmax(axis=1), len(items)))
    return np.concatenate(found)


def clip_benchmark_classification(
    image: Float[Array, "n dim"], classes: Float[Array, "classes dim"], labels: Int[Array, " n"]
) -> dict[str, float]:
    """Accuracy as ``zeroshot_classification.py`` has it: `clipkit.metrics.accuracy.zeroshot_accuracy` but for the order
    of ties.

    Args:
        image: unit-norm image embeddings, float32.
        classes: a unit-norm vector per class.
        labels: the row in `classes` of each image's class.

    Returns:
        ``acc1``; ``acc5``, which is NaN where there are fewer than five classes; ``mean_per_class_recall``, over the
        classes that have images.

    Raises:
        ClipkitError: where there are no images, on which CLIP_benchmark fails, too.
    """
    if not len(image):
        raise ClipkitError("CLIP_benchmark has no accuracy of no images; give some")
    places = _first_places(image, classes, labels, np.arange(len(classes)))
    right = [(places[labels == label] == 0).mean() for label in np.unique(labels)]
    return {
        "acc1": float((places < 1).mean()),
        "acc5": float((places < 5).mean()) if len(classes) >= 5 else float("nan"),
        "mean_per_class_recall": float(np.mean(right)),
    }


def clip_benchmark_mean_average_precision(scores: Float[Array, "n classes"], labels: Bool[Array, "n classes"]) -> float:
    """mAP as ``average_precision_per_class`` of ``zeroshot_classification.py`` has it, with its mean over the classes.

    `clipkit.metrics.mean_average_precision` but for the order of ties; and a class without a positive counts
    as 0, where there it is left out.

    Returns:
        A fraction; NaN where there are no classes.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    positive = np.take_along_axis(labels, order, axis=0)
    precision = positive.cumsum(axis=0) / np.arange(1, len(scores) + 1)[:, None]
    found = (precision * positive).sum(axis=0) / np.maximum(positive.sum(axis=0), 1)
    return float(found.mean()) if len(found) else float("nan")


def clip_benchmark_choice(image: Float[Array, "n images dim"], text: Float[Array, "n texts dim"]) -> dict[str, float]:
    """Choices as ``image_caption_selection.py`` has them, of Winoground (2 images, 2 captions) and SugarCrepe (1, 2).

    The i-th image and caption of an instance belong together. A tie is won by the first, so that a model that tells
    nothing apart scores 0 in Winoground, and in SugarCrepe, where the first is the right one, all of ``text_acc``.
    Of a single image ``image_acc`` is always 1.

    Args:
        image: unit-norm embeddings of each instance's images.
        text: unit-norm embeddings of its captions.

    Returns:
        ``text_acc`` and ``image_acc``, Winoground's text and image score; ``acc``, both at once. NaN for no instances.
    """
    scores = choice_scores(image, text)
    own = np.arange(min(scores.shape[1:]))
    by_image = (scores.argmax(axis=2)[:, : len(own)] == own).all(axis=1)
    by_text = (scores.argmax(axis=1)[:, : len(own)] == own).all(axis=1)
    both = {"image_acc": by_text, "text_acc": by_image, "acc": by_text & by_image}
    return {name: float(values.mean()) if len(values) else float("nan") for name, values in both.items()}
