"""Random changes of training images: first drawn, from the image's size alone, then done.

All randomness comes from the generator that is passed in, and the draws do not depend on how the image is decoded.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from clipkit.core import Settings, Share
from clipkit.images.decoding import Encoded
from clipkit.images.preprocess import Preprocess

__all__ = ["AugmentConfig", "Augmentation", "Waiting", "augmented_pixels", "crop_pixels"]

# How far above the wanted size a JPEG is decoded. At 1 the reduced decoding is all the smoothing there is, and photos
# of 1 megapixel come out 1.3 grey levels away from the exact path; at 1.25 it is 0.5; at 2 it is 0.2, a third slower.
DECODE_MARGIN = 1.25
LUMA = tuple(np.float32(share) for share in (0.299, 0.587, 0.114))  # ITU-R BT.601, as Pillow and torchvision have it


class AugmentConfig(Settings):
    """Random changes of training images, each a function of (seed, position) alone."""

    shift: Share = 0.0
    """Largest shift in each direction, as a share of the side; the border is repeated."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Share of the image's area that a random crop keeps (torchvision's RandomResizedCrop, aspect kept)."""
    flip: Share = 0.0
    """Chance of a horizontal mirror image."""
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Strengths of torchvision's ColorJitter."""
    grayscale: Share = 0.0
    """Chance of losing the colours."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError("scale must be two shares of the area in order, such as [0.9, 1.0]")
        return self


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is to happen to one image."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom of the crop, in pixels of the upright image at its full size."""
    shift: tuple[int, int] = (0, 0)
    """Pixels of the model's input that the view moves down and right; the border is repeated."""
    mirrored: bool = False
    colours: tuple[tuple[str, float], ...] = ()
    """Steps in order: brightness, contrast or saturation with its factor, hue with its share of a turn."""

    @classmethod
    def draw(
        cls, width: int, height: int, size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
    ) -> "Augmentation":
        """Draw for an upright image of `width` x `height` pixels and a model's input of `size` (height, width)."""
        box = (0, 0, width, height)
        if config.scale != (1.0, 1.0):
            share = float(rng.uniform(*config.scale)) ** 0.5
            across, down = max(1, round(width * share)), max(1, round(height * share))
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            if min(across, down) >= max(64, 2 * DECODE_MARGIN * max(size)):
                # A JPEG is decoded at 1/2 or less: along its blocks of 8 pixels the crop is exact there too. Off them
                # it would be up to half a pixel of the model's input away.
                left, top, across, down = (side - side % 8 for side in (left, top, across, down))
            box = (left, top, left + across, top + down)
        shift = (0, 0)
        if config.shift:
            most = [round(side * config.shift) for side in size]
            shift = (int(rng.integers(-most[0], most[0] + 1)), int(rng.integers(-most[1], most[1] + 1)))
        mirrored = bool(config.flip) and rng.random() < config.flip
        colours = []
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(config, name):
                colours.append((name, float(rng.uniform(1 - strength, 1 + strength))))
        if config.hue:
            colours.append(("hue", float(rng.uniform(-config.hue, config.hue))))
        grey = bool(config.grayscale) and rng.random() < config.grayscale
        ordered = [colours[at] for at in rng.permutation(len(colours))] if colours else []
        return cls(box, shift, mirrored, (*ordered, *([("saturation", 0.0)] if grey else [])))

    def on_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Shift, mirror and recolour what was cropped and preprocessed, uint8 ``[3, height, width]``."""
        if self.shift != (0, 0) or self.mirrored:
            _, height, width = pixels.shape
            rows = np.clip(np.arange(height) + self.shift[0], 0, height - 1)
            columns = np.clip(np.arange(width) + self.shift[1], 0, width - 1)
            pixels = pixels.take(rows, axis=1).take(columns[::-1] if self.mirrored else columns, axis=2)
        return _recoloured(pixels, self.colours) if self.colours else pixels


class Waiting(NamedTuple):
    """An image of a batch that is not decoded yet."""

    row: int  # of the batch
    position: int  # in the sequence of samples
    reference: Any  # to the sample, as the training data gave it
    data: bytes = b""
    drawn: Augmentation = Augmentation((0, 0, 0, 0))


def augmented_pixels(
    data: bytes | Path | Encoded | Image.Image,
    preprocess: Preprocess,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    exact: bool = False,
) -> np.ndarray:
    """Decode, crop, preprocess, then shift, mirror and recolour one image.

    A large JPEG is decoded to little more than the crop needs, and the crop comes before the resize. Photos that
    are decoded in full come out 0.01 grey levels away from the exact path in the mean, reduced ones 0.5. Call it from
    as many threads as there are cores: the heavy parts release the GIL, and none starts threads of its own.

    Args:
        data: the image's bytes or its file, its header read or not, or an upright RGB image of any size.
        preprocess: brings it to the model's size.
        config: what may happen.
        rng: decides what does; the same state decides the same, exact or not.
        exact: decode in full and resize as `Preprocess.__call__` does, 2 to 8 times as slow.

    Returns:
        uint8 array ``[3, height, width]``.

    Raises:
        BadSample: where the data cannot be decoded (see `clipkit.images.decode`).
    """
    source = data if isinstance(data, Image.Image | Encoded) else Encoded(data, preprocess.background)
    width, height = source.size
    drawn = Augmentation.draw(width, height, preprocess.size, config, rng)
    if exact:
        image = source if isinstance(source, Image.Image) else source.decode()
        return drawn.on_pixels(preprocess(image.crop(drawn.box) if drawn.box != (0, 0, width, height) else image))
    return drawn.on_pixels(crop_pixels(source, preprocess, drawn.box))


def crop_pixels(source: Image.Image | Encoded, preprocess: Preprocess, box: tuple[int, int, int, int]) -> np.ndarray:
    """A crop of an image, or all of it, as a model wants it, decoded to little more than that needs.

    Args:
        source: upright.
        preprocess: of the model.
        box: left, top, right and bottom, in pixels of the image at its full size.

    Returns:
        uint8 array ``[3, height, width]``.

    Raises:
        BadSample: where the data cannot be decoded (see `clipkit.images.decode`).
    """
    (width, height), (left, top, right, bottom) = source.size, box
    across, down = right - left, bottom - top
    if isinstance(source, Image.Image):
        pixels, scale = np.asarray(source), 1.0
    else:
        wide, high = preprocess.resized(across, down)
        pixels, scale = source.at_least(DECODE_MARGIN * wide * width / across, DECODE_MARGIN * high * height / down)
    rows, columns = _scaled(top, down, scale, pixels.shape[0]), _scaled(left, across, scale, pixels.shape[1])
    return preprocess.fast(pixels[rows, columns], (across, down), scale)


def _scaled(start: int, count: int, scale: float, length: int) -> slice:
    first = min(round(start * scale), length - 1)
    return slice(first, min(first + max(1, ceil(count * scale)), length))


def _recoloured(pixels: np.ndarray, steps: tuple[tuple[str, float], ...]) -> np.ndarray:
    """torchvision's ColorJitter steps in floats, rounded once: three times as fast as on Pillow images for the hue."""
    values = pixels.astype(np.float32)
    for name, amount in steps:
        if name == "hue":
            values = _turned(values, amount)
            continue
        other = np.float32(0)
        if name != "brightness":
            other = values[0] * LUMA[0] + values[1] * LUMA[1] + values[2] * LUMA[2]
        if name == "contrast":
            other = np.round(other.mean())
        values -= other
        values *= np.float32(amount)
        values += other
        np.clip(values, 0, 255, out=values)
    return (values + np.float32(0.5)).astype(np.uint8)


def _turned(values: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by a share of the colour circle, 0-255 floats ``[3, h, w]``; the value and the chroma stay.

    A channel is ``top - span * clip(min(k, 4 - k), 0, 1)`` with ``k = (n + hue) mod 6`` and n = 5, 3, 1 for red, green
    and blue (Smith 1978, in the closed form that Wikipedia's "HSL and HSV" gives).
    """
    red, green, blue = values
    top = values.max(axis=0)
    span = top - values.min(axis=0)
    is_red, is_green = top == red, top == green
    hue = np.where(is_red, green - blue, np.where(is_green, blue - red, red - green))
    hue /= np.maximum(span, np.float32(1e-6))
    hue += np.where(is_red, np.float32(0), np.where(is_green, np.float32(2), np.float32(4)))
    hue += np.float32(6 * turn + 6)  # above zero from here on
    turned = np.empty_like(values)
    for channel, offset in zip(turned, (5, 3, 1), strict=True):
        k = hue + np.float32(offset)
        k -= 6 * np.floor(k * np.float32(1 / 6))  # np.mod takes four times as long
        np.minimum(k, 4 - k, out=k)
        np.clip(k, 0, 1, out=k)
        k *= span
        np.subtract(top, k, out=channel)
    return turned
