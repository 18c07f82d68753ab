"""Retrieval between images and captions, both ways, as pure functions over arrays.

Scores and ties are as in `clipkit.metrics.ranking`: what cannot be told apart counts with the expected value over
random orders, so that a model whose embeddings all coincide scores exactly what guessing would. Where a library or a
paper breaks ties otherwise, `clipkit.metrics.clip_benchmark` has its definition.

A figure that is a mean has a form of its own per sample, for intervals and comparisons (`clipkit.metrics.intervals`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipkit.metrics.ranking import (
    RankCounts,
    VectorBlocks,
    guessed,
    mean,
    median_rank,
    rank_pairs,
    recall_at_k,
    reciprocal_rank,
)

__all__ = [
    "RetrievalRanks",
    "clamped",
    "guessed_retrieval",
    "retrieval_figures",
    "retrieval_per_sample",
    "retrieval_ranks",
    "retrieval_recall",
]

Array = np.ndarray


def clamped(ks: Sequence[int], items: int) -> list[int]:
    """The list lengths that are longer than the whole set, so that recall at them counts all of it and is 1."""
    return [k for k in ks if k > items]


class RetrievalRanks(NamedTuple):
    """How the right items rank in retrieval in both directions."""

    by_text: RankCounts
    """Of each caption's image among all images."""
    by_image: RankCounts
    """Of the best caption of each image that has one, in the order of the images, among all captions."""
    image_of_text: Int[Array, " texts"]
    """The row of each caption's image: captions of one image stand and fall together (``groups`` of an interval)."""


def retrieval_ranks(
    image: VectorBlocks,
    text: VectorBlocks,
    image_of_text: Int[Array, " texts"],
    *,
    advance: Callable[[int], object] | None = None,
) -> RetrievalRanks:
    """Compare every caption with every image, once for both directions and within bounded memory, see `rank_pairs`.

    A million captions against as many images of 512 dimensions are 10^15 operations of float32.

    Args:
        image: unit-norm image embeddings ``[images, dim]``, of any float precision; an array, memory-mapped or not, or
            the parts of one, as `clipkit.Embeddings.blocks` gives them.
        text: unit-norm caption embeddings ``[texts, dim]``, likewise.
        image_of_text: row of each caption's image. Images without a caption are items, not queries.
        advance: told how many more captions have been compared with all images.

    Raises:
        ClipkitError: where embeddings are not finite or do not fit each other, or `image_of_text` names no image.
    """
    ranks = rank_pairs(text, image, image_of_text, names=("caption", "image"), advance=advance)
    return RetrievalRanks(*ranks, image_of_text)


def guessed_retrieval(images: int, image_of_text: Int[Array, " texts"]) -> RetrievalRanks:
    """The ranks of a model whose embeddings all coincide; their figures are chance.

    With one caption for each of n images: recall at k is k / n, the mean reciprocal rank H / n, where H is the n-th
    harmonic number, and the median rank (n + 1) / 2.
    """
    captions = np.bincount(image_of_text, minlength=images)
    captions = captions[captions > 0]
    one = np.ones(len(image_of_text), np.int64)
    return RetrievalRanks(
        guessed(one * images, one), guessed(np.full(len(captions), len(image_of_text)), captions), image_of_text
    )


def retrieval_per_sample(ranks: RetrievalRanks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Float[Array, " queries"]]:
    """Recall and reciprocal rank of each query, whose means are the figures of these names.

    Returns:
        ``image_retrieval_recall@k`` and ``image_retrieval_mrr``, float64 of each caption, 0 to 1;
        ``text_retrieval_recall@k`` and ``text_retrieval_mrr``, of each image that has a caption.
    """
    found = {}
    for side, of_side in (("image", ranks.by_text), ("text", ranks.by_image)):
        found |= {f"{side}_retrieval_recall@{k}": recall_at_k(*of_side, k) for k in ks}
        found[f"{side}_retrieval_mrr"] = reciprocal_rank(*of_side)
    return found


def retrieval_figures(ranks: RetrievalRanks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k as `retrieval_recall` has it, and where the first relevant item ranks.

    ``…_mrr``: the mean of 1 over the rank of the first relevant item (Voorhees 1999). ``…_median_rank``: the median of
    that rank, from 1 (no fraction), see `clipkit.metrics.ranking.median_rank_of`.

    Args:
        ranks: of a model; or of one who guesses (`guessed_retrieval`), for chance.
        ks: list lengths; one larger than the set counts the whole set (`clamped`).

    Returns:
        Figures by name; empty where there are no pairs.
    """
    if not len(ranks.image_of_text):
        return {}
    figures = {name: mean(values) for name, values in retrieval_per_sample(ranks, ks).items()}
    return figures | {
        "image_retrieval_median_rank": median_rank(ranks.by_text),
        "text_retrieval_median_rank": median_rank(ranks.by_image),
    }


def retrieval_recall(
    image: VectorBlocks,
    text: VectorBlocks,
    image_of_text: Int[Array, " texts"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k in both directions, as CLIP_benchmark defines it.

    ``image_retrieval_recall@k``: share of captions whose image is among the k images nearest to the caption.
    ``text_retrieval_recall@k``: share of images with any of their captions among the k captions nearest to it.

    Args:
        image: unit-norm image embeddings, see `retrieval_ranks`.
        text: unit-norm caption embeddings.
        image_of_text: row of each caption's image. Images without a caption are items, not queries.
        ks: list lengths; one larger than the set counts the whole set.

    Returns:
        Fractions by name; empty where there are no pairs.

    Raises:
        ClipkitError: see `retrieval_ranks`.
    """
    return _recalls(retrieval_ranks(image, text, image_of_text), ks)


def _recalls(ranks: RetrievalRanks, ks: Sequence[int]) -> dict[str, float]:
    if not len(ranks.image_of_text):
        return {}
    return {
        f"{side}_retrieval_recall@{k}": mean(recall_at_k(*of_side, k))
        for side, of_side in (("image", ranks.by_text), ("text", ranks.by_image))
        for k in ks
    }
