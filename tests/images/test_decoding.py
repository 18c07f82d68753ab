"""Decoding to what a person sees, and the fast way to it."""

import io
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from clipkit.core import BadSample
from clipkit.images import Encoded, decode, identify
from clipkit.images import decoding as room
from clipkit.images.decoding import settle_pillow


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
    monkeypatch.setattr(room, "_through_profile", lambda image: used.append(image.mode))
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
    monkeypatch.setattr(room, "MAX_PIXELS", 1_000_000)
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


def photo(width=640, height=480, mode="RGB"):
    """Large enough for a reduced decoding, and smooth as photos are."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def turned(image, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", quality=95, exif=exif, **options)


JPEGS = {
    "RGB": {},
    "L": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "stored as RGB": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 4},
    "with a profile": {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_encoded_at_full_size_is_exact(kind):
    options = {"mode": "RGB", **JPEGS[kind]}
    data = saved(photo(101, 67, options.pop("mode")), "JPEG", **options)
    encoded, exact = Encoded(data), decode(data)
    pixels, scale = encoded.at_least(101, 67)
    assert encoded.size == exact.size == (101, 67)
    assert scale == 1
    assert np.array_equal(pixels, np.asarray(exact))
    assert np.array_equal(encoded.decode(), np.asarray(exact))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("least", "scale"), [(640, 1), (321, 1), (320, 1 / 2), (200, 3 / 8), (160, 1 / 4), (1, 1 / 8)])
def test_encoded_stands_upright_at_every_scale(orientation, least, scale):
    data = turned(photo(), orientation)
    encoded, exact = Encoded(data), decode(data)
    assert encoded.size == exact.size
    landscape = encoded.size[0] > encoded.size[1]
    pixels, found = encoded.at_least(*((least, 1) if landscape else (1, least)))
    assert found == scale
    assert pixels.shape[1::-1] == tuple(int(side * scale) for side in exact.size)
    reduced = np.asarray(exact.resize(pixels.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(reduced - pixels).mean() < 1
    assert np.abs(reduced - pixels[::-1, ::-1]).mean() > 20


@pytest.mark.parametrize("wanted", [(900, 1), (1, 900), (641, 1), (80, 481)])
@pytest.mark.parametrize("orientation", [1, 3])
def test_nothing_is_reduced_where_one_side_is_too_short_already(wanted, orientation):
    assert Encoded(turned(photo(), orientation)).at_least(*wanted)[1] == 1


@pytest.mark.parametrize("size", [(63, 1), (3, 3), (40, 2)])
def test_what_is_small_is_not_reduced(size):
    data = saved(photo(*size), "JPEG")
    assert np.array_equal(Encoded(data).at_least(1, 1)[0], np.asarray(decode(data)))


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_there_is_not_is_passed_over(orientation):
    data = turned(photo(60, 40), orientation)
    assert Encoded(data).size == decode(data).size == (60, 40)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_other_formats_are_decoded_in_full(kind):
    data = saved(photo(50, 30), kind)
    pixels, scale = Encoded(data).at_least(1, 1)
    assert scale == 1
    assert np.array_equal(pixels, np.asarray(decode(data)))


def test_a_palette_lies_over_the_background_here_too():
    image = Image.new("P", (5, 5), 0)
    image.putpalette([9, 9, 9, 0, 0, 255])
    pixels, _ = Encoded(saved(image, "PNG", transparency=0), (0, 128, 0)).at_least(1, 1)
    assert (pixels == (0, 128, 0)).all()


def refused_by(use, data):
    try:
        use(data)
    except BadSample:
        return True
    return False


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("least", [128, 8])
def test_every_truncation_is_refused_as_the_exact_way_does(options, least):
    data = saved(photo(128, 96), "JPEG", quality=90, **options)
    assert Encoded(data).at_least(least, 1)[1] == (1 if least == 128 else 3 / 8)
    for length in range(0, len(data), 7):
        cut = data[:length]
        assert refused_by(lambda d: Encoded(d).at_least(least, 1), cut) == refused_by(decode, cut), length


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_corrupt_bytes_give_what_the_exact_way_gives(options):
    data = saved(photo(64, 48), "JPEG", quality=90, **options)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        broken[int(rng.integers(2, len(data)))] = int(rng.integers(256))
        broken = bytes(broken)
        assert refused_by(lambda d: Encoded(d).at_least(64, 48), broken) == refused_by(decode, broken)
        if not refused_by(decode, broken):
            assert np.array_equal(Encoded(broken).at_least(64, 48)[0], np.asarray(decode(broken)))


def test_the_first_of_several_pictures_in_a_jpeg():
    data = saved(photo(60, 40), "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40))])
    pixels, _ = Encoded(data).at_least(60, 40)
    assert np.array_equal(pixels, np.asarray(decode(data)))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(room, "MAX_PIXELS", 1_000)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(BadSample, match="pixels exceed"):
            Encoded(saved(photo(50, 50), kind))


def test_importing_changes_nothing_and_the_first_image_settles_pillow():
    code = """
import sys, warnings
from PIL import Image

def settings():
    return Image.MAX_IMAGE_PIXELS, len(Image.ID), any("PIL" in str(module) for _, _, _, module, _ in warnings.filters)

before = settings()
from clipkit.images import decode
assert settings() == before
decode(sys.stdin.buffer.read())
most, plugins, quiet = settings()
assert most is None and plugins > 20 and quiet
"""
    subprocess.run([sys.executable, "-c", code], input=saved(photo(8, 8), "PNG"), check=True)


def test_threads_decode_alike_and_leave_the_warnings_alone():
    settle_pillow()
    data = [turned(photo(320, 240), orientation) for orientation in range(1, 9)] + [b"no image"] * 8
    filters = list(warnings.filters)

    def sizes(one):
        return None if refused_by(decode, one) else Encoded(one).at_least(100, 100)[0].shape

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sizes, data * 8)) == [sizes(one) for one in data] * 8
    assert list(warnings.filters) == filters
