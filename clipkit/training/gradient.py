"""The gradient of one training step: the whole batch at once, or piece by piece with the same result.

The cached-gradient step (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Peak
Memory Setup") runs the towers over micro-batches without keeping activations, takes the loss over all embeddings, and
runs the micro-batches again, each with the gradient that the loss gave for its embeddings. Memory is that of one
micro-batch plus N·D; the price is a second forward pass. Random generators are put back before the second pass, so
dropout and patch dropout leave out the same things.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

__all__ = ["Gradient", "clip_gradients", "compute_gradient"]

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]
"""Pixels and tokens to both embeddings, the factor on similarities, and the bias or None."""
Objective = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Embeddings, factor and bias to the loss."""


@dataclass
class Gradient:
    """What a step's forward and backward pass gave beside the gradients, which stand in the parameters."""

    loss: Tensor
    """Of this rank, a detached scalar on the device."""
    image: Tensor
    text: Tensor
    """The embeddings, detached ``[n, dim]``."""

    def bad_rows(self) -> list[int]:
        """Rows whose embeddings are not finite. The loss spreads them to every other row, on other ranks too."""
        bad = ~(self.image.isfinite().all(1) & self.text.isfinite().all(1))
        return bad.nonzero().flatten().tolist()


def compute_gradient(
    forward: Forward,
    pixels: Tensor,
    tokens: Tensor,
    objective: Objective,
    *,
    micro_batch: int | None = None,
    collect: Callable[[], None] = lambda: None,
) -> Gradient:
    """Add the gradient of the batch's loss to every parameter's.

    Args:
        forward: the towers. Under DDP each backward pass averages gradients over the ranks; in the cached-gradient step
            that is once per micro-batch, overlapped with its computing, which lets them add up in fp32 by `collect`.
        pixels: ``[n, 3, height, width]``.
        tokens: ``[n, context]``.
        objective: the loss of this rank's rows; it may compare them with those of other ranks.
        micro_batch: rows at a time; all of them when not given, in one pass.
        collect: called after each backward pass through the towers.
    """
    if micro_batch is None or micro_batch >= len(pixels):
        image, text, scale, bias = forward(pixels, tokens)
        loss = objective(image, text, scale, bias)
        loss.backward()
        collect()
        return Gradient(loss.detach(), image.detach(), text.detach())
    return _cached_gradient(forward, pixels, tokens, objective, micro_batch, collect)


def _cached_gradient(
    forward: Forward,
    pixels: Tensor,
    tokens: Tensor,
    objective: Objective,
    micro_batch: int,
    collect: Callable[[], None],
) -> Gradient:
    pieces = list(zip(pixels.split(micro_batch), tokens.split(micro_batch), strict=True))

    # 1. All embeddings, without activations; what each piece draws is remembered.
    generators: list[dict[str, Tensor]] = []
    images, texts = [], []
    scale = bias = None
    with torch.no_grad(), _buffers_kept(forward):
        for piece in pieces:
            generators.append(_random_states(pixels.device))
            image, text, scale, bias = forward(*piece)
            images.append(image)
            texts.append(text)
    after = _random_states(pixels.device)

    # 2. The loss over all of them, and its gradient for each embedding.
    leaves = [torch.cat(images), torch.cat(texts), scale, bias]
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    loss = objective(*leaves)  # type: ignore[arg-type]
    loss.backward()
    gradients = [None if leaf is None or leaf.grad is None else leaf.grad for leaf in leaves]

    # 3. Each piece once more, with the same draws, and backward from its embeddings' gradients.
    start = 0
    for number, (piece, states) in enumerate(zip(pieces, generators, strict=True)):
        _set_random_states(states)
        outputs = forward(*piece)
        rows = slice(start, start + len(piece[0]))
        start = rows.stop
        wanted: list[tuple[Tensor, Tensor]] = []
        for output, gradient, of_rows in zip(outputs, gradients, (True, True, False, False), strict=True):
            if output is None or gradient is None or not output.requires_grad:
                continue
            # The factor and the bias take theirs once; the zeros let DDP see every parameter in every pass.
            share = gradient[rows] if of_rows else gradient if number == 0 else torch.zeros_like(gradient)
            wanted.append((output, share.to(output.dtype)))
        torch.autograd.backward([output for output, _ in wanted], [share for _, share in wanted])
        collect()
    _set_random_states(after)
    return Gradient(loss.detach(), leaves[0].detach(), leaves[1].detach())  # type: ignore[union-attr]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def _buffers_kept(forward: Any) -> Iterator[None]:
    # BatchNorm's running statistics must see each sample once, so what the first pass does to them is undone.
    buffers = list(forward.buffers()) if isinstance(forward, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `limit` (Pascanu et al. 2013).

    Args:
        parameters: some may be divided among the ranks; every rank must ask.
        limit: None for no limit.

    Returns:
        The norm before, a scalar on the device, the same on all ranks.
    """
    divided: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (divided if isinstance(parameter.grad, DTensor) else plain).append(parameter)
    groups = [group for group in (divided, plain) if group]
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if limit is not None:
        for group in groups:
            clip_grads_with_norm_(group, limit, total)
    return total
