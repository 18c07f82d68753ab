"""What is said of a row is the same to the last digit, whatever other rows stand in the call."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.classification import Rule, classify_images
from clipkit.classification.classifier import Classifier
from clipkit.classification.few_shot import Shots, linear, prototypes, tip_adapter
from clipkit.classification.images import Images
from clipkit.data.sources import Globs, open_source
from clipkit.embedding import Embeddings, EmbedOptions, embed
from clipkit.metrics import choice_scores, inner_products, on_grid, paired_products, products, rank_pairs
from clipkit.models import beside_background, in_blocks, probabilities
from clipkit.models.dual_encoder import CPU_IMAGES
from clipkit.search import Index, SearchOptions, Wanted, ask, build_index
from clipkit.search.query import QueryPart
from tests.conftest import make_pictures, tiny_model
from tests.indexes import DIM, make_embeddings

HEIGHTS = (1, 7, 10, 64, 1000)
ROWS, CLASSES, DIMS = 1000, 13, 96


def unit(rng, *shape):
    drawn = rng.normal(size=shape)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def rough(left, right, out=None):
    """A matrix product that rounds by its height: the order and the grouping of its sums follow from it."""
    height, inner = left.shape[-2], left.shape[-1]
    order, group = np.random.default_rng(height).permutation(inner), 9 + height % 7
    found = 0
    for start in range(0, inner, group):
        some = order[start : start + group]
        found = found + left[..., some] @ right[..., some, :]
    if out is None:
        return found
    out[...] = found
    return out


@pytest.fixture
def rounding():
    """Every product of ours rounds by its height."""
    with patch.object(products.np, "matmul", rough):
        yield


def test_the_rough_product_does_round_by_height():
    left, right = (unit(np.random.default_rng(0), rows, DIMS) for rows in (ROWS, CLASSES))
    for kind in (np.float32, np.float64):
        whole = rough(left.astype(kind), right.T.astype(kind))
        assert any((rough(left[:h].astype(kind), right.T.astype(kind)) != whole[:h]).any() for h in HEIGHTS)


@pytest.mark.parametrize("kinds", [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float16)])
@pytest.mark.parametrize("length", [1.0, 1e-3, 37.0])
def test_products_do_not_depend_on_height_and_are_better_than_float32(kinds, length, rounding):
    rng = np.random.default_rng(1)
    left, right = (unit(rng, rows, DIMS).astype(kind) for rows, kind in zip((ROWS, CLASSES), kinds, strict=True))
    left = (left * left.dtype.type(length)).astype(kinds[0])
    whole = inner_products(left, right)
    exact = (left[:, None].astype(np.longdouble) * right.astype(np.longdouble)).sum(axis=-1)
    assert abs(whole - exact).max() < 5e-8 * length
    for height in HEIGHTS:
        np.testing.assert_array_equal(inner_products(left[:height], right), whole[:height])
        np.testing.assert_array_equal(inner_products(left[-height:], right[:1])[:, 0], whole[-height:, 0])
        pairs = paired_products(left[:height, None], np.repeat(right[None], height, axis=0))
        np.testing.assert_array_equal(pairs[:, 0], whole[:height])


def test_the_grid_keeps_what_lies_on_it():
    rows = np.concatenate([unit(np.random.default_rng(2), 20, DIMS), np.zeros((1, DIMS), np.float32)])
    halves = rows.astype(np.float16)
    np.testing.assert_array_equal(on_grid(halves), halves.astype(np.float64))
    np.testing.assert_array_equal(on_grid(on_grid(rows)), on_grid(rows))
    assert abs(on_grid(rows) - rows).max() <= 2.0**-27
    # In any length: a power of two changes nothing but the exponent.
    np.testing.assert_array_equal(on_grid(rows * 2.0**-40), on_grid(rows) * 2.0**-40)


def images_of(rows):
    return Images([f"{at}.png" for at in range(len(rows))], lambda _, at: rows[at])


def classifiers():
    rng = np.random.default_rng(3)
    text, examples = unit(rng, CLASSES, DIMS), unit(rng, 60, DIMS)
    truth = np.arange(60) % (CLASSES - 1)
    yield "names", Classifier(text, lambda _, near: probabilities(near, 100.0)), Rule(groups=[[0, 5], list(range(12))])
    yield "each", Classifier(text, lambda _, near: probabilities(near, 10.0, -3.0)), Rule(threshold=0.1, several=True)
    background = Rule(background=[CLASSES - 1], several=True, threshold=0.5)
    yield "beside", Classifier(text, lambda _, near: beside_background(near, 50.0, [CLASSES - 1])), background
    for learn in (prototypes, tip_adapter, linear):
        few = learn(Shots(examples, truth, text, 100.0))
        shares = Classifier(text, lambda rows, _, few=few: probabilities(few.logits(rows), 1.0))
        yield learn.__name__, shares, Rule(threshold=0.3, min_margin=0.1)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_decisions_do_not_depend_on_height(kind, rounding):
    rows = unit(np.random.default_rng(4), ROWS, DIMS).astype(kind)
    for name, classifier, rule in classifiers():
        whole = classify_images(images_of(rows), [classifier], rule)
        for height in HEIGHTS:
            at = slice(ROWS - height, ROWS)
            some = classify_images(images_of(rows[at]), [classifier], rule)
            for field, value in vars(some).items():
                np.testing.assert_array_equal(value, getattr(whole, field)[at], err_msg=f"{name} {height} {field}")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """Of one kind each, one of them changed: two segments."""
    above = tmp_path_factory.mktemp("indexes")
    made = make_embeddings(above / "emb", range(3000))
    for kind in ("Flat", "IVF-SQ8"):
        build_index([made], above / kind, wanted=Wanted(kind=kind))
    return [Index.open(above / kind) for kind in ("Flat", "IVF-SQ8")]


@pytest.mark.parametrize("where", [None, "width < 400"])
def test_scores_of_a_search_do_not_depend_on_how_many_ask(indexes, where, rounding):
    queries = unit(np.random.default_rng(5), ROWS, DIM)
    for index in indexes:
        for exact in (True, False):
            whole = index.search(queries, 5, where=where, exact=exact)
            for height in HEIGHTS:
                some = index.search(queries[:height], 5, where=where, exact=exact)
                if exact:
                    np.testing.assert_array_equal(some.positions, whole.positions[:height])
                    np.testing.assert_array_equal(some.scores, whole.scores[:height])
                for row in range(height):  # lists that are looked at may differ, what is found in both does not
                    known = dict(zip(whole.positions[row].tolist(), whole.scores[row].tolist(), strict=True))
                    for position, score in zip(some.positions[row].tolist(), some.scores[row].tolist(), strict=True):
                        assert known.get(position, score) == score
            # Nor on how many are wanted, nor on the kind of the index.
            deep = index.search(queries[:3], 50, where=where, exact=True)
            np.testing.assert_array_equal(deep.scores[:, :5], indexes[0].search(queries[:3], 5, where=where).scores)


@pytest.mark.parametrize("fusion", ["score", "rank"])
def test_joined_lists_are_the_same_in_any_order_of_their_parts(indexes, fusion, rounding):
    parts = [
        QueryPart(vector, weight) for vector, weight in zip(unit(np.random.default_rng(6), 2, DIM), (1, 2), strict=True)
    ]
    one, other = (ask(indexes[0], some, SearchOptions(fusion=fusion)) for some in (parts, parts[::-1]))
    np.testing.assert_array_equal(one.positions, other.positions)
    np.testing.assert_array_equal(one.scores, other.scores)


def test_ranks_and_choices_do_not_depend_on_height(rounding):
    rng = np.random.default_rng(7)
    left, right = unit(rng, ROWS, DIMS), unit(rng, 50, DIMS)
    owner = rng.integers(50, size=ROWS)
    whole = rank_pairs(left, right, owner)[0]
    for height in HEIGHTS:
        some = rank_pairs(left[:height], right, owner[:height])[0]
        for part, of_all in zip(some, whole, strict=True):
            np.testing.assert_array_equal(part, of_all[:height])
    two, captions = left.reshape(-1, 2, DIMS), unit(rng, ROWS // 2, 2, DIMS)
    scores = choice_scores(two, captions)
    for height in HEIGHTS:
        np.testing.assert_array_equal(choice_scores(two[:height], captions[:height]), scores[:height])


# Towers


@pytest.fixture
def towers(monkeypatch):
    """A model whose towers round by the height of what they are given, and by nothing else on any processor."""
    model = tiny_model()

    def features(rows):
        spread = torch.linspace(0.5, 2, model.embed_dim) * rows.float().flatten(1).cumsum(1)[:, -1:].cos()
        return spread.sin() + 1e-3 * (len(rows) % 13)

    monkeypatch.setattr(model, "_image_features", features)
    monkeypatch.setattr(model, "_text_features", features)
    return model


def test_blocks_are_of_one_height_and_give_each_row_its_own():
    heights = []

    def encode(rows):
        heights.append(len(rows))
        return rows * 2

    for count in (1, 7, 8, 9, 16, 21):
        rows = torch.arange(float(count))[:, None]
        assert torch.equal(in_blocks(encode, rows, 8), rows * 2)
    assert set(heights) == {8}


def test_embeddings_do_not_depend_on_height(towers):
    rng = np.random.default_rng(8)
    pixels = torch.from_numpy(rng.integers(0, 255, (12, 3, 32, 32), np.uint8))
    with torch.inference_mode():  # the rounding is seen by a tower that is asked for fewer
        assert not torch.equal(towers.encode_image(pixels)[:5], towers.encode_image(pixels[:5]))
    texts = [" ".join(["word"] * (at % 7)) + f" {at}" for at in range(ROWS)]
    whole = towers.embed_texts(texts)
    for height in HEIGHTS:
        np.testing.assert_array_equal(towers.embed_texts(texts[:height]), whole[:height])
        np.testing.assert_array_equal(towers.embed_texts(texts[-height:], 64), whole[-height:])


def test_an_image_is_embedded_alike_whatever_else_is_chosen(towers, tmp_path):
    folder = make_pictures(tmp_path, 2 * CPU_IMAGES + 3).parent / "images"
    (folder / "005.png").write_bytes(b"no image")  # leaves a gap in its block
    whole = made(folder, towers, tmp_path / "whole")
    assert len(whole) == 2 * CPU_IMAGES + 2
    for pattern in ("001.png", "00*.png", "01*.png"):
        some = made(folder, towers, tmp_path / pattern.replace("*", "x"), Globs(include=[pattern]))
        assert some
        assert all((vector == whole[path]).all() for path, vector in some.items())


def test_real_towers_agree_beyond_what_their_blocks_round(model):
    """Small matrices are rounded by a row's place in its block, too, on some processors."""
    rng = np.random.default_rng(9)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)) for _ in range(11)]
    texts = [f"{'long ' * (at % 9)}text {at}" for at in range(40)]
    np.testing.assert_allclose(model.embed_images(pictures)[3:5], model.embed_images(pictures[3:5]), atol=1e-6)
    np.testing.assert_allclose(model.embed_texts(texts)[3:5], model.embed_texts(texts[3:5]), atol=1e-6)


def made(folder, model, out, globs=None):
    source = open_source(folder, globs=globs)
    options = EmbedOptions(sides=["image"], precision="fp32")
    embed(source, model, out, options, model_reference={"fingerprint": model.fingerprint()})
    found = Embeddings.open(out)
    vectors = np.concatenate(list(found.blocks("image")))
    paths = [path for table in found.tables() for path in table["image_path"].to_pylist()]
    return dict(zip(paths, vectors, strict=True))
