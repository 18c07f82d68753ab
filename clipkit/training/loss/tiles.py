"""Tiles of a matrix of similarities, and buffers for them that are used again.

A tile's side is a compromise. On CPUs two buffers should stay in the cache, yet be large enough for the matrix product;
1,024 was as fast as 512 and 2,048. On GPUs, with fewer than 4,096 rows, the product that gives the gradient (rows x D)
does not fill the chip and the launches of small kernels begin to show; a buffer is 64 MiB then.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

__all__ = ["Tile", "tiles"]

_CPU_SIDE = 1024
_GPU_SIDE = 4096


class Tile(NamedTuple):
    """A place in the matrix."""

    rows: slice
    columns: slice
    own: int
    """The tile's column that is its first row's own pair; the second row's is the next. May lie outside."""
    buffers: list[Tensor]
    """Of the tile's shape, with anything in them."""

    def diagonal(self, matrix: Tensor) -> Tensor:
        """The own pairs' entries of a matrix of the tile's shape, a view; empty where none lies in the tile."""
        height, width = matrix.shape
        return matrix.diagonal(min(max(self.own, -height), width))


def tiles(rows: int, columns: int, own: int, *, like: Tensor, side: int | None, buffers: int) -> Iterator[Tile]:
    """All tiles of a matrix, row by row.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        own: the column that is row 0's own pair; may lie outside.
        like: gives the buffers' device and dtype.
        side: of a tile, in rows; where not set, by the device.
        buffers: how many each tile has. All tiles have the same ones.
    """
    side = side or (_CPU_SIDE if like.device.type == "cpu" else _GPU_SIDE)
    height = min(rows, side)
    # Few rows on each of many ranks: the tiles get wider instead.
    width = min(columns, side * side // height)
    whole = [like.new_empty(height * width) for _ in range(buffers)]
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            bottom, right = min(top + height, rows), min(left + width, columns)
            shape = (bottom - top, right - left)
            views = [buffer[: shape[0] * shape[1]].view(shape) for buffer in whole]
            yield Tile(slice(top, bottom), slice(left, right), own + top - left, views)
