"""What a tower is shown of an image that is embedded: all of it, decoded to little more than is needed, or exactly.

A photo of 12 megapixels is decoded at 1/4 or 1/8 by its JPEG's own transform and only then resized, which takes a fifth
of the time; the vectors that come of it lie at a cosine of 0.999 to the exact ones. `clipkit.images.augment` does the
same for training.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clipkit.core import BadSample
from clipkit.images.augment import Augmentation, Waiting, crop_pixels
from clipkit.images.decoding import Decoding, Encoded
from clipkit.images.preprocess import Preprocess

__all__ = ["Shown", "decoded", "shown"]

Shown = np.ndarray | Tensor | Waiting
"""uint8 ``[3, height, width]``, or what the GPU is still to decode."""


def shown(data: bytes, preprocess: Preprocess, decoding: Decoding) -> Shown:
    """The pixels of an image.

    Args:
        data: the bytes of its file.
        preprocess: of the model.
        decoding: ``exact``: open_clip's pixels; ``fast``: large JPEGs are decoded at a reduced size, and resized by
            torch; ``gpu``: upright baseline JPEGs wait for `decoded`, everything else as under ``fast``.

    Raises:
        BadSample: where it cannot be decoded.
    """
    source = Encoded(data, preprocess.background)
    width, height = source.size
    if decoding == "exact":
        return preprocess(source.decode())
    if decoding == "gpu":
        from clipkit.images.gpu_decode import (
            can_wait,  # torchvision takes a second, and is needed for nothing else here
        )

        if can_wait(source.data, source, preprocess):
            return Waiting(0, 0, source, source.data, Augmentation((0, 0, width, height)))
    return _fast(source, preprocess)


def _fast(source: Encoded, preprocess: Preprocess) -> np.ndarray:
    width, height = source.size
    return crop_pixels(source, preprocess, (0, 0, width, height))


def decoded(
    items: Sequence[Shown | None], preprocess: Preprocess, device: torch.device
) -> list[Shown | BadSample | None]:
    """Decode together, on the device, what waits for that; what it refuses is decoded here.

    Args:
        items: of a batch, as `shown` gives them; None where there is nothing to be shown.
        preprocess: of the model.
        device: a GPU, or the CPU.

    Returns:
        The items with pixels in place of what waited, or the reason why one cannot be decoded.
    """
    results: list[Shown | BadSample | None] = list(items)
    waiting = [(row, item) for row, item in enumerate(items) if isinstance(item, Waiting)]
    if not waiting:
        return results
    from clipkit.images.gpu_decode import decode_waiting

    pixels = torch.empty((len(waiting), 3, *preprocess.size), dtype=torch.uint8, device=device)
    refused: dict[int, np.ndarray | BadSample] = {}

    def fall_back(item: Waiting) -> None:
        try:
            refused[item.row] = _fast(item.reference, preprocess)
        except BadSample as error:
            refused[item.row] = error

    decode_waiting(
        pixels, [item._replace(row=at) for at, (_, item) in enumerate(waiting)], preprocess, device, fall_back
    )
    for at, (row, _) in enumerate(waiting):
        results[row] = refused.get(at, pixels[at])
    return results
