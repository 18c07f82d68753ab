"""A probe that learns, sample by sample, how much an image and a text are each to be listened to.

Gated attention pooling (Ilse, Tomczak & Welling 2018, equation 9) over two tokens whose values are the logits of a
linear head each. Training starts at the heads of late fusion and leaves sides out at random (Neverova et al. 2016,
"ModDrop", section 4.2), so that neither value comes to lean on the other. With one token left its share is 1; as there
is nothing to share then, the answer is that of the head as it was fitted, so that a missing side costs nothing more
than what it knew.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipkit.classification import Linear, fit_linear, folds_of
from clipkit.evaluation.probe.fusion import IMAGE, TEXT, FusionHeads, PairedEmbeddings, late_fusion

__all__ = ["Attention", "Fitted", "Training", "attention_fusion", "attention_logits", "begin", "fit_attention"]

Array = np.ndarray
BELOW = 5.0  # logits
EVERY = 10  # steps from one look at the held-out samples to the next
HELD_OUT_FOLDS = 5  # of which one is held out
BLOCK = 8192  # samples at a time where nothing is learned


class Attention(NamedTuple):
    """The parameters: a tuple has one for the image and one for the text."""

    weights: tuple[Float[Tensor, "classes _"], ...]
    """Of the values; with the bias below a linear head per side."""
    bias: tuple[Float[Tensor, " classes"], ...]
    keys: tuple[Float[Tensor, "hidden _"], ...]
    gates: tuple[Float[Tensor, "hidden _"], ...]
    offset: tuple[Float[Tensor, ""], ...]
    """How much a side is listened to whatever it shows."""
    query: Float[Tensor, " hidden"]
    gain: Float[Tensor, ""]
    """The logarithm of the factor on the logits of samples with both sides: two that agree are surer than one."""

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.weights, *self.bias, *self.keys, *self.gates, *self.offset, self.query, self.gain]


def attention_logits(
    parameters: Attention, sides: Sequence[Float[Tensor, "n _"]], there: Bool[Tensor, "n sides"]
) -> Float[Tensor, "n classes"]:
    """The logits: the mean of each side's ``weights · x + bias``, its share a softmax over the sides that are there.

    The score of a side is ``query · (tanh(keys · x) * sigmoid(gates · x)) + offset``.

    Args:
        parameters: of the probe.
        sides: embeddings of the image and of the text; what stands in the row of a missing side is never used.
        there: which sides each sample has; at least one.
    """
    scores, values = [], []
    for at, side in enumerate(sides):
        x = torch.where(there[:, at, None], side, 0.0)  # no product: nothing times NaN is NaN
        gated = torch.tanh(x @ parameters.keys[at].T) * torch.sigmoid(x @ parameters.gates[at].T)
        scores.append(gated @ parameters.query + parameters.offset[at])
        values.append(x @ parameters.weights[at].T + parameters.bias[at])
    shares = torch.stack(scores, 1).masked_fill(~there, -torch.inf).softmax(1)
    logits = (shares[:, :, None] * torch.stack(values, 1)).sum(1)
    return torch.where(there.all(1, keepdim=True), parameters.gain.exp() * logits, logits)


class Training(NamedTuple):
    """How the attention is trained."""

    hidden: int = 32
    """Length of the query."""
    steps: int = 300
    """At the most."""
    patience: int = 6
    """How many looks at the held-out samples may pass without a gain."""
    batch_size: int = 512
    lr: float = 3e-3
    """Of Adam (Kingma & Ba 2015)."""
    dropout: float = 0.5
    """How often a training sample with both sides loses one, either as often as the other."""
    seed: int = 0
    """Of the first keys and gates, the batches and what is left out."""


class Fitted(NamedTuple):
    """An attention probe, and how it came to be."""

    parameters: Attention
    steps: int
    """That it was trained for; 0 where training gained nothing on the held-out samples."""
    heads: FusionHeads
    """Where training began, and what is said of samples that lack a side."""


def begin(heads: Sequence[Linear], how: Training) -> Attention:
    """Where training starts: the heads as they are, both sides listened to alike.

    A class that a head has never met starts below all others, and not at minus infinity, which nothing would move.
    """
    rng = torch.Generator().manual_seed(how.seed)
    dims = [head.weights.shape[1] for head in heads]
    met = [np.isfinite(head.bias) for head in heads]
    bias = [np.where(has, head.bias, head.bias[has].min() - BELOW) for has, head in zip(met, heads, strict=True)]
    return Attention(
        tuple(torch.from_numpy(head.weights).float() * dim**-0.5 for head, dim in zip(heads, dims, strict=True)),
        tuple(torch.from_numpy(each).float() for each in bias),
        tuple(torch.randn(how.hidden, dim, generator=rng) * dim**-0.5 for dim in dims),
        tuple(torch.randn(how.hidden, dim, generator=rng) * dim**-0.5 for dim in dims),
        tuple(torch.zeros(()) for _ in dims),
        torch.zeros(how.hidden),
        torch.zeros(()),
    )


def fit_attention(
    samples: PairedEmbeddings,
    labels: Int[Array, " n"],
    heads: FusionHeads,
    *,
    groups: Int[Array, " n"] | None = None,
    how: Training | None = None,
) -> Fitted:
    """Train on four fifths of the samples to learn for how many steps, then on all of them for so many.

    It is the same for the same seed on the same machine.

    Args:
        samples: to be fitted to, each side of unit norm.
        labels: the class of each.
        heads: fitted to the same samples; where training starts.
        groups: a number for each sample; those with the same are held out together.
        how: it is trained.
    """
    how = how or Training()
    threads = torch.get_num_threads()
    # Products so small take longer on several threads, and on one the sums are the same on every machine of a kind.
    torch.set_num_threads(1)
    try:
        return _fitted(samples, labels, heads, groups, how)
    finally:
        torch.set_num_threads(threads)


def _fitted(
    samples: PairedEmbeddings, labels: Array, heads: FusionHeads, groups: Array | None, how: Training
) -> Fitted:
    pair = (heads.image, heads.text)
    rows = np.flatnonzero(samples.there.any(axis=1))
    held = folds_of(labels[rows], HELD_OUT_FOLDS, groups=None if groups is None else groups[rows], seed=how.seed) == 0
    learn, judge = rows[~held], rows[held]
    steps = 0
    judge = judge[samples.there[judge].all(axis=1)]
    if len(judge) and samples.there[learn].any(axis=0).all():
        partial = []
        for side, head in enumerate(pair):
            own = learn[samples.there[learn, side]]
            features = samples.side(side)[own]
            partial.append(fit_linear(features, labels[own], len(heads.prior), strength=head.strength))
        steps = _best_steps(partial, samples, labels, learn, judge, how)
    parameters = begin([head.linear for head in pair], how)
    for _ in _trained(parameters, _tensors(samples, rows), torch.from_numpy(labels[rows]), how, steps):
        pass
    return Fitted(parameters, steps, heads)


def _best_steps(
    heads: Sequence[Linear], samples: PairedEmbeddings, labels: Array, learn: Array, judge: Array, how: Training
) -> int:
    """After how many steps the loss on the held-out samples, which have both sides, is least."""
    sides, there = _tensors(samples, judge)
    truth = torch.from_numpy(labels[judge])
    parameters = begin(heads, how)
    best, least = 0, float("inf")
    for done in _trained(parameters, _tensors(samples, learn), torch.from_numpy(labels[learn]), how, how.steps):
        if done % EVERY:
            continue
        with torch.no_grad():
            loss = F.cross_entropy(attention_logits(parameters, sides, there), truth).item()
        if loss < least:
            best, least = done, loss
        if done - best >= how.patience * EVERY:
            break
    return best


def _trained(
    parameters: Attention, data: tuple[list[Tensor], Tensor], labels: Tensor, how: Training, steps: int
) -> Iterator[int]:
    """Train in place; gives the number of steps that are done, from 0 on."""
    sides, there = data
    rng = torch.Generator().manual_seed(how.seed + 1)
    tensors = [tensor.requires_grad_() for tensor in parameters.tensors()]
    adam = torch.optim.Adam(tensors, lr=how.lr)
    size = min(how.batch_size, len(labels))
    for done in range(steps):
        yield done
        some = torch.randint(len(labels), (size,), generator=rng)
        loses = torch.rand(size, generator=rng) < how.dropout
        which = torch.randint(2, (size,), generator=rng)
        gone = F.one_hot(which, 2).bool() & (loses & there[some].all(1))[:, None]
        loss = F.cross_entropy(
            attention_logits(parameters, [side[some] for side in sides], there[some] & ~gone), labels[some]
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    for tensor in tensors:
        tensor.requires_grad_(False)
    yield steps


def _tensors(samples: PairedEmbeddings, rows: Array) -> tuple[list[Tensor], Tensor]:
    sides = [torch.from_numpy(samples.side(side)[rows]).float() for side in (IMAGE, TEXT)]
    # Numbers of about 1 in size, for which Adam's rates are meant.
    return [side * side.shape[1] ** 0.5 for side in sides], torch.from_numpy(samples.there[rows])


def attention_fusion(fitted: Fitted, samples: PairedEmbeddings) -> Float[Array, "n classes"]:
    """What the probe says of samples, logarithms of probabilities; what `late_fusion` says where a side is missing."""
    found = late_fusion(fitted.heads, samples)
    rows = np.flatnonzero(samples.there.all(axis=1))
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        with torch.no_grad():
            found[some] = attention_logits(fitted.parameters, *_tensors(samples, some)).double().log_softmax(1).numpy()
    return found
