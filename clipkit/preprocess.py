"""From image bytes to the pixels a tower sees: decoding as a person would see it, then resize and crop.

Decoding is ours because image files in the wild are stranger than the training transforms expect: palettes with
transparency, CMYK, 16-bit scans, rotated phone photos. Everything becomes upright 8-bit RGB. Resizing follows
torchvision's arithmetic on Pillow images, which is what open_clip does, so pixels agree with it exactly.
Normalising happens in the model, on the device: only uint8 travels.
"""

import io
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from clipkit.errors import BadSample

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "Preprocess", "decode", "identify", "to_rgb"]

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 200_000_000  # a 200-megapixel image takes 600 MB decoded; a bomb takes the machine

# Pillow's own bomb check warns at a limit of its own and would hide ours; ours is exact and names the file.
Image.MAX_IMAGE_PIXELS = None

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Triple = tuple[float, float, float]
Byte = Annotated[int, Field(ge=0, le=255)]


class Preprocess(BaseModel):
    """How a model wants its images; part of the model and of its fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (224, 224)
    """Height and width in pixels; a single number means both."""
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    """shortest: short side to size, centre crop; longest: long side to size, pad; squash: ignore the aspect."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: Triple = OPENAI_MEAN
    std: Triple = OPENAI_STD
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """The RGB colour that transparency is laid over."""
    fill: Byte = 0
    """The grey level of the padding in resize mode `longest`."""

    @field_validator("size", mode="before")
    @classmethod
    def _both_sides(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize and crop one RGB image.

        Args:
            image: any size, mode RGB (see `to_rgb`).

        Returns:
            uint8 array ``[3, height, width]``.
        """
        height, width = self.size
        resample = RESAMPLING[self.interpolation]
        if self.resize_mode == "squash":
            return _to_array(image.resize((width, height), resample))
        resized = image.resize(target, resample) if (target := self._target(image)) != image.size else image
        return _to_array(_center(resized, width, height, self.fill))

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """Width and height to resize to before the centre crop, in torchvision's and timm's arithmetic."""
        height, width = self.size
        ratios = image.height / height, image.width / width
        if self.resize_mode == "shortest" and height == width:
            # torchvision's Resize(int) truncates the long side; the other forms round both.
            short = min(image.size)
            target = (height * image.width // short, height * image.height // short)
        else:
            ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
            target = (round(image.width / ratio), round(image.height / ratio))
        return max(1, target[0]), max(1, target[1])


def _center(image: Image.Image, width: int, height: int, fill: int) -> Image.Image:
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _to_array(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _open(data: bytes | Path) -> Image.Image:
    try:
        if isinstance(data, Path):
            data = data.read_bytes()
        if not data:
            raise BadSample("the file is empty (0 bytes)")
        image = Image.open(io.BytesIO(data))
    except BadSample:
        raise
    except UnidentifiedImageError:
        head = bytes(data[:12]) if isinstance(data, bytes) else b""
        raise BadSample(f"not an image that Pillow knows (it begins with {head!r})") from None
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # Format plugins raise whatever their libraries do (RuntimeError, struct.error, ...); none may stop a job.
        raise BadSample(f"broken header: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS:,}")
    return image


def identify(data: bytes | Path) -> tuple[str, int, int]:
    """Format, width and height from the header alone, which costs microseconds and decodes nothing.

    Raises:
        BadSample: where there is no image header, the file is empty or missing, or the image is too large.
    """
    with _open(data) as image:
        return image.format or "", image.width, image.height


def decode(data: bytes | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode to upright 8-bit RGB (the first frame of an animation).

    Raises:
        BadSample: where the data is empty, truncated, no image, or larger than `MAX_PIXELS`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata that does not touch the pixels
        image = _open(data)
        try:
            image.load()
            return to_rgb(image, background)
        except BadSample:
            raise
        except Exception as error:
            raise BadSample(f"cannot be decoded: {error}") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Any Pillow image as the RGB a person would see: upright, transparency over `background`.

    16-bit grey is scaled, not clipped; CMYK goes through its embedded colour profile where it has one.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        with_profile = _through_profile(image)
        if with_profile is not None:
            return with_profile
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        # Floating TIFFs say nothing of their range; 0..1 and 0..255 are what writers use.
        top = 1.0 if values.size and np.nanmax(values) <= 1.0 else 255.0
    else:
        # Pillow opens 16-bit grey PNGs as I;16 or, with some encodings, as I; a plain 8-bit I stays below 256.
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    scaled = np.clip(np.nan_to_num(values) * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)
    grey = Image.fromarray(scaled)
    if "transparency" in image.info and isinstance(image.info["transparency"], int):
        hidden = values == image.info["transparency"]
        grey.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return grey


def _through_profile(image: Image.Image) -> Image.Image | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None  # a broken profile: the plain conversion is what viewers fall back to
