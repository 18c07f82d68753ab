"""How towers run where nothing is learned: other precisions, batches and compilers give nearly the same vectors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipkit.data.sources import open_source
from clipkit.embedding import Embeddings, embed_source
from clipkit.embedding import pipeline as embedding
from clipkit.models import DualEncoder, cast_for_inference, compiling_pays, find_batch_size, inference, load_model
from clipkit.storage import read_manifest


def test_bf16_is_close_to_fp32(pictures, model_dir):
    source = open_source(pictures)
    exact = embed_source(source, cast_for_inference(load_model(model_dir), "fp32"), show=None)
    rough = embed_source(source, cast_for_inference(load_model(model_dir), "bf16"), show=None)
    assert rough.image.dtype == np.float32
    assert (exact.image * rough.image).sum(1).min() > 0.995
    assert (exact.text * rough.text).sum(1).min() > 0.995


COMPILED = """
import sys
from clipkit.cli import main
main(["embed", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_compiled_it_is_close_to_what_it_was(pictures, model_dir, tmp_path):
    """In processes of their own: the checks of shapes that the tests put into every call cannot be compiled."""
    found = {}
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        how = ["--model", str(model_dir), "--batch-size", "20", "--precision", "fp32", "--out", str(tmp_path / name)]
        command = [sys.executable, "-c", COMPILED, str(pictures), *how, flag]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        found[name] = Embeddings.open(tmp_path / name).vectors()
    assert np.abs(found["plain"] - found["compiled"]).max() < 2e-3  # they are kept as float16


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({16: 10, 32: 20, 64: 21, 128: 21.1}, 64),
        ({16: 10, 32: 10.1, 64: 10.2, 128: 10.4}, 128),  # a little each time is something in the end
        ({16: 30, 32: 31, 64: 20, 128: 99}, 32),
        ({16: 10, 32: 20, 64: None}, 32),  # no memory
        ({16: None}, 16),
    ],
)
def test_the_batch_that_is_found_is_the_least_that_is_fast(model, monkeypatch, speeds, chosen):
    def speed(model, sides, size):
        if speeds[size] is None:
            raise torch.OutOfMemoryError
        return speeds[size]

    monkeypatch.setattr(inference, "_speed", speed)
    assert find_batch_size(model, ("image",), 10**6) == 32  # on a CPU any batch is as fast
    monkeypatch.setattr(DualEncoder, "device", torch.device("mps"))
    assert find_batch_size(model, ("image",), 10**6) == chosen
    assert find_batch_size(model, ("image",), 100) == 32  # not worth trying


def test_speed_is_measured_with_either_tower(model):
    for side in ("image", "text"):
        assert inference._speed(model, (side,), 4) > 0


@pytest.mark.parametrize(("compiled_speed", "pays"), [(12, True), (10.2, False), (None, False)])
def test_towers_are_compiled_where_that_is_faster(model, monkeypatch, recwarn, compiled_speed, pays):
    """With figures in place of clocks; that compiled towers compute the same has a test of its own."""
    plain = model.encode_image

    def speed(model, sides, size, encode_image=None):
        if encode_image is None:
            return 10
        if compiled_speed is None:
            raise RuntimeError("no compiler\nwas found")
        return compiled_speed

    monkeypatch.setattr(inference, "_speed", speed)
    assert compiling_pays(model, ("image", "text"), 32, 10**6) == pays
    assert model.encode_image == plain
    assert not compiling_pays(model, ("text",), 32, 10**6)
    assert not compiling_pays(model, ("image",), 32, 100)


def test_what_was_settled_about_compiling_stands_in_the_manifest(pictures, model_dir, tmp_path, run, monkeypatch):
    assert run("embed", pictures, "--model", model_dir, "--out", tmp_path / "e").status == 0
    assert not read_manifest(tmp_path / "e", "embeddings")["compiled"]
    asked = []
    monkeypatch.setattr(embedding, "compiled_image_tower", lambda model, size: asked.append(size) or model.encode_image)
    monkeypatch.setattr(embedding, "compiling_pays", lambda *about: True)
    assert run("embed", pictures, "--model", model_dir, "--out", tmp_path / "c", "--batch-size", 7).status == 0
    assert read_manifest(tmp_path / "c", "embeddings")["compiled"]
    assert asked == [7]
    assert run("embed", pictures, "--model", model_dir, "--out", tmp_path / "n", "--no-compile").status == 0
    assert not read_manifest(tmp_path / "n", "embeddings")["compiled"]
    assert asked == [7]
