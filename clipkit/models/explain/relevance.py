"""Which patches of an image speak for a text: the mathematics, on attention maps, gradients and scores.

Two ways, which share nothing: gradient-weighted attention relevance (Chefer, Gur, Wolf 2021, "Generic Attention-model
Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers"), and occlusion (Zeiler, Fergus 2014,
"Visualizing and Understanding Convolutional Networks", section 4.2).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

__all__ = ["cell_means", "patch_readout", "relevance", "spread", "weighted_attention", "windows"]

Box = tuple[int, int, int, int]  # top, bottom, left, right; the ends are not inside


def weighted_attention(
    attention: Float[Tensor, "heads queries tokens"], gradient: Float[Tensor, "heads queries tokens"]
) -> Float[Tensor, "queries tokens"]:
    """``E_h[(∇A ⊙ A)⁺]``, the mean over heads of what raises the score (Chefer et al. 2021, equation 5).

    Args:
        attention: after the softmax.
        gradient: of the score by `attention`.
    """
    return (attention * gradient).clamp(min=0).mean(0)


def relevance(
    layers: Sequence[Float[Tensor, "tokens tokens"]], readout: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """How much each input token matters to what is read out after the last layer.

    The rule is ``R ← R + Ā·R`` from the first layer to the last, beginning with the identity (Chefer et al. 2021,
    equation 6), and the answer is the readout's row, ``readout·R``. Multiplied from the left it is a vector all the
    way, so that a layer costs T² and not T³.

    Args:
        layers: of each layer `weighted_attention`, the first layer first.
        readout: how much each token of the last layer matters to the score; a class token alone is 1 there.
    """
    relevances = readout
    for layer in reversed(layers):
        relevances = relevances + relevances @ layer
    return relevances


def patch_readout(
    tokens: Float[Tensor, "tokens width"], gradient: Float[Tensor, "tokens width"], prefix: int
) -> Float[Tensor, " tokens"]:
    """The readout of towers that average their patches: each one's share of what they do for the score together.

    Gradient times activation, its positive part (as Selvaraju et al. 2017, "Grad-CAM", for the places of a feature
    map), over its sum; equal shares where no patch does anything. The paper has no rule for an average.

    Args:
        tokens: after the last layer.
        gradient: of the score by `tokens`.
        prefix: how many tokens before those of the patches; they are not averaged.
    """
    shares = (tokens * gradient).sum(1).clamp(min=0)
    shares[:prefix] = 0
    if not shares.sum() > 0:
        shares[prefix:] = 1
    return shares / shares.sum()


def windows(rows: int, columns: int, side: int) -> list[Box]:
    """Windows of ``side x side`` cells on a grid, by a cell apart; those that overhang its border are cut.

    Each cell is in ``side²`` of them.
    """

    def spans(count: int) -> list[tuple[int, int]]:
        return [(max(0, at), min(count, at + side)) for at in range(1 - side, count)]

    return [(*vertical, *horizontal) for vertical in spans(rows) for horizontal in spans(columns)]


def cell_means(
    values: Float[np.ndarray, "n windows"], boxes: Sequence[Box], rows: int, columns: int
) -> Float[np.ndarray, "n {rows} {columns}"]:
    """For each cell the mean of the values of the windows that cover it."""
    total = np.zeros((len(values), rows, columns))
    count = np.zeros((rows, columns))
    for value, (top, bottom, left, right) in zip(values.T, boxes, strict=True):
        total[:, top:bottom, left:right] += value[:, None, None]
        count[top:bottom, left:right] += 1
    return total / count


def spread(
    values: Float[np.ndarray, "rows columns"],
    x: Float[np.ndarray, " columns"],
    y: Float[np.ndarray, " rows"],
    size: tuple[int, int],
) -> Float[np.ndarray, "height width"]:
    """Values at the centres of cells, spread over the pixels of a picture by bilinear interpolation.

    Beyond the outermost centres they stay as they are there.

    Args:
        values: of the cells.
        x, y: where the centres of columns and rows lie, in the picture's pixels, ascending.
        size: width and height of the picture.
    """

    def weights(places: np.ndarray, length: int) -> np.ndarray:
        pixels = np.arange(length) + 0.5
        return np.stack([np.interp(pixels, places, one) for one in np.eye(len(places))], axis=1)

    return weights(y, size[1]) @ values @ weights(x, size[0]).T
