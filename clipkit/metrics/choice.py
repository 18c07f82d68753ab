"""Choices among a few captions or images, as benchmarks of composition pose them: Winoground, SugarCrepe and such.

A tie counts as often as a random order of the tied would be right, so that a model that tells nothing apart scores
exactly chance. The papers count it as wrong, CLIP_benchmark as a win of the first (`clipkit.metrics.clip_benchmark`).
"""

import numpy as np
from jaxtyping import Float, Int

from clipkit.core import ClipkitError
from clipkit.metrics.products import paired_products
from clipkit.metrics.ranking import TIE_WIDTH, refuse_bad_scores

__all__ = ["WINOGROUND_CHANCE", "choice_per_sample", "choice_scores", "winoground_per_sample"]

Array = np.ndarray
CHUNK = 1024  # instances at a time
WINOGROUND_CHANCE = {"winoground_text": 1 / 4, "winoground_image": 1 / 4, "winoground_group": 1 / 6}
"""What guessing scores: in a sixth of the orders of four scores both right pairs come before both wrong ones."""


def choice_scores(
    image: Float[Array, "n images dim"], text: Float[Array, "n texts dim"]
) -> Float[Array, "n images texts"]:
    """The inner products of each instance's images with its captions, as float32.

    Args:
        image: unit-norm embeddings of each instance's images, of any float precision, memory-mapped or not.
        text: unit-norm embeddings of its captions, likewise.
    """
    found = np.empty((len(image), image.shape[1], text.shape[1]), np.float32)
    for start in range(0, len(image), CHUNK):
        rows = slice(start, start + CHUNK)
        found[rows] = paired_products(image[rows], text[rows])
    return found


def choice_per_sample(scores: Float[Array, "n choices"], right: Int[Array, " n"] | None = None) -> Float[Array, " n"]:
    """Whether the right one of several choices scores best, whose mean is the accuracy; chance is 1 / choices.

    SugarCrepe (Hsieh et al. 2023) asks of an image its own caption beside a false one, and gives the accuracy of each
    of its subsets: the scores are ``choice_scores(image[:, None], captions)[:, 0]``.

    Args:
        scores: of the choices in each instance.
        right: the column of the right one; the first when not given.

    Returns:
        1, 0, or the share of a tie.

    Raises:
        ClipkitError: where a score is not finite, or `right` names no column.
    """
    refuse_bad_scores(scores)
    if right is None:
        right = np.zeros(len(scores), np.int64)
    if len(right) and not 0 <= right.min() <= right.max() < scores.shape[1]:
        raise ClipkitError(f"there are {scores.shape[1]} choices; the right one is a column from 0, not {right.max()}")
    apart = scores.astype(np.float32) - np.take_along_axis(scores, right[:, None], axis=1).astype(np.float32)
    return np.where((apart > TIE_WIDTH).any(axis=1), 0.0, 1.0 / (np.abs(apart) <= TIE_WIDTH).sum(axis=1))


def winoground_per_sample(scores: Float[Array, "n 2 2"]) -> dict[str, Float[Array, " n"]]:
    """Winoground's three scores (Thrush et al. 2022, section 4), whose means are the figures.

    ``winoground_text``: both images score higher with their own caption than with the other. ``winoground_image``: both
    captions with their own image. ``winoground_group``: all of that.

    Args:
        scores: of each instance's images (rows) with its captions (columns); the i-th of both belong together.

    Returns:
        float64 ``[n]``, 0 to 1, by name.

    Raises:
        ClipkitError: where a score is not finite.
    """
    text = choice_per_sample(scores[:, 0]) * choice_per_sample(scores[:, 1, ::-1])
    image = choice_per_sample(scores[:, :, 0]) * choice_per_sample(scores[:, ::-1, 1])
    own, others = (scores[:, [0, 1], columns].astype(np.float32) for columns in ([0, 1], [1, 0]))
    least, most = own.min(axis=1), others.max(axis=1)
    # Where the worst of its own ties with the best of the others, all of its own that are tied have to come first.
    tied = (own <= most[:, None] + TIE_WIDTH).sum(axis=1) + (others >= least[:, None] - TIE_WIDTH).sum(axis=1)
    in_order = np.select([tied <= 2, tied == 3], [1 / 2, 1 / 3], 1 / 6)
    group = np.select([least > most + TIE_WIDTH, least < most - TIE_WIDTH], [1.0, 0.0], in_order)
    return {"winoground_text": text, "winoground_image": image, "winoground_group": group}
