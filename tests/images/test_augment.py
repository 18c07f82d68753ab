"""The fast way from bytes to augmented pixels, beside the exact one: same draws, same picture."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from clipkit.core import BadSample
from clipkit.images import Augmentation, AugmentConfig, Preprocess, augmented_pixels, decode

EVERYTHING = AugmentConfig(
    shift=0.1, scale=(0.3, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2
)


def photo(width, height, mode="RGB", grain=32):
    shape = (height // grain + 2, width // grain + 2, 3)
    coarse = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(image, kind="JPEG", orientation=1, **options):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


def both(data, preprocess, config, seed=0):
    """Exact and fast pixels, and what the generators give next."""
    rngs = [np.random.default_rng(seed) for _ in range(2)]
    exact = augmented_pixels(data, preprocess, config, rngs[0], exact=True)
    fast = augmented_pixels(data, preprocess, config, rngs[1])
    assert rngs[0].random() == rngs[1].random()  # as many draws were made
    assert fast.shape == exact.shape == (3, *preprocess.size)
    assert fast.dtype == np.uint8
    assert fast.flags["C_CONTIGUOUS"]
    return exact.astype(int), fast.astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(403, 307), (248, 488), (97, 64)])
def test_fast_agrees_with_exact(size, resize_mode, orientation):
    data = saved(photo(*size), orientation=orientation)
    preprocess = Preprocess(size=(56, 48), resize_mode=resize_mode)
    for seed, config in enumerate((AugmentConfig(), AugmentConfig(scale=(0.2, 1.0)), EVERYTHING)):
        exact, fast = both(data, preprocess, config, seed)
        assert np.abs(exact - fast).mean() < 2.5, (seed, np.abs(exact - fast).mean())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_other_formats_differ_by_rounding_only(kind, mode):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(photo(200, 150, "RGB" if kind == "WEBP" and mode == "P" else mode), kind, **options)
    exact, fast = both(data, Preprocess(size=40), AugmentConfig(scale=(0.5, 1.0), shift=0.1, flip=0.5))
    assert np.abs(exact - fast).mean() < 0.5


@pytest.mark.parametrize("options", [{"mode": "CMYK"}, {"mode": "L"}, {"progressive": True}, {"keep_rgb": True}])
def test_every_kind_of_jpeg(options):
    options = {"mode": "RGB", **options}
    data = saved(photo(500, 400, options.pop("mode")), **options)
    exact, fast = both(data, Preprocess(size=64), EVERYTHING)
    assert np.abs(exact - fast).mean() < 2.5


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_any_size_and_any_crop(width, height, size, scale, resize_mode, orientation, seed):
    data = saved(photo(width, height, grain=64), orientation=orientation, subsampling=0)
    config = AugmentConfig(scale=scale, shift=0.1, flip=0.5)
    exact, fast = both(data, Preprocess(size=size, resize_mode=resize_mode), config, seed)
    # Of a few pixels the mean is not yet one.
    assert np.abs(exact - fast).mean() < 4 + 12 / (size[0] * size[1])


@pytest.mark.parametrize("interpolation", ["lanczos", "nearest", "bilinear"])
def test_every_interpolation(interpolation):
    preprocess = Preprocess(size=40, interpolation=interpolation)
    exact, fast = both(saved(photo(430, 310)), preprocess, AugmentConfig(scale=(0.5, 1.0)))
    assert np.abs(exact - fast).mean() < (8 if interpolation == "nearest" else 2.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2000, 3), (7, 5)])
def test_tiny_and_long(size):
    for kind in ("JPEG", "PNG"):
        exact, fast = both(saved(photo(*size), kind), Preprocess(size=32), EVERYTHING)
        assert np.abs(exact - fast).mean() < 2


def test_bytes_file_and_image_give_the_same(tmp_path):
    image = photo(300, 200)
    data = saved(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    first, *others = (
        augmented_pixels(source, Preprocess(size=32), EVERYTHING, np.random.default_rng(3))
        for source in (data, tmp_path / "a.png", image)
    )
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_is_cut_short_is_refused(kind):
    data = saved(photo(300, 200), kind)
    data = data[: len(data) // 2]
    for exact in (True, False):
        with pytest.raises(BadSample):
            augmented_pixels(
                data[: len(data) // 2], Preprocess(size=32), EVERYTHING, np.random.default_rng(0), exact=exact
            )


def test_threads_give_what_one_gives():
    data = [saved(photo(300 + 40 * n, 200), orientation=n) for n in range(1, 9)]

    def one(at):
        return augmented_pixels(data[at % 8], Preprocess(size=32), EVERYTHING, np.random.default_rng(at))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(64)))
    assert all(np.array_equal(pixels, one(at)) for at, pixels in enumerate(found))


def test_crops_of_large_images_lie_on_the_blocks_of_a_jpeg():
    config = AugmentConfig(scale=(0.5, 0.9))
    for seed in range(20):
        box = Augmentation.draw(4001, 2999, (224, 224), config, np.random.default_rng(seed)).box
        assert all(side % 8 == 0 for side in box)
        area = (box[2] - box[0]) * (box[3] - box[1]) / (4001 * 2999)
        assert 0.49 < area <= 0.9


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_as_torchvision_has_them(name, factor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    theirs = np.asarray(getattr(TF, f"adjust_{name}")(image, factor)).transpose(2, 0, 1).astype(int)
    ours = Augmentation((0, 0, 40, 30), colours=((name, factor),)).on_pixels(np.asarray(image).transpose(2, 0, 1))
    assert np.abs(theirs - ours).max() <= 2  # Pillow cuts off what we round


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_as_torchvision_has_it(turn):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 30, 40), dtype=np.uint8)
    pixels[:, :2] = pixels[:1, :2]  # grey has no hue
    image = torch.from_numpy(pixels)
    theirs = (TF.adjust_hue(image.float() / 255, turn) * 255).round().numpy()
    ours = Augmentation((0, 0, 40, 30), colours=(("hue", turn),)).on_pixels(pixels)
    assert np.abs(theirs - ours).max() <= 1


def test_a_drawn_shift_and_mirror_repeat_the_border():
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4).repeat(3, axis=0)
    moved = Augmentation((0, 0, 4, 3), shift=(1, -2), mirrored=True).on_pixels(pixels)
    assert moved[0].tolist() == [[5, 4, 4, 4], [9, 8, 8, 8], [9, 8, 8, 8]]


def test_exact_is_decode_crop_and_preprocess():
    data, preprocess = saved(photo(300, 200)), Preprocess(size=32)
    assert np.array_equal(
        augmented_pixels(data, preprocess, AugmentConfig(), np.random.default_rng(0), exact=True),
        preprocess(decode(data)),
    )
