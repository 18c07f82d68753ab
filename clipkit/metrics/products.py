"""Inner products of rows that come out the same to the last digit, whatever else is multiplied in the same call.

A matrix product rounds by how it is cut into blocks: by its height, the number of threads, the processor and its
library. An image would then have one score among ten others and another one among a thousand, and orders, ties and
thresholds would turn on it. Here nothing is left to round. Every number is brought onto a grid of 2⁻²⁶ of its row's
length, so that each product is a whole number of units of 2⁻⁵², and by Cauchy and Schwarz no sum of them, in whatever
order, exceeds 2⁵³ units: float64 holds all of them exactly (the splitting of Ozaki et al. 2012, with one slice).

The grid moves an inner product of unit vectors by about 1e-8, less than float32 products err. It costs a product in
float64, twice the time of float32 on a CPU.
"""

import numpy as np
from jaxtyping import Float

__all__ = ["inner_products", "on_grid", "paired_products"]

Array = np.ndarray
BITS = 26  # of a number, beyond which it is rounded: two of them fill the 53 of a float64
SAFE = 2**0.5  # rows are scaled to lengths of 0.71 to 1.41; unit vectors lie in the middle, so none falls on the edge


def on_grid(vectors: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """The rows, each number rounded to a multiple of 2⁻²⁶ times the power of two that is next to its row's length.

    Args:
        vectors: of any float precision and length, finite.

    Returns:
        float64. Inner products of any two such rows are exact in it, in whatever order they are summed up.
    """
    found = vectors.astype(np.float64)
    # Row by row, so that a row's length does not depend on the others either.
    lengths = np.sqrt(np.einsum("nd,nd->n", found, found))
    if vectors.dtype == np.float16 and (abs(lengths - 1) < 0.25).all():
        return found  # float16 numbers below 1 are multiples of 2⁻²⁴
    with np.errstate(divide="ignore"):
        powers = np.floor(np.log2(lengths * SAFE))
    unit = np.exp2(np.where(np.isfinite(powers), powers, 0) - BITS)[:, None]
    return np.rint(found / unit) * unit


def inner_products(
    left: Float[Array, "n dim"], right: Float[Array, "m dim"], *, gridded: bool = False
) -> Float[Array, "n m"]:
    """Of each left row with each right row, float64, exact on the grid: the same whichever rows stand beside them.

    Args:
        left, right: of any float precision, finite.
        gridded: whether the right rows have been brought onto the grid before (`on_grid`), as it pays where they are
            multiplied again and again.
    """
    return np.matmul(on_grid(left), (right if gridded else on_grid(right)).T)


def paired_products(left: Float[Array, "n k dim"], right: Float[Array, "n m dim"]) -> Float[Array, "n k m"]:
    """Of each left row with each right row of the same place, as `inner_products` gives them."""
    left, right = (on_grid(side.reshape(-1, side.shape[-1])).reshape(side.shape) for side in (left, right))
    return np.matmul(left, right.swapaxes(1, 2))
