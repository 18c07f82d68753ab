"""Images made smaller: the same picture, upright, in the right colours, in the format it had."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from clipkit.core import BadSample
from clipkit.images import decode, shrink


def picture(width=200, height=101) -> Image.Image:
    """Smooth colours, each corner another."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 255 - x * 200 // width], -1).astype(np.uint8))


def encoded(image: Image.Image, form: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def twin(data: bytes, side: int) -> np.ndarray:
    """The slow way: decode the whole picture as a person sees it, then filter."""
    image = decode(data)
    return np.asarray(ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS), np.float64)


def difference(data: bytes, small: bytes, side: int) -> float:
    got, wanted = np.asarray(decode(small), np.float64), twin(data, side)
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).mean())


FORMS = {
    "jpeg": ("JPEG", "RGB", {"quality": 95}, "jpg"),
    "grey jpeg": ("JPEG", "L", {"quality": 95}, "jpg"),
    "png": ("PNG", "RGB", {}, "png"),
    "png with alpha": ("PNG", "RGBA", {}, "png"),
    "grey png": ("PNG", "L", {}, "png"),
    "bmp": ("BMP", "RGB", {}, "png"),
    "tiff": ("TIFF", "RGB", {}, "png"),
    "lossy webp": ("WEBP", "RGB", {"quality": 95}, "webp"),
    "lossless webp": ("WEBP", "RGBA", {"lossless": True}, "webp"),
    "cmyk jpeg": ("JPEG", "CMYK", {"quality": 95}, "jpg"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("side", [199, 96, 31])
def test_it_is_the_same_picture(name, side):
    form, mode, how, extension = FORMS[name]
    data = encoded(picture().convert(mode), form, **how)
    small = shrink(data, side)
    assert (small.width, small.height, small.extension) == (200, 101, extension)
    assert max(Image.open(io.BytesIO(small.data)).size) == side
    assert difference(data, small.data, side) < (2.5 if extension == "jpg" or name == "lossy webp" else 0.6)
    assert small == shrink(data, side)
    again = shrink(small.data, side)
    assert again.data == small.data
    assert again.extension is None


def test_what_is_small_enough_keeps_its_bytes():
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encoded(picture(), form)
        assert shrink(data, 200) == (data, None, 200, 101)


def test_draft_decoding_costs_no_sharpness():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (75, 100), np.uint8)).resize((800, 600), Image.Resampling.BICUBIC)
    data = encoded(noise, "JPEG", quality=95)
    assert difference(data, shrink(data, 90).data, 90) < 3.0


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "JPEG", exif=exif, quality=95)
    small = shrink(data, 50)
    assert (small.width, small.height) == (101, 200)
    image = Image.open(io.BytesIO(small.data))
    assert image.size == (25, 50)
    assert 0x0112 not in image.getexif()
    assert difference(data, small.data, 50) < 2.5
    assert shrink(data, 200) == (data, None, 101, 200)


def test_the_colour_profile_is_kept():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form in ("JPEG", "PNG", "WEBP"):
        small = shrink(encoded(picture(), form, icc_profile=profile), 50)
        assert Image.open(io.BytesIO(small.data)).info["icc_profile"] == profile
    cmyk = shrink(encoded(picture().convert("CMYK"), "JPEG", icc_profile=b"not a profile"), 50)
    assert "icc_profile" not in Image.open(io.BytesIO(cmyk.data)).info


def test_transparency_palettes_and_depth():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    small = Image.open(io.BytesIO(shrink(encoded(image, "PNG"), 50).data))
    assert small.mode == "RGBA"
    assert small.getpixel((0, 0))[3] < small.getpixel((0, small.height - 1))[3]

    palette = picture().quantize(64)
    assert Image.open(io.BytesIO(shrink(encoded(palette, "PNG"), 50).data)).mode == "RGB"
    data = encoded(palette, "PNG", transparency=0)
    assert Image.open(io.BytesIO(shrink(data, 50).data)).mode == "RGBA"
    assert difference(data, shrink(data, 50).data, 50) < 4
    data = encoded(picture(), "PNG", transparency=(0, 0, 255))
    assert Image.open(io.BytesIO(shrink(data, 50).data)).mode == "RGBA"

    bits = Image.open(io.BytesIO(shrink(encoded(picture().convert("1"), "PNG"), 50).data))
    assert bits.mode == "L"
    assert len(set(bits.getdata() if not hasattr(bits, "get_flattened_data") else bits.get_flattened_data())) > 10

    deep = np.linspace(0, 65535, 200 * 100).reshape(100, 200).astype(np.uint16)
    small = np.asarray(Image.open(io.BytesIO(shrink(encoded(Image.fromarray(deep), "PNG"), 50).data)))
    assert small.dtype == np.uint16
    assert abs(int(small[12, 25]) - int(deep[50, 100])) < 1500


def test_webp_stays_what_it_was():
    flat = Image.new("RGB", (100, 60), (200, 30, 90))
    kept = Image.open(io.BytesIO(shrink(encoded(flat, "WEBP", lossless=True), 50).data))
    assert set(kept.convert("RGB").tobytes()[:3]) == {200, 30, 90}
    for how in ({"lossless": True}, {"quality": 80}):
        for more in ({}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}):
            data = encoded(picture(), "WEBP", **how, **more)
            lossless = b"VP8L" in shrink(data, 50).data[:20]
            assert lossless == ("lossless" in how)
    frames = [picture(), ImageOps.mirror(picture())]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert b"VP8L" in shrink(data, 50).data[:20]
    assert difference(data, shrink(data, 50).data, 50) < 0.6


def test_one_pixel_is_left_of_a_thread():
    assert Image.open(io.BytesIO(shrink(encoded(Image.new("RGB", (500, 1)), "PNG"), 20).data)).size == (20, 1)


def test_what_cannot_be_decoded_is_said():
    for form in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(BadSample, match="cannot be decoded"):
            shrink(encoded(picture(), form)[:-400], 50)
