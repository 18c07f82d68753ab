"""Images made smaller before they are packed: the long side to a limit, everything else as it was.

What a training run of 224 pixels reads from a 12-megapixel photo is decoding time. Equal bytes, settings and versions
of Pillow give equal bytes.
"""

import io
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageOps

from clipkit.core import BadSample
from clipkit.images.decoding import settle_pillow, to_rgb

__all__ = ["Shrunk", "shrink"]

LOSSLESS = {"PNG", "GIF", "BMP", "TIFF"}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Shrunk(NamedTuple):
    """An image's bytes as they are to be kept."""

    data: bytes
    extension: str | None
    """Of the new bytes; None where they are the given ones."""
    width: int
    """Of the image as it was given and as a person sees it, in pixels."""
    height: int


def shrink(data: bytes, max_side: int, quality: int = 95) -> Shrunk:
    """Make an image smaller whose long side is over the limit; a smaller one keeps its very bytes.

    Resampled by Lanczos' filter. EXIF orientation is applied and metadata dropped, but for the colour profile; CMYK
    becomes sRGB. JPEG and AVIF become JPEG (PNG where they are transparent); PNG, GIF, BMP and TIFF become PNG; WebP
    stays WebP, lossless where it was. Of an animation the first frame is kept.

    Args:
        data: of an image that `clipkit.images.identify` has let pass.
        max_side: pixels.
        quality: of JPEG and lossy WebP, 1 to 100.

    Raises:
        BadSample: where it cannot be decoded.
    """
    settle_pillow()
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # height and width change places
            width, height = image.size[::-1] if turned else image.size
            if max(width, height) <= max_side:
                return Shrunk(data, None, width, height)
            scale = max_side / max(width, height)
            # Of the full size: a JPEG that is decoded at half of it has rounded sides.
            target = max(1, round(width * scale)), max(1, round(height * scale))
            new, form = _smaller(image, target)
        buffer = io.BytesIO()
        new.save(buffer, **_settings(form, data, quality), icc_profile=new.info.pop("icc_profile", b""))
    except Exception as error:
        raise BadSample(f"cannot be decoded: {error}") from error
    return Shrunk(buffer.getvalue(), EXTENSIONS[form], width, height)


def _smaller(image: Image.Image, target: tuple[int, int]) -> tuple[Image.Image, str]:
    form = image.format or ""
    form = "PNG" if form in LOSSLESS else form if form == "WEBP" else "JPEG"
    # A JPEG decoder can halve a picture for nothing; twice the target leaves the filter enough to do its work.
    scale = 2 * max(target) / max(image.size)
    image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    image = _resizable(ImageOps.exif_transpose(image))
    profile = image.info.get("icc_profile")
    new = image.resize(target, Image.Resampling.LANCZOS)
    new.info = {"icc_profile": profile} if profile else {}
    return new, "PNG" if form == "JPEG" and new.mode in ("LA", "RGBA") else form


def _resizable(image: Image.Image) -> Image.Image:
    """The image in a mode that can be filtered and saved: grey, grey of 16 bit or RGB, with transparency or without."""
    if "transparency" in image.info and not image.mode.startswith("I"):
        return image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        return image
    if image.mode in ("1", "P", "PA"):
        return image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
    image = to_rgb(image)
    image.info.pop("icc_profile", None)  # it was of the other mode, and is used up
    return image


def _settings(form: str, data: bytes, quality: int) -> dict[str, Any]:
    if form == "WEBP" and _is_lossless(data):
        return {"format": form, "lossless": True, "quality": 80}  # of effort
    return {"format": form} if form == "PNG" else {"format": form, "quality": quality}


def _is_lossless(webp: bytes) -> bool:
    # RIFF: after 12 bytes chunks of a name, a size of 4 bytes and data, padded to even sizes.
    at = 12
    while at + 8 <= len(webp):
        if (name := webp[at : at + 4]) in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        # A frame of an animation holds chunks of its own after 16 bytes.
        at += 24 if name == b"ANMF" else 8 + (size := int.from_bytes(webp[at + 4 : at + 8], "little")) + size % 2
    return False
