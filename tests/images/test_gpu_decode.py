"""The GPU's way of decoding, on the CPU: the same code, with torchvision's own decoder in nvJPEG's place."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.shards import write_shard
from clipkit.images import (
    Augmentation,
    AugmentConfig,
    Encoded,
    Preprocess,
    Waiting,
    augmented_pixels,
    can_wait,
    decode_waiting,
)
from clipkit.images.gpu_decode import is_baseline
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.settings import DataConfig
from tests.samples import fake_tokens

CPU = torch.device("cpu")
# torchvision announces that its decoders will move to TorchCodec; until they do they are nvJPEG's way in.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


def photo(seed, width=120, height=90):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **{"quality": 95, "subsampling": 0, **how} if kind == "JPEG" else how)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(1), exif=exif)


OTHERS = {
    "progressive": lambda: encoded(photo(0), progressive=True),
    "turned": rotated,
    "cmyk": lambda: encoded(photo(0).convert("CMYK"), subsampling=-1),
    "png": lambda: encoded(photo(0), "PNG"),
    "cut": lambda: encoded(photo(0))[:-40],
    "strip": lambda: encoded(photo(0, 4000, 2)),
}


def test_upright_baseline_jpegs_wait_and_nothing_else():
    preprocess = Preprocess(size=32)
    for image in (photo(0), photo(0).convert("L")):
        data = encoded(image)
        assert can_wait(data, Encoded(data), preprocess)
    for name, make in OTHERS.items():
        data = make()
        try:
            source = Encoded(data)
        except Exception:
            assert name == "cut"
            continue
        assert not can_wait(data, source, preprocess), name
    assert not is_baseline(b"")
    assert not is_baseline(b"\xff\xd8\xff\xd9")
    data = encoded(photo(0))
    assert not can_wait(data, Encoded(data), Preprocess(size=32, interpolation="lanczos"))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (150, 140)])
@pytest.mark.parametrize("colours", [False, True])
def test_the_pixels_are_those_of_the_exact_path(mode, size, colours):
    preprocess = Preprocess(size=size, resize_mode=mode, fill=7)
    augment = AugmentConfig(scale=(0.5, 1.0), shift=0.1, flip=0.5)
    if colours:
        augment = augment.model_copy(update={"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1})
    for seed in range(4):
        data = encoded(photo(seed, 121 + seed, 90))
        exact = augmented_pixels(data, preprocess, augment, np.random.default_rng(seed), exact=True)
        width, height = Encoded(data).size
        drawn = Augmentation.draw(width, height, preprocess.size, augment, np.random.default_rng(seed))
        pixels = torch.zeros((2, 3, *size), dtype=torch.uint8)
        decode_waiting(pixels, [Waiting(1, 0, None, data, drawn)], preprocess, CPU, lambda _: None)
        assert not pixels[0].any()
        far = np.abs(pixels[1].numpy().astype(int) - exact)
        assert far.mean() < 0.8
        assert np.percentile(far, 99) <= 4


def broken_inside(data):
    """A baseline JPEG with a whole header and end whose middle is rubbish that no decoder takes."""
    at = data.index(b"\xff\xc4")  # the Huffman tables
    return data[: at + 5] + b"\xff" * 40 + data[at + 45 :]


@pytest.fixture
def mixed(tmp_path):
    samples = [(f"k{i:02d}", {"jpg": encoded(photo(i)), "txt": f"picture {i}".encode()}) for i in range(20)]
    samples += [(name, {"jpg": make(), "txt": b"other"}) for name, make in OTHERS.items()]
    samples.append(("rubbish", {"jpg": broken_inside(encoded(photo(3))), "txt": b"bad"}))
    write_shard(tmp_path / "0.tar", samples)
    return tmp_path


def run(spec, decode, workers=0):
    config = DataConfig(train=str(spec), workers=workers, decode=decode, augment=AugmentConfig(scale=(0.6, 1.0)))
    made = Batches(open_train_data(config, 0), Preprocess(size=32), fake_tokens, config, 0)
    found = []
    for batch in train_batches(made, first_step=0, steps=9, batch_size=9):
        pixels = made.on_device(batch, CPU)
        found.append((pixels.clone(), batch))
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_every_sample_comes_out_in_the_same_order_and_what_is_refused_is_replaced_alike(mixed, workers):
    waited = 0
    for (exact, a), (pixels, b) in zip(run(mixed, "exact"), run(mixed, "gpu", workers), strict=True):
        for name in ("image_ids", "text_ids", "tokens"):
            assert torch.equal(a[name], b[name]), name
        key = lambda line: (line["position"], line["key"])  # noqa: E731
        assert sorted(map(key, a["left_out"])) == sorted(map(key, b["left_out"]))
        assert (pixels.float() - exact.float()).abs().mean() < 1.5
        waited += len(b["waiting"])
        assert not a["waiting"]
    assert waited > 40


def test_one_that_is_refused_does_not_spoil_the_others():
    good, bad = encoded(photo(0)), broken_inside(encoded(photo(1)))
    box = Augmentation((0, 0, 120, 90))
    pixels, refused = torch.zeros((3, 3, 32, 32), dtype=torch.uint8), []
    waiting = [Waiting(row, 0, None, data, box) for row, data in enumerate((good, bad, good))]
    decode_waiting(pixels, waiting, Preprocess(size=32), CPU, refused.append)
    assert [item.row for item in refused] == [1]
    assert torch.equal(pixels[0], pixels[2])
    assert pixels[0].any()
