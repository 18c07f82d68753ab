"""Random changes of training images; all randomness comes from the generator that is passed in."""

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from clipkit.config import AugmentConfig
from clipkit.preprocess import Preprocess

__all__ = ["augmented_pixels"]


def augmented_pixels(
    image: Image.Image, preprocess: Preprocess, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Crop, preprocess, then shift, mirror and recolour one image.

    Args:
        image: mode RGB, any size.
        preprocess: brings it to the model's size.
        config: what may happen.
        rng: decides what does; the same state gives the same pixels.

    Returns:
        uint8 array ``[3, height, width]``.
    """
    if config.scale != (1.0, 1.0):
        share = float(rng.uniform(*config.scale)) ** 0.5
        width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
    pixels = preprocess(image)
    if config.shift:
        pixels = _shifted(pixels, config.shift, rng)
    if config.flip and rng.random() < config.flip:
        pixels = pixels[:, :, ::-1]
    return _recoloured(np.ascontiguousarray(pixels), config, rng)


def _shifted(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    _, height, width = pixels.shape
    down, right = round(height * share), round(width * share)
    padded = np.pad(pixels, ((0, 0), (down, down), (right, right)), mode="edge")
    top, left = int(rng.integers(2 * down + 1)), int(rng.integers(2 * right + 1))
    return padded[:, top : top + height, left : left + width]


def _recoloured(pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    steps = []
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(config, name)
        if strength:
            steps.append((getattr(TF, f"adjust_{name}"), float(rng.uniform(1 - strength, 1 + strength))))
    if config.hue:
        steps.append((TF.adjust_hue, float(rng.uniform(-config.hue, config.hue))))
    grey = bool(config.grayscale) and rng.random() < config.grayscale
    if not steps and not grey:
        return pixels
    # As a Pillow image: torch would start its thread pool for a few thousand pixels.
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    for at in rng.permutation(len(steps)):
        adjust, amount = steps[at]
        image = adjust(image, amount)
    if grey:
        image = image.convert("L").convert("RGB")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
