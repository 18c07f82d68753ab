"""What a tower is shown: whichever way it is decoded, the same pictures, nearly the same pixels, the same losses."""

import numpy as np
import pytest
import torch

from clipkit.core import BadSample
from clipkit.data.sources import open_source
from clipkit.embedding import EncodeOptions, embed_source, loading
from clipkit.images import Preprocess, decoded, model_input, shown
from tests.images.test_gpu_decode import broken_inside
from tests.samples import encoded, photo

CPU = torch.device("cpu")
# torchvision announces that its decoders will move to TorchCodec; until they do they are nvJPEG's way in.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
WHOLE = encoded(photo(2, 640, 480), quality=90)
FILES = {
    "large.jpg": encoded(photo(0, 1500, 1100), quality=90),
    "middle.jpg": WHOLE,
    "progressive.jpg": encoded(photo(3, 900, 700), progressive=True),
    "small.jpg": encoded(photo(4, 20, 30)),
    "strip.jpg": encoded(photo(5, 3000, 4)),
    "grey.jpg": encoded(photo(6).convert("L")),
    "flat.png": encoded(photo(7), "PNG"),
    "empty.jpg": b"",
    "broken.jpg": broken_inside(WHOLE),  # whole to who looks at both ends only
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("decoding", ["fast", "gpu"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_are_nearly_the_exact_ones(decoding, mode):
    preprocess = Preprocess(size=48, resize_mode=mode)
    names = [name for name in FILES if name not in ("empty.jpg", "broken.jpg")]
    items = [shown(FILES[name], preprocess, decoding) for name in names]
    for name, found in zip(names, decoded(items, preprocess, CPU), strict=True):
        exact = shown(FILES[name], preprocess, "exact")
        found = np.asarray(found)
        assert found.dtype == np.uint8
        assert found.shape == exact.shape
        assert np.abs(found.astype(int) - exact).mean() < 2, name


def test_what_the_gpu_refuses_is_decoded_here_or_told_and_spoils_nothing_else(monkeypatch):
    preprocess, names = Preprocess(size=48), ("middle.jpg", "grey.jpg", "large.jpg")
    items = [shown(FILES[name], preprocess, "gpu") for name in names]
    items[1:] = [item._replace(data=broken_inside(item.data)) for item in items[1:]]
    fast = model_input._fast

    def fails_for_the_last(source, preprocess):
        if source.size == (1500, 1100):
            raise BadSample("not even here")
        return fast(source, preprocess)

    monkeypatch.setattr(model_input, "_fast", fails_for_the_last)
    *good, bad = decoded(items, preprocess, CPU)
    assert isinstance(bad, BadSample)
    for found, name in zip(good, names, strict=False):
        exact = shown(FILES[name], preprocess, "exact")
        assert np.abs(np.asarray(found).astype(int) - exact).mean() < 2


def test_what_cannot_be_decoded_in_a_batch_goes_to_the_ledger(files, model, monkeypatch):
    monkeypatch.setattr(loading, "decoded", lambda *args: [*decoded(*args)[:-1], BadSample("refused")])
    found = embed_source(open_source(files), model, EncodeOptions(decoding="gpu", batch_size=4), show=None)
    refused = [line["key"] for line in found.left_out if line["reason"] == "refused"]
    assert len(refused) == 3  # the last of each batch of 4, 4 and 1
    assert len(found.image) == len(found.rows) == len(FILES) - len(found.left_out)


@pytest.mark.parametrize("decoding", ["fast", "gpu"])
def test_the_same_rows_and_losses_whichever_way(files, model, decoding):
    exact = embed_source(open_source(files), model, EncodeOptions(batch_size=2), show=None)
    other = embed_source(open_source(files), model, EncodeOptions(batch_size=2, decoding=decoding), show=None)
    assert other.rows == exact.rows
    assert [line["key"] for line in other.left_out] == ["broken.jpg", "empty.jpg"]
    assert [line["key"] for line in exact.left_out] == ["broken.jpg", "empty.jpg"]
    assert (exact.image * other.image).sum(1).min() > 0.99
