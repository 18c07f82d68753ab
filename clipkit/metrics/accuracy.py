"""Zero-shot accuracy and confusions as pure functions over arrays, with ties as in `clipkit.metrics.ranking`.

A figure that is a mean has a form of its own per sample, for intervals and comparisons (`clipkit.metrics.intervals`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from clipkit.metrics.ranking import RankCounts, VectorBlocks, mean, rank_pairs, recall_at_k
from clipkit.metrics.retrieval import Array

__all__ = ["confusion_matrix", "zeroshot_accuracy", "zeroshot_chance", "zeroshot_figures", "zeroshot_per_sample"]


def zeroshot_per_sample(
    image: VectorBlocks, classes: VectorBlocks, labels: Int[Array, " n"], ks: Sequence[int] = (1, 5)
) -> dict[str, Float[Array, " n"]]:
    """``zeroshot_acc@k`` of each image, whose mean is the figure; arguments as in `zeroshot_accuracy`.

    The mean per-class recall is no mean over images; of these it is
    ``class_mean_of(values["zeroshot_acc@1"], labels)`` (`clipkit.metrics.intervals`).
    """
    ranks, _ = rank_pairs(image, classes, labels, names=("image", "class"))
    return {f"zeroshot_acc@{k}": recall_at_k(*ranks, k) for k in ks}


def zeroshot_accuracy(
    image: VectorBlocks,
    classes: VectorBlocks,
    labels: Int[Array, " n"],
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Zero-shot accuracy as CLIP_benchmark defines it, beside which ties are resolved as told above.

    ``zeroshot_acc@k``: share of images with their own class among the k nearest.
    ``zeroshot_mean_per_class_recall``: the share with their own class nearest, in each class, averaged over the classes
    that have images (scikit-learn's ``balanced_accuracy_score``).

    Args:
        image: unit-norm image embeddings ``[n, dim]``, see `retrieval_ranks`.
        classes: a unit-norm vector per class.
        labels: the row in `classes` of each image's class.
        ks: list lengths; one larger than the number of classes counts all of them. CLIP_benchmark gives none there.

    Returns:
        Fractions by name; empty where there are no images.

    Raises:
        ClipkitError: see `retrieval_ranks`.
    """
    ranks, _ = rank_pairs(image, classes, labels, names=("image", "class"))
    return zeroshot_figures(ranks, labels, ks)


def zeroshot_figures(ranks: RankCounts, labels: Int[Array, " n"], ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The figures of `zeroshot_accuracy` from how each image's class ranks among all; empty where there are none."""
    if not len(labels):
        return {}
    figures = {f"zeroshot_acc@{k}": mean(recall_at_k(*ranks, k)) for k in ks}
    sizes, first = np.bincount(labels), recall_at_k(*ranks, 1)
    right = np.bincount(labels, weights=first - first[0])  # as in `mean`
    figures["zeroshot_mean_per_class_recall"] = mean(first[0] + right[sizes > 0] / sizes[sizes > 0])
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
