"""Fusion probes: by hand, by loops, and whatever stands where a side is missing."""

import math

import numpy as np
import pytest
import torch

from clipkit.classification import Linear, SweepOptions, fit_linear
from clipkit.core import ClipkitError
from clipkit.evaluation.probe.attention import (
    Attention,
    Training,
    attention_fusion,
    attention_logits,
    begin,
    fit_attention,
)
from clipkit.evaluation.probe.fusion import (
    IMAGE,
    TEXT,
    FusionHeads,
    Head,
    PairedEmbeddings,
    choose_weight,
    early_fusion,
    fit_head,
    fit_heads,
    late_fusion,
    pooled,
    prior_of,
    side_alone,
)

COLOURS, SHAPES = 3, 3
CLASSES = COLOURS * SHAPES


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def halves(n: int, seed: int, *, missing: float = 0.0) -> tuple[PairedEmbeddings, np.ndarray]:
    """The image knows a colour, the text a shape, and the class is both."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    colours, shapes = fixed.normal(size=(COLOURS, 7)), fixed.normal(size=(SHAPES, 10))
    colour, shape = rng.integers(COLOURS, size=n), rng.integers(SHAPES, size=n)
    image, text = colours[colour] + 0.5 * rng.normal(size=(n, 7)), shapes[shape] + 0.5 * rng.normal(size=(n, 10))
    there = np.ones((n, 2), bool)
    lone = rng.random(n) < missing
    there[lone, rng.integers(2, size=lone.sum())] = False
    return PairedEmbeddings(unit(image), unit(text), there), colour * SHAPES + shape


@pytest.fixture(scope="module")
def learned():
    """PairedEmbeddings of which some lack a side, and what was fitted to them."""
    samples, labels = halves(180, 1, missing=0.2)
    return samples, labels, fit_heads(samples, labels, CLASSES)


@pytest.fixture(scope="module")
def fitted(learned):
    samples, labels, heads = learned
    return fit_attention(samples, labels, heads, how=Training(steps=150))


def accuracy(log_shares, labels):
    return float((log_shares.argmax(axis=1) == labels).mean())


def probes(heads, fitted):
    return {
        "early": lambda samples: early_fusion(heads, samples),
        "late": lambda samples: late_fusion(heads, samples),
        "weighted": lambda samples: late_fusion(heads, samples, heads.weight),
        "attention": lambda samples: attention_fusion(fitted, samples),
    }


def test_only_both_know_all_and_a_lone_side_is_no_worse_for_the_other(learned, fitted):
    heads = learned[2]
    test, labels = halves(400, 2)
    alone = {side: side_alone(heads, test, side) for side in (IMAGE, TEXT)}
    best = max(accuracy(said, labels) for said in alone.values())
    assert best < 1 / 3 + 0.08, "the other half can only be guessed"
    for name, probe in probes(heads, fitted).items():
        assert accuracy(probe(test), labels) > 0.8, name
        for side, said in alone.items():
            left = probe(test.only(side))
            assert np.allclose(np.exp(left).sum(axis=1), 1)
            assert np.array_equal(left, said), "exactly what the side alone says"


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30, -7.0])
def test_what_stands_where_a_side_is_missing_changes_nothing(learned, fitted, garbage):
    _, labels, heads = learned
    test, _ = halves(40, 4, missing=0.6)
    test = test._replace(there=test.there.copy())
    test.there[:3] = False
    spoilt = test._replace(image=test.image.copy(), text=test.text.copy())
    spoilt.image[~test.there[:, IMAGE]] = garbage
    spoilt.text[~test.there[:, TEXT]] = garbage
    for name, probe in probes(heads, fitted).items():
        said = probe(spoilt)
        assert np.array_equal(said, probe(test)), name
        assert np.isfinite(said).all()
        assert np.array_equal(said[:3], np.tile(prior_of(labels, CLASSES), (3, 1))), "of no side, the prior"


def test_nor_where_it_is_fitted(learned):
    samples, labels, heads = learned
    spoilt = samples._replace(image=samples.image.copy(), text=samples.text.copy())
    spoilt.image[~samples.there[:, IMAGE]] = np.nan
    spoilt.text[~samples.there[:, TEXT]] = 1e30
    again = fit_heads(spoilt, labels, CLASSES)
    for one, other in zip((heads.image, heads.text, heads.joint), (again.image, again.text, again.joint), strict=True):
        assert np.array_equal(one.linear.weights, other.linear.weights)
    short = Training(steps=20)
    one, other = (fit_attention(some, labels, heads, how=short) for some in (samples, spoilt))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters.tensors(), other.parameters.tensors(), strict=True))


def test_late_fusion_by_hand():
    """Two classes; the image says 3 : 1, the text 1 : 9."""
    image = np.log([[0.75, 0.25]])
    text = np.log([[0.1, 0.9]])
    plain = math.sqrt(0.75 * 0.1), math.sqrt(0.25 * 0.9)
    assert np.exp(pooled(image, text, 0.5)) == pytest.approx(np.array([plain]) / sum(plain))
    weighted = 0.75**0.8 * 0.1**0.2, 0.25**0.8 * 0.9**0.2
    assert np.exp(pooled(image, text, 0.8)) == pytest.approx(np.array([weighted]) / sum(weighted))
    heads = FusionHeads(*(_always(shares) for shares in (image, text, image)), 0.8, np.log([0.5, 0.5]))
    there = np.array([[True, True], [True, False], [False, True], [False, False]])
    samples = PairedEmbeddings(np.full((4, 3), 0.5), np.full((4, 2), 0.5), there)
    found = np.exp(late_fusion(heads, samples, 0.8))
    assert found == pytest.approx(np.array([np.array(weighted) / sum(weighted), [0.75, 0.25], [0.1, 0.9], [0.5, 0.5]]))


def _always(log_shares):
    """A head that says the same of every sample."""
    dim = 3 if log_shares[0, 0] > -1 else 2
    linear = Linear(np.zeros((2, dim)), log_shares[0])
    return Head(linear, 1.0, 10, np.zeros(0, np.int64), np.zeros((0, 2)))


def test_the_weight_is_that_of_who_knows():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    sure = np.log(np.full((300, 4), 0.02))
    said = np.where(rng.random(300) < 0.9, labels, rng.integers(4, size=300))
    sure[np.arange(300), said] = np.log(0.94)
    noise = np.log(rng.dirichlet(np.ones(4), size=300))
    assert choose_weight(sure, noise, labels) > 0.9
    assert choose_weight(noise, sure, labels) < 0.1
    assert choose_weight(noise, noise, labels) == 0.5
    assert choose_weight(noise[:0], noise[:0], labels[:0]) == 0.5


def test_the_strength_is_the_best_of_all_by_cross_validation():
    from clipkit.classification import choose_strength

    for scale in (1.0, 0.02, 40.0):  # so that weak and strong ones are best
        samples, labels = halves(90, 5)
        features = scale * np.concatenate([samples.image, samples.text], axis=1)
        wanted = choose_strength(features, labels, CLASSES, SweepOptions(folds=3))
        found = fit_head(features, labels, CLASSES)
        assert found.strength == wanted.strength
        assert np.allclose(
            found.linear.weights, fit_linear(features, labels, CLASSES, strength=wanted.strength).weights
        )
        assert np.allclose(found.logits, wanted.logits[wanted.judged], atol=1e-3 * max(1, np.abs(found.logits).max()))


def test_a_class_that_a_side_has_never_met_is_not_ruled_out():
    samples, labels = halves(120, 6)
    samples.there[labels == 4, TEXT] = False
    heads = fit_heads(samples, labels, CLASSES)
    said = side_alone(heads, samples._replace(there=np.ones_like(samples.there)), TEXT)
    assert np.isfinite(said).all()
    assert np.allclose(np.exp(said).sum(axis=1), 1)
    assert said[:, 4].max() < np.log(1 / 80)
    fitted = fit_attention(samples, labels, heads, how=Training(steps=20))
    assert np.isfinite(attention_fusion(fitted, samples)).all()


def test_one_sample_per_class_and_sides_that_are_never_there():
    samples, labels = halves(60, 7)
    first = np.unique(labels, return_index=True)[1]
    few = samples.take(first)
    heads = fit_heads(few, labels[first], CLASSES)
    assert heads.image.strength == 1
    assert heads.weight == 0.5
    fitted = fit_attention(few, labels[first], heads, how=Training(steps=20))
    assert fitted.steps == 0, "nothing can be held out"
    for side, what in ((IMAGE, "an image"), (TEXT, "a text")):
        with pytest.raises(ClipkitError, match=f"no training sample has {what}"):
            fit_heads(samples.only(1 - side), labels, CLASSES)
    apart = samples._replace(there=np.eye(2, dtype=bool)[np.arange(60) % 2])
    with pytest.raises(ClipkitError, match="has both an image and a text"):
        fit_heads(apart, labels, CLASSES)


def parameters_of(seed: int, dims=(5, 3), hidden=4, classes=3) -> Attention:
    rng = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return Attention(
        tuple(some(classes, dim) for dim in dims),
        tuple(some(classes) for _ in dims),
        tuple(some(hidden, dim) for dim in dims),
        tuple(some(hidden, dim) for dim in dims),
        tuple(some() for _ in dims),
        some(hidden),
        some(),
    )


def looped(p: Attention, sides, there) -> list[list[float]]:
    """The definition, a number at a time."""
    found = []
    for row in range(len(there)):
        scores, values = {}, {}
        for side in (0, 1):
            if not there[row][side]:
                continue
            x = [float(v) for v in sides[side][row]]
            score = float(p.offset[side])
            for h in range(len(p.query)):
                key = sum(float(p.keys[side][h, d]) * x[d] for d in range(len(x)))
                gate = sum(float(p.gates[side][h, d]) * x[d] for d in range(len(x)))
                score += float(p.query[h]) * math.tanh(key) / (1 + math.exp(-gate))
            scores[side] = math.exp(score)
            values[side] = [
                float(p.bias[side][c]) + sum(float(p.weights[side][c, d]) * x[d] for d in range(len(x)))
                for c in range(len(p.bias[side]))
            ]
        total = sum(scores.values())
        factor = math.exp(float(p.gain)) if len(scores) == 2 else 1.0
        found.append([factor * sum(scores[s] / total * values[s][c] for s in scores) for c in range(len(p.bias[0]))])
    return found


def some_sides(n=7):
    rng = torch.Generator().manual_seed(5)
    sides = [torch.randn(n, dim, generator=rng, dtype=torch.float64) for dim in (5, 3)]
    there = torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 2)[:n]
    return sides, there


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_is_what_its_definition_says(seed):
    p = parameters_of(seed)
    sides, there = some_sides()
    wanted = torch.tensor(looped(p, sides, there), dtype=torch.float64)
    assert torch.allclose(attention_logits(p, sides, there), wanted, rtol=0, atol=1e-12)


def test_gradients_of_the_attention():
    sides, there = some_sides()
    sides[0][~there[:, 0]] = torch.nan
    p = parameters_of(2)
    flat = [tensor.clone().requires_grad_() for tensor in p.tensors()]

    def logits(*t):
        return attention_logits(Attention(t[:2], t[2:4], t[4:6], t[6:8], t[8:10], t[10], t[11]), sides, there)

    assert torch.autograd.gradcheck(logits, flat)


def test_training_begins_as_the_mean_of_the_heads_and_repeats_itself(learned):
    samples, labels, heads = learned
    start = fit_attention(samples, labels, heads, how=Training(steps=0))
    assert start.steps == 0
    pair = [side_alone(heads, samples, side) for side in (IMAGE, TEXT)]
    both = samples.there.all(axis=1)
    assert np.allclose(attention_fusion(start, samples)[both], pooled(*pair, 0.5)[both], atol=1e-4)
    sides = [torch.from_numpy(samples.side(side)) * samples.side(side).shape[1] ** 0.5 for side in (IMAGE, TEXT)]
    for side in (IMAGE, TEXT):
        has = torch.from_numpy(samples.there[:, side])
        only = has[:, None] & (torch.arange(2) == side)
        said = attention_logits(start.parameters, [each[has] for each in sides], only[has]).log_softmax(1).numpy()
        assert np.allclose(said, pair[side][has.numpy()], atol=1e-4), "with one token its share is 1"
    one, two, other = (fit_attention(samples, labels, heads, how=Training(steps=30, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters.tensors(), two.parameters.tensors(), strict=True))
    assert one.steps > 0
    assert not torch.equal(one.parameters.keys[0], other.parameters.keys[0])
    assert begin([heads.image.linear, heads.text.linear], Training()).query.abs().sum() == 0
