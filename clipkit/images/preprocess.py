"""From an upright RGB image to the pixels a tower sees: resize and crop.

Resizing follows torchvision's arithmetic on Pillow images, which is what open_clip does, so pixels agree with it
exactly. Normalising happens in the model, on the device: only uint8 travels.
"""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch.nn.functional import interpolate

__all__ = ["Preprocess"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

RESIZED_AREA_LIMIT = 64  # how many times the area that is kept may be resized

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
            image: any size, mode RGB (see `clipkit.images.to_rgb`).

        Returns:
            uint8 array ``[3, height, width]``.
        """
        width, height = self.resized(image.width, image.height)
        resample = RESAMPLING[self.interpolation]
        if width * height > RESIZED_AREA_LIMIT * self.size[0] * self.size[1]:
            # A picture of 1 x 65,000 pixels would become one of 10 GB, of which a square is kept. Within 2 grey levels
            # of resizing it all, as Pillow rounds the borders.
            image = image.resize((self.size[1], self.size[0]), resample, box=self.seen(*image.size))
        elif (width, height) != image.size:
            image = image.resize((width, height), resample)
        return self._centred(np.asarray(image))

    def fast(self, pixels: np.ndarray, full: tuple[int, int] | None = None, scale: float = 1.0) -> np.ndarray:
        """What `__call__` gives, in a quarter of its time, for an array: torch's resize uses AVX2, Pillow's does not.

        Away from `__call__` by 0.01 grey levels in the mean. Safe in threads, and starts none on x86-64.

        Args:
            pixels: uint8 ``[height, width, 3]``.
            full: width and height of the image, where `pixels` show it at a reduced size.
            scale: that size; the last row and column may then stand for a part of one.

        Returns:
            uint8 array ``[3, height, width]``.
        """
        full = full or (pixels.shape[1], pixels.shape[0])
        if not self.suits_torch(*full):
            return self(Image.fromarray(pixels))
        width, height = self.resized(*full)
        # One dense block, made by numpy: torch would make it in its thread pool.
        image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
        if (height, width) != pixels.shape[:2]:
            # By factors, not by size, to place a last row that counts in part. Torch rounds their product with the size
            # down, and must not fall below what is wanted.
            factors = [
                wanted / min(length * scale, actual) * (1 + 1e-9)
                for wanted, length, actual in zip((height, width), full[::-1], pixels.shape, strict=False)
            ]
            image = interpolate(image, scale_factor=factors, mode=self.interpolation, antialias=True)
        return self._centred(image[0].permute(1, 2, 0).numpy())

    def suits_torch(self, width: int, height: int) -> bool:
        """Whether torch can resize an image of this size: it has not all filters, and makes all of a long strip."""
        across, down = self.resized(width, height)
        fits = across * down <= RESIZED_AREA_LIMIT * self.size[0] * self.size[1]
        return fits and self.interpolation in ("bicubic", "bilinear")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image is resized to before the crop, in torchvision's and timm's arithmetic."""
        high, wide = self.size
        if self.resize_mode == "squash":
            return wide, high
        ratios = height / high, width / wide
        if self.resize_mode == "shortest" and high == wide:
            # torchvision's Resize(int) truncates the long side; the other forms round both.
            short = min(width, height)
            target = (high * width // short, high * height // short)
        else:
            ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
            target = (round(width / ratio), round(height / ratio))
        return max(1, target[0]), max(1, target[1])

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image that the tower's pixels show: left, top, right and bottom in the image's own pixels.

        It reaches beyond the image where that is padded.
        """
        high, wide = self.size
        across, down = self.resized(width, height)
        left, top = _first(across, wide), _first(down, high)
        x, y = width / across, height / down
        return left * x, top * y, (left + wide) * x, (top + high) * y

    def _centred(self, pixels: np.ndarray) -> np.ndarray:
        """The centre of ``[h, w, 3]``, padded where it is too small, as ``[3, height, width]``."""
        (height, width), (high, wide) = pixels.shape[:2], self.size
        if height < high or width < wide:
            canvas = np.full((max(high, height), max(wide, width), 3), self.fill, np.uint8)
            top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
            canvas[top : top + height, left : left + width] = pixels
            pixels = canvas
        top, left = _middle(pixels.shape[0], high), _middle(pixels.shape[1], wide)
        return np.ascontiguousarray(pixels[top : top + high, left : left + wide].transpose(2, 0, 1))


def _middle(length: int, kept: int) -> int:
    return round((length - kept) / 2.0)


def _first(length: int, kept: int) -> int:
    """Where the pixels that are kept begin; below 0 where there are too few, and padding comes first."""
    return _middle(length, kept) if length >= kept else -((kept - length) // 2)
