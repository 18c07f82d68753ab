"""Pixels agree with open_clip's, and the fast resize with the exact one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image

from clipkit.images import Preprocess
from clipkit.images import preprocess as room


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_open_clips(resize_mode, interpolation):
    rng = np.random.default_rng(1)
    for _ in range(25):
        width, height, size = (int(v) for v in rng.integers(8, 150, 3))
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        theirs = image_transform(
            size, False, (0, 0, 0), (1, 1, 1), resize_mode=resize_mode, interpolation=interpolation
        )(image)
        ours = Preprocess(size=size, resize_mode=resize_mode, interpolation=interpolation)(image)
        assert ours.shape == (3, size, size)
        assert np.array_equal(ours, (theirs.numpy() * 255).round().astype(np.uint8)), (width, height, size)


def test_rectangular_target():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    theirs = image_transform((32, 48), False, (0, 0, 0), (1, 1, 1), resize_mode="shortest")(image)
    ours = Preprocess(size=(32, 48))(image)
    assert np.array_equal(ours, (theirs.numpy() * 255).round().astype(np.uint8))


def smooth(width, height, grain=8):
    """A picture without detail finer than `grain` pixels, as photos are."""
    shape = (height // grain + 2, width // grain + 2, 3)
    coarse = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


MODES = {
    "resize_mode": ["shortest", "longest", "squash"],
    "interpolation": ["bicubic", "bilinear", "lanczos", "nearest"],
}


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear", "lanczos", "nearest"]),
)
def test_fast_is_the_exact_way_up_to_rounding(width, height, size, resize_mode, interpolation):
    preprocess = Preprocess(size=size, resize_mode=resize_mode, interpolation=interpolation, fill=9)
    image = smooth(width, height)
    exact, fast = preprocess(image), preprocess.fast(np.asarray(image))
    assert fast.shape == exact.shape == (3, *size)
    assert fast.flags["C_CONTIGUOUS"]
    # Where few pixels are left, the overshoot of a cubic is cut off, before or after the other axis had its turn.
    assert np.abs(exact.astype(int) - fast).max() <= 12
    assert np.abs(exact.astype(int) - fast).mean() <= (0.6 if min(width, height, *size) > 16 else 3)


@pytest.mark.parametrize("scale", [1 / 2, 3 / 8, 1 / 4, 1 / 8])
@pytest.mark.parametrize("size", [(513, 400), (700, 529), (512, 512)])
def test_a_reduced_image_falls_on_the_same_pixels(size, scale):
    """The last row of a reduced decoding stands for a part of one; stretching it over the whole would shift all."""
    image = smooth(*size, grain=48)
    reduced = tuple(-int(-side * scale // 1) for side in size)
    box = (0, 0, reduced[0] / scale, reduced[1] / scale)
    wider = Image.fromarray(np.pad(np.asarray(image), ((0, 8), (0, 8), (0, 0)), mode="edge"))
    pixels = np.asarray(wider.resize(reduced, Image.Resampling.BOX, box=box))
    preprocess = Preprocess(size=40)
    exact, fast = preprocess(image).astype(int), preprocess.fast(pixels, size, scale)
    assert np.abs(exact - fast).mean() < 1
    assert np.abs(exact - fast).mean() <= np.abs(exact - preprocess.fast(pixels)).mean() + 0.01


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (3, 500), (900, 2)])
def test_a_strip_is_resized_where_it_is_kept_only(size, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    whole = Preprocess(size=24)(image)
    monkeypatch.setattr(room, "RESIZED_AREA_LIMIT", 4)
    assert np.abs(Preprocess(size=24)(image).astype(int) - whole).max() <= 2
    assert np.abs(Preprocess(size=24).fast(np.asarray(image)).astype(int) - whole).max() <= 2


def test_a_strip_as_long_as_jpeg_allows_costs_no_memory():
    assert Preprocess()(Image.new("RGB", (65_500, 1))).shape == (3, 224, 224)  # resized whole it would take 10 GB
