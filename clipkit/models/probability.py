"""From cosines to probabilities: by one model, beside a background, and of several models together."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

__all__ = ["beside_background", "fused", "probabilities"]


def probabilities(
    cosines: Float[np.ndarray, "n classes"], scale: float, bias: float | None = None
) -> Float[np.ndarray, "n classes"]:
    """Softmax of the scaled cosines; with a bias the sigmoid of each alone (Zhai et al. 2023, "SigLIP"). Float64."""
    logits = cosines.astype(np.float64) * scale
    if bias is not None:
        return 1 / (1 + np.exp(-(logits + bias)))
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def beside_background(
    cosines: Float[np.ndarray, "n classes"], scale: float, background: Sequence[int]
) -> Float[np.ndarray, "n classes"]:
    """For each class alone, the softmax between it and the background that is nearest to the image. Float64.

    Models that were trained with a softmax say nothing of a class by itself, only of one against another.

    Args:
        cosines: of all classes, those of the background among them.
        scale: the factor on them.
        background: places of the classes that stand for "none of these"; one at least.
    """
    nearest = cosines[:, list(background)].max(axis=1, keepdims=True).astype(np.float64)
    return 1 / (1 + np.exp(-scale * (cosines - nearest)))


def fused(
    each: Sequence[Float[np.ndarray, "n classes"]], weights: Sequence[float] | None = None
) -> Float[np.ndarray, "n classes"]:
    """Late fusion of several models: the weighted mean of their probabilities (the sum rule of Kittler et al. 1998).

    Args:
        each: a model's probabilities.
        weights: of the models; equal where not given.
    """
    return np.average(np.stack(each), axis=0, weights=weights)
