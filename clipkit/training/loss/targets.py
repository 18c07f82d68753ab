"""What the softmax over a row or column of similarities is compared with, a tile at a time.

A target knows its part of this rank's rows. What it keeps of rows or columns while tiles go by is a state, a tensor
``[figure, row or column]``. Its methods:

- ``start``: the state of rows or columns of which nothing is known yet;
- ``measure``: take a tile into the states of its rows and columns; the logits stand in the tile's first buffer, and all
  buffers are used up;
- ``merge``: one state of two of the same columns;
- ``finish``: each row's or column's loss, and the figures that ``gradient`` needs to know of them;
- ``gradient``: of the sum of all losses by the tile's logits, which stand in the first buffer, in place of them.

A sum of exponentials is kept relative to the largest logit so far (Milakov & Gimelshein 2018, "Online normalizer
calculation for softmax").
"""

import torch
from torch import Tensor

from clipkit.training.loss.plain import same_pairs
from clipkit.training.loss.tiles import Tile

__all__ = ["OwnPair", "Teacher"]


class OwnPair:
    """All on the own pair, but for a share `spread` over it and all that are not left out.

    Figures of a state: largest logit, sum of exponentials, the own pair's logit; where a share is spread, also the sum
    and the number of the logits that are not left out.
    """

    buffers = 2

    def __init__(self, image_ids: Tensor | None, text_ids: Tensor | None, spread: float) -> None:
        self.visitors = [ids for ids in (image_ids, text_ids) if ids is not None]
        self.spread = spread

    def start(self, count: int, like: Tensor) -> Tensor:
        return _start(5 if self.spread else 3, count, like)

    def measure(self, tile: Tile, visitors: list[Tensor], rows: Tensor, columns: Tensor) -> None:
        logits, powers = tile.buffers
        own = tile.diagonal(logits)
        rows[2, max(0, -tile.own) :][: len(own)] = own
        columns[2, max(0, tile.own) :][: len(own)] = own
        same = self._same(tile, visitors)
        for state, dim in ((rows, 1), (columns, 0)) if self.spread else ():
            state[3] += (logits if same is None else logits.masked_fill(same, 0)).sum(dim)
            state[4] += logits.shape[dim] if same is None else (~same).sum(dim)
        if same is not None:
            logits.masked_fill_(same, -torch.inf)
        _absorb(rows[:2], logits, 1, powers)
        _absorb(columns[:2], logits, 0, powers)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([_merge(one[:2], other[:2]), one[2:] + other[2:]])

    def finish(self, state: Tensor) -> tuple[Tensor, Tensor]:
        normaliser = _log_sum(state)
        if not self.spread:
            return normaliser - state[2], normaliser[None]
        loss = normaliser - (1 - self.spread) * state[2] - self.spread * state[3] / state[4]
        return loss, torch.stack([normaliser, self.spread / state[4]])

    def gradient(self, tile: Tile, visitors: list[Tensor], rows: Tensor, columns: Tensor) -> None:
        logits, scratch = tile.buffers
        same = self._same(tile, visitors)
        if same is not None:
            logits.masked_fill_(same, -torch.inf)
        _softmax_both_ways(logits, rows[0], columns[0], scratch)
        if self.spread:
            target = torch.add(rows[1][:, None], columns[1], out=scratch)
            logits.sub_(target if same is None else target.masked_fill_(same, 0))
        tile.diagonal(logits).sub_(2 * (1 - self.spread))

    def _same(self, tile: Tile, visitors: list[Tensor]) -> Tensor | None:
        rows = [ids[tile.rows] for ids in self.visitors]
        return same_pairs(rows, [ids[tile.columns] for ids in visitors], tile.own)


class Teacher:
    """A teacher's softmax over the same row or column, which is a constant.

    Figures of a state: the student's largest logit and sum of exponentials; the teacher's; the sum of the teacher's
    exponentials times the student's logits.
    """

    buffers = 3

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor | float, dtype: torch.dtype) -> None:
        self.scaled = image.detach().to(dtype) * scale
        self.visitors = [text.detach().to(dtype)]

    def start(self, count: int, like: Tensor) -> Tensor:
        return torch.cat([_start(2, count, like), _start(3, count, like)])

    def measure(self, tile: Tile, visitors: list[Tensor], rows: Tensor, columns: Tensor) -> None:
        logits, teacher, powers = tile.buffers
        self._product(tile, visitors)
        for state, dim in ((rows, 1), (columns, 0)):
            _absorb(state[:2], logits, dim, powers)
            _absorb(state[2:], teacher, dim, powers, weighed=logits)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([_merge(one[:2], other[:2]), _merge(one[2:], other[2:])])

    def finish(self, state: Tensor) -> tuple[Tensor, Tensor]:
        normaliser = _log_sum(state[:2])
        return normaliser - state[4] / state[3], torch.stack([normaliser, _log_sum(state[2:])])

    def gradient(self, tile: Tile, visitors: list[Tensor], rows: Tensor, columns: Tensor) -> None:
        logits, teacher, scratch = tile.buffers
        self._product(tile, visitors)
        _softmax_both_ways(logits, rows[0], columns[0], scratch)
        _softmax_both_ways(teacher, rows[1], columns[1], scratch)
        logits.sub_(teacher)

    def _product(self, tile: Tile, visitors: list[Tensor]) -> None:
        torch.mm(self.scaled[tile.rows], visitors[0][tile.columns].T, out=tile.buffers[1])


def _start(figures: int, count: int, like: Tensor) -> Tensor:
    """The least number stands for no logit at all: unlike -inf, its difference to any logit is defined."""
    state = like.new_zeros(figures, count)
    state[0] = torch.finfo(like.dtype).min
    return state


def _absorb(state: Tensor, logits: Tensor, dim: int, powers: Tensor, weighed: Tensor | None = None) -> None:
    """Take logits into maximum, sum of exponentials and, where `weighed` is given, sum of exponentials times that."""
    top = torch.maximum(state[0], logits.amax(dim))
    torch.sub(logits, top.unsqueeze(dim), out=powers).exp_()
    state[1:].mul_((state[0] - top).exp_())
    state[1].add_(powers.sum(dim))
    if weighed is not None:
        state[2].add_(powers.mul_(weighed).sum(dim))
    state[0] = top


def _merge(one: Tensor, other: Tensor) -> Tensor:
    top = torch.maximum(one[0], other[0])
    return torch.cat([top[None], one[1:] * (one[0] - top).exp() + other[1:] * (other[0] - top).exp()])


def _log_sum(state: Tensor) -> Tensor:
    return state[0] + state[1].log()


def _softmax_both_ways(logits: Tensor, rows: Tensor, columns: Tensor, scratch: Tensor) -> None:
    """``exp(logits - rows) + exp(logits - columns)`` in place of `logits`, given both log-sums."""
    torch.sub(logits, rows[:, None], out=scratch).exp_()
    logits.sub_(columns).exp_().add_(scratch)
