"""Few-shot classifiers: better than the names alone, each example judged without itself, and no class forgotten."""

import itertools
import tracemalloc

import numpy as np
import pytest

from clipkit.classification import Linear, fit_linear, folds_of
from clipkit.classification.few_shot import FewShot, Shots, lifted, linear, prototypes, tip_adapter
from clipkit.classification.logistic import CLOSE_LOSS
from clipkit.core import ClipkitError
from clipkit.metrics import fit_temperature, log_loss

METHODS = [prototypes, tip_adapter, linear]
SCALE = 20.0


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class World:
    """Images and names in cones of their own, as CLIP has them; what the names say of the images is partly wrong."""

    def __init__(self, seed: int, classes: int = 6, dim: int = 24):
        self.rng = np.random.default_rng(seed)
        names, astray = self.rng.normal(size=(2, classes, dim))
        cones = 2 * self.rng.normal(size=(2, dim))
        self.means = names + 1.2 * astray + cones[0]
        self.text = unit(names + cones[1]).astype(np.float32)

    def draw(self, each):
        labels = np.repeat(np.arange(len(self.means)), each)
        noise = 2.2 * self.rng.normal(size=(len(labels), self.means.shape[1]))
        return unit(self.means[labels] + noise).astype(np.float32), labels


def accuracy(logits, labels):
    return (logits.argmax(axis=1) == labels).mean()


@pytest.mark.parametrize("method", METHODS)
def test_examples_beat_the_names_alone(method):
    gains, judged = [], []
    for seed in range(5):
        world = World(seed)
        features, labels = world.draw(8)
        others, truth = world.draw(100)
        found = method(Shots(features, labels, world.text, SCALE))
        gains.append(accuracy(found.logits(others), truth) - accuracy(others @ world.text.T, truth))
        judged.append(accuracy(found.held_out, labels) - accuracy(found.logits(others), truth))
        assert found.judged.all()
    assert min(gains) > 0.02
    assert np.mean(gains) > 0.1
    assert abs(np.mean(judged)) < 0.1  # what is held out says how well it does on others


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copies", [False, True])
def test_an_example_has_no_part_in_its_own_judgement(method, copies):
    """Held out, it gets what a classifier without it and its copies gives, with the same choices."""
    world = World(1, classes=4)
    features, labels = world.draw(5)
    groups = np.arange(len(labels)) // (2 if copies else 1)
    groups = groups + 100 * labels  # copies are of one class
    found = method(Shots(features, labels, world.text, SCALE, groups))
    for at in (0, 7, len(labels) - 1):
        rest = groups != groups[at]
        if method is linear:
            fold = folds_of(labels, 5, groups=groups)
            assert (fold[groups == groups[at]] == fold[at]).all()
            rest = fold != fold[at]
            fitted = fit_linear(
                features[rest], labels[rest], 4, start=start_of(world), strength=found.chosen["strength"]
            )
            wanted = fitted.logits(features[at : at + 1].astype(np.float64))[0]
            assert np.allclose(found.held_out[at], wanted, atol=0.05)
        else:
            wanted = by_hand(method, features[rest], labels[rest], world.text, found.chosen, features[at],
                             usual=len(labels) / 4)  # fmt: skip
            assert np.allclose(found.held_out[at], wanted, atol=1e-5)


def start_of(world):
    return Linear(SCALE * world.text.astype(np.float64), np.zeros(len(world.text)))


def by_hand(method, features, labels, text, chosen, image, usual):
    """The formulas, one class at a time."""
    logits = []
    for at in range(len(text)):
        own = features[labels == at].astype(np.float64)
        name = float(text[at] @ image)
        if method is prototypes:
            mean = own.mean(axis=0)
            near = float(mean @ image) / np.linalg.norm(mean)
            logits.append(SCALE * ((1 - chosen["weight"]) * name + chosen["weight"] * near))
        else:
            told = np.exp(-chosen["beta"] * (1 - own @ image)).mean() * usual
            logits.append(SCALE * name + chosen["alpha"] * told)
    return logits


@pytest.mark.parametrize("method", [prototypes, tip_adapter])
def test_the_formulas_read_aloud(method):
    world = World(2)
    features, labels = world.draw(3)
    found = method(Shots(features, labels, world.text, SCALE))
    for image in world.draw(1)[0]:
        wanted = by_hand(method, features, labels, world.text, found.chosen, image, usual=3)
        assert np.allclose(found.logits(image[None])[0], wanted, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_examples_is_still_found(method):
    world = World(3)
    features, labels = world.draw(8)
    seen = labels != 2
    others, truth = world.draw(100)
    found = method(Shots(features[seen], labels[seen], world.text, SCALE))
    logits, base = found.logits(others), SCALE * (others @ world.text.T).astype(np.float64)
    known = [0, 1, 3, 4, 5]
    mean = (logits - base)[:, known].mean(axis=1)
    assert np.allclose((logits - base)[:, 2], mean, atol=1e-4)  # it stands to the others on the whole as it did
    assert (logits[truth == 2].argmax(axis=1) == 2).mean() > 0.3  # chance is 0.17
    assert accuracy(logits, truth) > accuracy(base, truth) + 0.1


@pytest.mark.parametrize("method", [prototypes, tip_adapter])
@pytest.mark.parametrize("missing", [0, 4])
def test_what_is_tried_is_not_kept(method, missing):
    """Sixteen examples of each of 1,000 classes make logits of 128 MB, for each of 88 choices."""
    world = World(6, classes=100)
    features, labels = world.draw(3)
    some = labels < len(world.text) - missing
    features, labels = features[some], labels[some]
    method(Shots(features, labels, world.text, SCALE))
    tracemalloc.start()
    method(Shots(features, labels, world.text, SCALE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(labels) * len(world.text) * 8


@pytest.mark.parametrize("missing", [False, True])
def test_of_what_is_tried_the_gentlest_of_the_likeliest_is_taken(missing):
    """A slow twin for Tip-Adapter, each choice from its beginning, one example at a time."""
    world = World(7, classes=5)
    features, labels = world.draw(4)
    if missing:
        features, labels = features[labels != 3], labels[labels != 3]
    alphas, betas = (0.5, 4.0, 32.0), (1.0, 8.0)
    has = np.isin(np.arange(5), labels)
    base = SCALE * (features.astype(np.float64) @ world.text.T.astype(np.float64))
    losses = {}
    for alpha, beta in itertools.product(alphas, betas):
        met, unmet = [], []
        for at, image in enumerate(features.astype(np.float64)):
            others = np.arange(len(labels)) != at
            near = np.exp(-beta * (1 - features.astype(np.float64) @ image)) * others
            told = np.array([near[labels == c].sum() / max((others & (labels == c)).sum(), 1) for c in range(5)])
            told *= len(labels) / has.sum() * alpha
            met.append(lifted(base[at : at + 1], told[None], has[None])[0])
            unmet.append(lifted(base[at : at + 1], told[None], (has & (np.arange(5) != labels[at]))[None])[0])
        heat = max(1.0, fit_temperature(np.array(met), labels))
        parts = [log_loss(np.array(each), labels, heat) for each in (met, unmet)]
        losses[alpha, beta] = parts[0] + (1 - has.mean()) * (parts[1] - parts[0])
    wanted = min(choice for choice, loss in losses.items() if loss <= min(losses.values()) + CLOSE_LOSS)
    found = tip_adapter(Shots(features, labels, world.text, SCALE), alphas=alphas, betas=betas)
    assert (found.chosen["alpha"], found.chosen["beta"]) == wanted


@pytest.mark.parametrize("method", METHODS)
def test_one_example_of_each_class_and_one_class_alone(method):
    world = World(4)
    features, labels = world.draw(1)
    found = method(Shots(features, labels, world.text, SCALE))
    assert not found.judged.any()
    others, truth = world.draw(50)
    assert accuracy(found.logits(others), truth) > accuracy(others @ world.text.T, truth) - 0.02
    alone = method(Shots(features[:1], labels[:1], world.text, SCALE))
    assert np.isfinite(alone.logits(others)).all()
    assert alone.logits(others[:0]).shape == (0, 6)
    same = method(Shots(features[:1].repeat(3, 0), labels[:1].repeat(3), world.text, SCALE, np.zeros(3, int)))
    assert not same.judged.any()  # copies of one image are one example


def test_unequal_numbers_favour_no_class():
    """An image half-way between two classes is of neither, however many examples of one there are."""
    text = np.eye(2, 8, dtype=np.float32)
    features = np.concatenate([np.repeat(np.eye(8)[2:3], 30, 0), np.repeat(np.eye(8)[3:4], 2, 0)]).astype(np.float32)
    labels = np.array([0] * 30 + [1] * 2)
    middle = unit(np.eye(8)[2:3] + np.eye(8)[3:4]).astype(np.float32)
    for method in (prototypes, tip_adapter):
        logits = method(Shots(features, labels, text, SCALE)).logits(middle)[0]
        assert logits[0] == pytest.approx(logits[1])


def test_lifting_moves_the_unknown_by_the_mean_of_the_known():
    base, change = np.zeros((2, 3)), np.array([[1.0, 3.0, 9.0], [2.0, 4.0, 6.0]])
    assert lifted(base, change, np.array([[True, True, False]])).tolist() == [[1, 3, 2], [2, 4, 3]]
    assert lifted(base, change, np.zeros((1, 3), bool)).tolist() == base.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_unusable_examples_are_refused(method):
    world = World(0)
    features, labels = world.draw(2)
    broken = features.copy()
    broken[3, 1] = np.nan
    for about, told in [
        ((features[:0], labels[:0]), "no examples"),
        ((broken, labels), "first in row 3"),
        ((features, labels + 1), "from 0 to 5"),
    ]:
        with pytest.raises(ClipkitError, match=told):
            method(Shots(*about, world.text, SCALE))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_examples_give_the_same_classifier(method):
    world = World(5)
    features, labels = world.draw(4)
    one, two = (method(Shots(features, labels, world.text, SCALE)) for _ in range(2))
    assert isinstance(one, FewShot)
    assert one.chosen == two.chosen
    assert np.array_equal(one.held_out, two.held_out)
    assert np.array_equal(one.logits(features), two.logits(features))
