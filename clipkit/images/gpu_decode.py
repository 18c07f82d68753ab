"""JPEGs decoded on the GPU by torchvision's nvJPEG, so that the loader's processes only read and draw.

The choice ``data.decode=gpu``. What nvJPEG does best waits undecoded in the batch: upright baseline JPEGs. The rest
(other formats, progressive or turned ones) has been decoded by the loader as ever, and what the GPU refuses goes back
to it. So every sample comes out, and the order of samples is that of the other choices. With a CPU as the device the
same code runs on torchvision's own decoder, which is what the tests do.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as TF

from clipkit.images.augment import Augmentation, Waiting
from clipkit.images.decoding import Encoded
from clipkit.images.preprocess import Preprocess

__all__ = ["can_wait", "decode_waiting", "is_baseline"]


def can_wait(data: bytes, source: Encoded, preprocess: Preprocess) -> bool:
    """Whether an image can be left to the GPU."""
    return source.orientation == 1 and preprocess.suits_torch(*source.size) and is_baseline(data)


def is_baseline(data: bytes) -> bool:
    """Whether bytes are a whole baseline JPEG of 1 or 3 components: its frame header says so, and its end is there."""
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-64:]:
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xC0:  # SOF0, ITU-T T.81 table B.1
            return data[at + 9] in (1, 3)
        if 0xC1 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # another kind of frame
            return False
        at += 2 + length
    return False


def decode_waiting(
    pixels: Tensor,
    waiting: Sequence[Waiting],
    preprocess: Preprocess,
    device: torch.device,
    fall_back: Callable[[Waiting], None],
) -> None:
    """Decode, crop, resize and augment what waits, and write it into its rows.

    Args:
        pixels: uint8 ``[n, 3, height, width]`` on `device`; its rows are filled in place.
        waiting: what to decode.
        preprocess: of the model.
        device: a GPU, or the CPU.
        fall_back: called for an image that the decoder refuses; fills its row in another way.
    """
    for item, image in zip(waiting, _decoded([item.data for item in waiting], device), strict=True):
        if image is None:
            fall_back(item)
        else:
            left, top, right, bottom = item.drawn.box
            small = _resized(image[:, top:bottom, left:right], preprocess)
            pixels[item.row] = _augmented(small, item.drawn)


def _decoded(encoded: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """uint8 ``[3, h, w]`` on the device for each, None for one that is refused."""
    tensors = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in encoded]
    try:
        # All at once: nvJPEG decodes a batch in parallel.
        return list(decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device))
    except RuntimeError:
        if len(tensors) == 1:
            return [None]
        return [image for data in encoded for image in _decoded([data], device)]


def _resized(image: Tensor, preprocess: Preprocess) -> Tensor:
    """What `Preprocess.__call__` gives, within a grey level, on the image's device (where it `suits_torch`)."""
    (_, height, width), (high, wide) = image.shape, preprocess.size
    across, down = preprocess.resized(width, height)
    if (across, down) != (width, height):
        size = (down, across)
        image = F.interpolate(image[None].float(), size=size, mode=preprocess.interpolation, antialias=True)[0]
        image = image.round().clamp(0, 255).to(torch.uint8)
    top, left = max(0, high - down) // 2, max(0, wide - across) // 2
    edges = (left, max(0, wide - across) - left, top, max(0, high - down) - top)
    if any(edges):
        image = F.pad(image, edges, value=preprocess.fill)
    first, start = round((image.shape[1] - high) / 2.0), round((image.shape[2] - wide) / 2.0)
    return image[:, first : first + high, start : start + wide]


def _augmented(pixels: Tensor, drawn: Augmentation) -> Tensor:
    """What `Augmentation.on_pixels` gives, within a grey level, on the pixels' device."""
    _, height, width = pixels.shape
    if drawn.shift != (0, 0):
        rows = (torch.arange(height, device=pixels.device) + drawn.shift[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=pixels.device) + drawn.shift[1]).clamp(0, width - 1)
        pixels = pixels[:, rows][:, :, columns]
    if drawn.mirrored:
        pixels = pixels.flip(2)
    if drawn.colours:
        values = pixels.float() / 255  # torchvision rounds whole numbers down at every step
        for name, amount in drawn.colours:
            values = getattr(TF, f"adjust_{name}")(values, amount)
        pixels = (values * 255 + 0.5).to(torch.uint8)
    return pixels
