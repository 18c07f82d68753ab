"""Pictures that look alike: the hash against a plain transform, the search against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.data.check import perceptual_hash as room
from clipkit.data.check.perceptual_hash import (
    COARSE,
    FLAT_BELOW,
    MAX_DISTANCE,
    colours_agree,
    looks_of,
    near_duplicates,
    near_pairs,
    nearest,
)
from tests.samples import photo


def test_hearts_in_other_colours_are_other_pictures():
    cut = Image.new("L", (64, 64))
    cut.paste(255, (16, 16, 48, 48))
    red, blue = (Image.composite(Image.new("RGB", (64, 64), c), Image.new("RGB", (64, 64), "white"), cut)
                 for c in ((200, 40, 40), (40, 60, 220)))  # fmt: skip
    one, other = looks_of(red), looks_of(blue)
    assert (one.hash ^ other.hash).bit_count() <= 6
    assert not colours_agree(one.colours, other.colours)
    assert colours_agree(one.colours, looks_of(red.point(lambda v: min(255, int(v * 1.1)))).colours)


def bits(values):
    return np.array(values, np.uint64)


@st.composite
def clustered(draw):
    """Hashes near a few centres, so that there are pairs to be found, some of them equal."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=9).map(lambda places: sum(1 << p for p in set(places)))
    one = st.tuples(st.sampled_from(centres), flips).map(lambda pair: pair[0] ^ pair[1])
    return bits(draw(st.lists(one, min_size=0, max_size=30)))


@settings(max_examples=60, deadline=None)
@given(clustered(), clustered(), st.integers(0, MAX_DISTANCE))
def test_near_pairs_are_those_of_brute_force(one, other, distance):
    found = {
        (int(i), int(j), int(d))
        for rows in near_pairs(one, other, distance)
        for i, j, d in zip(*rows, strict=True)
    }  # fmt: skip
    all_pairs = [(i, j, (int(a) ^ int(b)).bit_count()) for i, a in enumerate(one) for j, b in enumerate(other)]
    assert found == {pair for pair in all_pairs if pair[2] <= distance}


def test_near_pairs_come_in_blocks(monkeypatch):
    monkeypatch.setattr(room, "CANDIDATES_AT_ONCE", 7)
    hashes = bits([5, 5, 5, 4, 5, 1 << 60, 5])
    pairs = {(int(i), int(j)) for rows in near_pairs(hashes, hashes, 2) for i, j in zip(*rows[:2], strict=True)}
    near = [0, 1, 2, 3, 4, 6]
    assert pairs == {(i, j) for i in near for j in near} | {(5, 5)} | {(3, 5), (5, 3)}


@settings(max_examples=60, deadline=None)
@given(clustered(), st.integers(0, MAX_DISTANCE), st.integers(0, 3))
def test_near_duplicates_leave_no_two_near_ones_and_name_one_that_stays(hashes, distance, seed):
    shades = np.random.default_rng(seed).choice(np.array([0, 200], np.uint8), (2, COARSE))
    colours = shades[np.random.default_rng(seed + 1).integers(0, 2, len(hashes))]
    kept = near_duplicates(hashes, colours, distance)
    near = np.array([[int(a ^ b).bit_count() <= distance for b in hashes] for a in hashes], bool)
    near = near.reshape(len(hashes), len(hashes))
    near &= (colours[:, None] == colours[None]).all(-1)
    for row, stands_for in enumerate(kept.tolist()):
        assert kept[stands_for] == stands_for <= row
        assert near[row, stands_for] or row == stands_for
    stay = np.flatnonzero(kept == np.arange(len(hashes)))
    assert not (near[np.ix_(stay, stay)] & ~np.eye(len(stay), dtype=bool)).any()


@settings(max_examples=40, deadline=None)
@given(clustered(), clustered(), st.integers(0, MAX_DISTANCE))
def test_nearest_is_that_of_brute_force(one, other, distance):
    plain = np.zeros((max(len(one), len(other)), COARSE), np.uint8)
    rows, bits_apart = nearest(one, plain[: len(one)], other, plain[: len(other)], distance)
    for i, value in enumerate(one):
        apart = [(int(value ^ b).bit_count(), j) for j, b in enumerate(other)]
        best = min((pair for pair in apart if pair[0] <= distance), default=(0, -1))
        assert (int(bits_apart[i]), int(rows[i])) == best


def test_a_crowd_of_equal_hashes_costs_no_square():
    n = 200_000  # 2e10 pairs, were they all compared
    kept = near_duplicates(np.full(n, 7, np.uint64), np.zeros((n, COARSE), np.uint8), 6)
    assert (kept == 0).all()


def test_the_hash_follows_a_plain_cosine_transform():
    image = photo(3, 70, 50)
    grey = np.asarray(image.resize((32, 32), Image.Resampling.BOX).convert("L"), float)
    place = np.arange(32)
    waves = np.array(
        [np.cos(np.pi * k * (2 * place + 1) / 64) * (np.sqrt(1 / 32) if k == 0 else 0.25) for k in range(8)]
    )
    low = np.array([[(grey * np.outer(a, b)).sum() for b in waves] for a in waves])
    looks = looks_of(image)
    assert looks.hash == int("".join(str(int(v > np.median(low) + 8)) for v in low.ravel()), 2)
    assert looks.contrast == pytest.approx(np.sqrt((low**2).sum() - low[0, 0] ** 2) / 32, rel=1e-4)
    assert looks.contrast > FLAT_BELOW > looks_of(Image.new("RGB", (9, 9), (90, 20, 60))).contrast
