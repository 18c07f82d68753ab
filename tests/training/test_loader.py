"""The training order is a pure function of (seed, position); ranks and workers only divide it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.data.shards import write_shard
from clipkit.data.sources import sample_id
from clipkit.images import AugmentConfig, Preprocess, augmented_pixels
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.settings import DataConfig
from tests.samples import fake_tokens, png

AUGMENT = AugmentConfig(shift=0.1, scale=(0.5, 1.0), flip=0.5, brightness=0.3, hue=0.1, saturation=0.2, grayscale=0.3)


def batches(shards, *, augment=AUGMENT, seed=3, first=0, steps=7, batch=16, rank=0, world=1, workers=0, **settings):
    config = DataConfig(train=str(shards), augment=augment, workers=workers, **settings)
    made = Batches(open_train_data(config, seed), Preprocess(size=24), fake_tokens, config, seed)
    lengths = {"first_step": first, "steps": steps, "batch_size": batch}
    return list(train_batches(made, **lengths, rank=rank, world_size=world))


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("pixels", "tokens", "image_ids", "text_ids"))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_workers_divide_one_sequence(shards, workers, world):
    alone = batches(shards)
    parts = [batches(shards, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, whole in enumerate(alone):
        for key in ("pixels", "tokens", "image_ids", "text_ids"):
            assert torch.equal(torch.cat([part[step][key] for part in parts]), whole[key])


def test_a_resumed_sequence_is_the_rest(shards):
    whole, rest = batches(shards), batches(shards, first=4)
    assert len(rest) == 3
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_an_epoch_holds_every_sample_once_and_the_next_is_another_order(shards):
    ids = torch.cat([batch["image_ids"] for batch in batches(shards, steps=6, batch=16)])
    first, second = ids[:48], ids[48:]
    assert len(set(first.tolist())) == 48
    assert set(first.tolist()) == set(second.tolist())
    assert first.tolist() != second.tolist()


def test_the_seed_decides(shards):
    assert same(batches(shards)[0], batches(shards)[0])
    assert not same(batches(shards)[0], batches(shards, seed=4)[0])


def test_all_captions_of_an_image_come_up(captioned, tmp_path):
    from clipkit.data import pack
    from clipkit.data.sources import open_source

    pack(open_source(captioned), tmp_path / "s")
    seen = {
        (int(i), int(t))
        for batch in batches(tmp_path / "s", steps=40, batch=12)
        for i, t in zip(batch["image_ids"], batch["text_ids"], strict=True)
    }
    packed = open_source(tmp_path / "s")
    assert seen == {
        (sample.id, sample_id(c.lower())) for sample in (packed[i] for i in range(12)) for c in sample.captions
    }


def test_unusable_samples_are_replaced_alike_everywhere_and_named(tmp_path):
    good = [(f"good{i}", {"png": png(i), "txt": b"a"}) for i in range(12)]
    bad = [
        ("cut", {"png": png()[:60], "txt": b"a"}),
        ("empty", {"png": b"", "txt": b"a"}),
        ("latin", {"png": png(), "txt": b"caf\xe9"}),
        ("mute", {"png": png()}),
        ("blind", {"txt": b"a"}),
        ("json", {"png": png(), "json": b"{"}),
    ]
    write_shard(tmp_path / "0.tar", good + bad)
    config = DataConfig(train=str(tmp_path), max_bad_share=0.5)
    known = open_train_data(config, 0).left_out  # without reading a sample
    assert {(line["key"], line["reason"]) for line in known} == {
        ("mute", "the sample has no caption"),
        ("blind", "the sample has no image"),
    }
    alone = batches(tmp_path, steps=9, batch=4, max_bad_share=0.5)
    assert all(len(batch["pixels"]) == 4 for batch in alone)
    ledger = [line for batch in alone for line in batch["left_out"]]
    assert {line["key"] for line in ledger} == {"cut", "empty", "latin", "json"}
    assert all(line["shard"] == "0.tar" and line["reason"] for line in ledger)
    parts = [batches(tmp_path, steps=9, batch=4, rank=rank, world=2, workers=1, max_bad_share=0.5) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([part[step]["image_ids"] for part in parts]), whole["image_ids"])
    good_ids = {int(i) for batch in alone for i in batch["image_ids"]}
    assert len(good_ids) == 12


def test_nothing_usable_stops_with_the_name_of_the_last(tmp_path):
    write_shard(tmp_path / "0.tar", [("bad", {"png": b"", "txt": b"a"})])
    with pytest.raises(ClipkitError, match=r"20 samples in a row .* 'bad' in 0\.tar: the file is empty"):
        batches(tmp_path, steps=1, batch=1)


def test_a_batch_that_ranks_cannot_share(shards):
    with pytest.raises(ClipkitError, match="batch_size 15 cannot be divided among 2 ranks"):
        batches(shards, batch=15, world=2)


def test_augmentation_off_is_the_plain_preprocessing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    plain = Preprocess(size=24)
    rng = np.random.default_rng(1)
    assert np.array_equal(augmented_pixels(image, plain, AugmentConfig(), rng, exact=True), plain(image))


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 0.2},
        {"scale": (0.3, 0.5)},
        {"flip": 1.0},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"hue": 0.5},
        {"saturation": 0.9},
        {"grayscale": 1.0},
    ],
    ids=json.dumps,
)
def test_every_augmentation_does_something_reproducible(config):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    plain, settings = Preprocess(size=24), AugmentConfig(**config)
    first = augmented_pixels(image, plain, settings, np.random.default_rng(5), exact=True)
    assert first.shape == (3, 24, 24)
    assert first.dtype == np.uint8
    again = augmented_pixels(image, plain, settings, np.random.default_rng(5), exact=True)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, plain(image))
    if "flip" in config:
        assert np.array_equal(first[:, :, ::-1], plain(image))
    if "grayscale" in config:
        assert np.array_equal(first[0], first[1])


def test_a_shift_moves_and_repeats_the_border():
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[8:12, 8:12] = 255
    settings = AugmentConfig(shift=0.2)
    for seed in range(20):
        moved = augmented_pixels(Image.fromarray(pixels), Preprocess(size=20), settings, np.random.default_rng(seed))
        assert moved.sum() == pixels.sum()
        top = np.flatnonzero(moved[0].any(axis=1))[0]
        assert 4 <= top <= 12
