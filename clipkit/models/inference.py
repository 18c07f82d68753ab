"""How towers run fastest where nothing is learned: in what precision, in what batches, and compiled or not."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from clipkit.core import Side, settled_precision, warn
from clipkit.models.dual_encoder import GRAIN, DualEncoder

__all__ = ["cast_for_inference", "compiled_image_tower", "compiling_pays", "evaluating", "find_batch_size"]

# Compiling a ViT-B/32 takes 10 s on two cores and saves a seventh of 16 ms per image, so it pays from 5,000 on.
WORTH_COMPILING = 10_000
CPU_BATCH = 32  # what is decoded ahead, and kept together

ImageTower = Callable[[torch.Tensor], torch.Tensor]  # pixels to embeddings, as `DualEncoder.encode_image`


def cast_for_inference(model: DualEncoder, precision: str) -> DualEncoder:
    """Weights in bfloat16 (cast once: autocast would do so at every call) or float32, in evaluation mode.

    Args:
        model: changed in place.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device multiplies it fast.
    """
    model.backbone.to(torch.bfloat16 if settled_precision(precision, model.device) == "bf16" else torch.float32)
    return model.eval()


def find_batch_size(model: DualEncoder, sides: Sequence[Side], samples: int) -> int:
    """The least batch, a power of two, beyond which a tower gains less than 3 % or its memory ends.

    On a CPU blocks are small whatever the batch, see `DualEncoder.image_block`, so nothing is tried.

    Args:
        model: in the precision that is wanted.
        sides: the image tower is asked where images are embedded, else the text tower.
        samples: how many are to be embedded; for few the usual size is taken, as trying takes seconds.
    """
    if model.device.type == "cpu":
        return CPU_BATCH
    first, usual, most = (64, 256, 4096) if model.device.type == "cuda" else (16, 32, 128)
    if samples < 400 * most:
        return usual
    best, speed = 0, 0.0
    size = first
    while size <= most:
        try:
            tried = _speed(model, sides, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if tried > 1.03 * speed:
            best, speed = size, tried
        elif tried < 0.9 * speed:
            break
        size *= 2
    return best or first


def compiling_pays(model: DualEncoder, sides: Sequence[Side], batch_size: int, samples: int) -> bool:
    """Whether a `compiled_image_tower` is faster by 3 % or more; for few samples it is not tried.

    Args:
        model: in the precision that is wanted.
        sides: that are embedded.
        batch_size: images at a time.
        samples: how many are to be embedded.
    """
    if "image" not in sides or samples < WORTH_COMPILING:
        return False
    block = model.image_block(batch_size)
    plain = _speed(model, sides, block)
    try:
        return _speed(model, sides, block, compiled_image_tower(model, block)) > 1.03 * plain
    except RuntimeError as error:  # no compiler on this machine, or a tower that cannot be compiled
        warn(f"the image tower is not compiled ({str(error).strip().splitlines()[0]}); --no-compile does not try")
        return False


def _speed(model: DualEncoder, sides: Sequence[Side], size: int, encode_image: ImageTower | None = None) -> float:
    """Samples a second, the best of three batches after one that does not count; with the model's own image tower
    where no other is given.
    """
    encode = (encode_image or model.encode_image) if "image" in sides else model.encode_text
    high, wide = model.preprocess.size
    pixels = torch.randint(256, (size, 3, high, wide), dtype=torch.uint8)
    tokens = model.trim(model.tokenize(["a picture of nothing in particular"] * size), GRAIN)
    spent = []
    with torch.inference_mode(), evaluating(model):
        for _ in range(4):
            began = time.perf_counter()
            encode((pixels if "image" in sides else tokens).to(model.device)).cpu()
            spent.append(time.perf_counter() - began)
    return size / min(spent[1:])


def compiled_image_tower(model: DualEncoder, height: int) -> ImageTower:
    """`DualEncoder.encode_image` compiled (`torch.compile`) for blocks of one height; others go through it as ever.

    Weights are frozen into what is compiled, and on a CPU packed once and not for every batch. It takes 10 s on two
    cores for a ViT-B/32, at the first block, and makes that a sixth faster. To be called in inference mode.
    """
    plain = model.encode_image
    fast = torch.compile(plain, dynamic=False, options={"freezing": True})

    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        return fast(pixels) if len(pixels) == height else plain(pixels)

    return encode_image


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in, which differs among towers."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
