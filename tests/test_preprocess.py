"""Decoding to what a person sees, and pixels that agree with open_clip's."""

import io

import numpy as np
import pytest
from open_clip.transform import image_transform
from PIL import Image, ImageCms

from clipkit import preprocess
from clipkit.errors import BadSample
from clipkit.preprocess import Preprocess, decode, identify


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (2, 2)) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel(at)


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "seen"),
    [
        ("RGB", (10, 200, 30), "PNG", (10, 200, 30)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), "PNG", (200, 0, 0)),
        ("RGBA", (0, 0, 0, 128), "WEBP", (127, 127, 127)),
        ("LA", (0, 51), "PNG", (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("I;16", 65535 // 2, "PNG", (127, 127, 127)),
        ("I;16", 65535, "TIFF", (255, 255, 255)),
        ("F", 0.5, "TIFF", (128, 128, 128)),
    ],
)
def test_every_mode_becomes_the_rgb_that_a_person_sees(mode, colour, kind, seen):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.allclose(pixel(saved(Image.new(mode, (5, 5), colour), kind, **options)), seen, atol=1)


def test_palette_with_a_transparent_entry_lies_over_the_background():
    image = Image.new("P", (5, 5), 0)
    image.putpalette([9, 9, 9, 0, 0, 255])
    image.putpixel((2, 2), 1)
    data = saved(image, "PNG", transparency=0)
    assert pixel(data) == (0, 0, 255)
    assert pixel(data, (0, 0)) == (255, 255, 255)
    assert decode(data, background=(0, 128, 0)).getpixel((0, 0)) == (0, 128, 0)


def test_half_transparent_edge_is_mixed_not_cut():
    image = Image.new("RGBA", (5, 5), (255, 0, 0, 64))
    assert np.allclose(pixel(saved(image, "PNG")), (255, 191, 191), atol=1)


def test_sixteen_bit_grey_with_a_transparent_value():
    image = Image.fromarray(np.full((5, 5), 1000, np.uint16))
    image.putpixel((2, 2), 40000)
    data = saved(image, "PNG", transparency=1000)
    assert np.allclose(pixel(data), 40000 / 257, atol=1)
    assert pixel(data, (0, 0)) == (255, 255, 255)


def test_rotated_photo_stands_upright():
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned 90 degrees clockwise
    upright = decode(saved(image, "PNG", exif=exif))
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 0, 0)


def test_cmyk_with_a_profile_goes_through_it(monkeypatch):
    used = []
    monkeypatch.setattr(preprocess, "_through_profile", lambda image: used.append(image.mode))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    decode(saved(Image.new("CMYK", (5, 5), (0, 255, 255, 0)), "JPEG", icc_profile=profile))
    assert used == ["CMYK"]


def test_a_profile_that_does_not_fit_falls_back_to_the_plain_conversion():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of RGB, so of no use for CMYK
    red = pixel(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", icc_profile=profile, quality=100))
    assert np.allclose(red, (255, 0, 0), atol=4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"path\tcaption\na.png\ta cat\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "image|header"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_truncated_image_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    decode(data)
    with pytest.raises(BadSample):
        decode(data[: len(data) // 2])


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    data = saved(Image.new("1", (3000, 3000)), "PNG")
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 1_000_000)
    with pytest.raises(BadSample, match=r"3000x3000 pixels exceed"):
        identify(data)


def test_a_plugin_that_raises_anything_costs_one_image(monkeypatch):
    def broken(*_):
        raise RuntimeError("Failed to decode frame 0")

    data = saved(Image.new("RGB", (5, 5)), "PNG")
    monkeypatch.setattr(Image.Image, "load", broken)
    with pytest.raises(BadSample, match="Failed to decode frame 0"):
        decode(data)


def test_missing_file(tmp_path):
    with pytest.raises(BadSample, match="No such file"):
        decode(tmp_path / "none.png")


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
