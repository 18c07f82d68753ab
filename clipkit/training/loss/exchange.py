"""How ranks get to see each other's rows: all at once, or one rank's at a time round a ring."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["Visit", "all_rows", "gather_rows", "gather_sweep", "rank_and_size", "ring_sweep"]

Visit = Callable[..., Tensor | None]
"""``visit(offset, *chunk)``: what this rank has to say about each row of a chunk of the joint batch whose first row is
row `offset`, a tensor of as many rows; or None where there is nothing to hand back."""
Merge = Callable[[Tensor, Tensor], Tensor]


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where no process group is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_rows(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "world_n ..."]:
    """All ranks' rows in rank order, without gradients. Every rank has as many rows."""
    world = rank_and_size()[1]
    if world == 1:
        return rows
    rows = rows.detach().contiguous()
    joint = rows.new_empty(world * len(rows), *rows.shape[1:])
    # As bytes: gloo does not know every type of number, bfloat16 among them.
    dist.all_gather_into_tensor(joint.view(-1).view(torch.uint8), rows.view(-1).view(torch.uint8))
    return joint


def _summed_to_owners(joint: Tensor) -> Tensor:
    """The sum over ranks of one's own rows' part of `joint`, which is used up."""
    rank, world = rank_and_size()
    joint = joint.contiguous()
    if joint.is_cuda and dist.get_backend() != "gloo":
        mine = joint.new_empty(len(joint) // world, *joint.shape[1:])
        dist.reduce_scatter_tensor(mine, joint)
        return mine
    dist.all_reduce(joint)  # moves twice as much, but every backend has it
    return joint.chunk(world)[rank]


class _AllGather(torch.autograd.Function):
    """Concatenate every rank's rows; the backward pass sums every rank's gradient for one's own rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        return all_rows(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _summed_to_owners(grad.clone(memory_format=torch.contiguous_format))


def gather_rows(rows: Shaped[Tensor, "n ..."]) -> tuple[Shaped[Tensor, "world_n ..."], int]:
    """All ranks' rows in rank order, with gradients, and where one's own begin. Every rank has as many rows."""
    rank, world = rank_and_size()
    if world == 1:
        return rows, 0
    return _AllGather.apply(rows), rank * len(rows)  # type: ignore[return-value]


def gather_sweep(parts: Sequence[Tensor], visit: Visit, merge: Merge) -> Tensor | None:
    """Visit all ranks' `parts` as one chunk.

    Args:
        parts: tensors of as many rows, this rank's; every rank's row 0 and so on belong together.
        visit: called once, with the joint parts.
        merge: of two ranks' findings about the same rows; `torch.add` is done by the backend.

    Returns:
        What all ranks together have to say about this rank's rows.
    """
    world = rank_and_size()[1]
    found = visit(0, *map(all_rows, parts))
    if found is None or world == 1:
        return found
    if merge is torch.add:
        return _summed_to_owners(found)
    received = torch.empty_like(found, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, found.contiguous())
    return reduce(merge, received.chunk(world))


class _Transfer(NamedTuple):
    """Tensors on their way; what is sent is kept alive and must not be changed until they have arrived."""

    sent: list[Tensor]
    received: list[Tensor]
    requests: list[dist.Work]

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.received


def _pass_on(tensors: Sequence[Tensor]) -> _Transfer:
    """Start to send to the rank before this one what the rank after this one sends here too."""
    rank, world = rank_and_size()
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    before, after = (rank - 1) % world, (rank + 1) % world
    operations = [dist.P2POp(dist.isend, tensor, before) for tensor in sent]
    operations += [dist.P2POp(dist.irecv, tensor, after) for tensor in received]
    return _Transfer(sent, received, dist.batch_isend_irecv(operations))


def ring_sweep(parts: Sequence[Tensor], visit: Visit, merge: Merge) -> Tensor | None:
    """As `gather_sweep`, one rank's chunk after another: memory does not grow with the number of ranks.

    The next chunk, and what is known so far about it, travel while the present one is visited.
    """
    rank, world = rank_and_size()
    if world == 1:
        return visit(0, *parts)
    chunk, findings = list(parts), None
    for step in range(world):
        coming = _pass_on(chunk) if step < world - 1 else None
        found = visit((rank + step) % world * len(chunk[0]), *chunk)
        if found is not None:
            findings = _pass_on([found if findings is None else merge(findings.wait()[0], found)])
        if coming is not None:
            chunk = coming.wait()
    return None if findings is None else findings.wait()[0]
