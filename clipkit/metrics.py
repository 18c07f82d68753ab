"""Retrieval and classification metrics as pure functions over arrays.

Scores are float32, compared in chunks; such that differ by no more than 1e-6 are ties, as the same product comes out a
few units of the last place apart in different rows of a matrix. Ties are resolved as if in random order, and the
expected value is reported: a model whose embeddings all coincide scores exactly what guessing would.
"""

from collections.abc import Sequence
from math import comb

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "confusion_matrix",
    "recall_at_k",
    "retrieval_chance",
    "retrieval_recall",
    "zeroshot_accuracy",
    "zeroshot_chance",
]

Array = np.ndarray
CHUNK = 1024
TIE = np.float32(1e-6)


def recall_at_k(
    better: Int[Array, " n"], tied: Int[Array, " n"], relevant_tied: Int[Array, " n"], k: int
) -> Float[Array, " n"]:
    """The chance that a relevant item is among the first k, when equal scores come in random order.

    Args:
        better: per query, how many irrelevant items score above the best relevant one.
        tied: how many items have the best relevant score, itself included.
        relevant_tied: how many of the tied are relevant; at least one.
        k: length of the list.

    Returns:
        1 - C(tied - relevant_tied, s) / C(tied, s), where s = k - better places are left for the tied.
    """
    places = np.clip(k - better, 0, tied)
    result = np.where(places > 0, 1.0, 0.0)
    for row in np.flatnonzero((tied > relevant_tied) & (places > 0)):
        t, r, s = int(tied[row]), int(relevant_tied[row]), int(places[row])
        result[row] = 1.0 - comb(t - r, s) / comb(t, s)
    return result


def _ranks(
    queries: Float[Array, "q dim"],
    items: Float[Array, "i dim"],
    query_group: Int[Array, " q"],
    item_group: Int[Array, " i"],
) -> tuple[Array, Array, Array]:
    """For each query the counts that `recall_at_k` needs; items of the query's own group are relevant."""
    counts = np.zeros((3, len(queries)), np.int64)
    items = items.astype(np.float32)
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        scores = queries[rows].astype(np.float32) @ items.T
        relevant = query_group[rows, None] == item_group[None, :]
        best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
        tied = np.abs(scores - best) <= TIE
        counts[0, rows] = ((scores > best + TIE) & ~relevant).sum(axis=1)
        counts[1, rows] = tied.sum(axis=1)
        counts[2, rows] = (tied & relevant).sum(axis=1)
    return counts[0], counts[1], counts[2]


def retrieval_recall(
    image: Float[Array, "images dim"],
    text: Float[Array, "texts dim"],
    image_of_text: Int[Array, " texts"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k in both directions, as CLIP_benchmark defines it.

    ``image_retrieval_recall@k``: share of captions whose image is among the k images nearest to the caption.
    ``text_retrieval_recall@k``: share of images with any of their captions among the k captions nearest to it.

    Args:
        image: unit-norm image embeddings.
        text: unit-norm caption embeddings.
        image_of_text: row of each caption's image. Images without a caption are items, not queries.
        ks: list lengths; one larger than the set counts the whole set.

    Returns:
        Fractions by name; empty where there are no pairs.
    """
    if not len(text):
        return {}
    own = np.arange(len(image))
    by_text = _ranks(text, image, image_of_text, own)
    asked = np.unique(image_of_text)
    by_image = _ranks(image[asked], text, asked, image_of_text)
    figures = {f"image_retrieval_recall@{k}": float(recall_at_k(*by_text, k).mean()) for k in ks}
    return figures | {f"text_retrieval_recall@{k}": float(recall_at_k(*by_image, k).mean()) for k in ks}


def retrieval_chance(
    images: int, image_of_text: Int[Array, " texts"], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """What guessing scores under the names of `retrieval_recall`."""
    texts = len(image_of_text)
    if not texts:
        return {}
    captions = np.bincount(image_of_text, minlength=images)
    captions = captions[captions > 0]
    zero = np.zeros_like(captions)
    figures = {f"image_retrieval_recall@{k}": min(k, images) / images for k in ks}
    return figures | {
        f"text_retrieval_recall@{k}": float(recall_at_k(zero, zero + texts, captions, k).mean()) for k in ks
    }


def zeroshot_accuracy(
    image: Float[Array, "n dim"],
    classes: Float[Array, "classes dim"],
    labels: Int[Array, " n"],
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Zero-shot accuracy as CLIP_benchmark defines it, beside which ties are resolved as told above.

    ``zeroshot_acc@k``: share of images with their own class among the k nearest.
    ``zeroshot_mean_per_class_recall``: the share with their own class nearest, in each class, averaged over the classes
    that have images (scikit-learn's ``balanced_accuracy_score``).

    Args:
        image: unit-norm image embeddings.
        classes: a unit-norm vector per class.
        labels: the row in `classes` of each image's class.
        ks: list lengths; one larger than the number of classes counts all of them. CLIP_benchmark gives none there.

    Returns:
        Fractions by name; empty where there are no images.
    """
    if not len(image):
        return {}
    ranks = _ranks(image, classes, labels, np.arange(len(classes)))
    figures = {f"zeroshot_acc@{k}": float(recall_at_k(*ranks, k).mean()) for k in ks}
    sizes = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels, weights=recall_at_k(*ranks, 1), minlength=len(classes))
    figures["zeroshot_mean_per_class_recall"] = float((right[sizes > 0] / sizes[sizes > 0]).mean())
    return figures


def zeroshot_chance(classes: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """What guessing among so many classes scores under the names of `zeroshot_accuracy`."""
    figures = {f"zeroshot_acc@{k}": min(k, classes) / classes for k in ks}
    return figures | {"zeroshot_mean_per_class_recall": 1 / classes}


def confusion_matrix(
    true: Int[Array, " n"], predicted: Int[Array, " n"], classes: int
) -> Int[Array, "classes classes"]:
    """Counts; rows are the true classes, columns the predicted ones."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)
