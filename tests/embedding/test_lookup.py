"""A teacher's stored embeddings: what training looks up is what the teacher says of the same image and caption."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from clipkit.core import ClipkitError
from clipkit.data import PackOptions, pack
from clipkit.data.shards import captions_of, image_extension, write_shard
from clipkit.data.sources import open_source, sample_id, text_id
from clipkit.embedding import Embeddings, EmbedOptions, TeacherEmbeddings, embed
from clipkit.embedding.store import part_table_path, part_vectors_path
from clipkit.images import Preprocess
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.objective import check_teacher
from clipkit.training.settings import DataConfig
from tests.conftest import make_pictures
from tests.samples import encoded, fake_tokens, photo


def store(spec, model, out, part_size=7):
    """Embed shards, in parts that cut across them."""
    reference = {"fingerprint": "of-the-teacher"}
    options = EmbedOptions(precision="fp32", part_size=part_size)
    embed(open_source(spec), model, out, options, model_reference=reference)
    return out


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory, model):
    """Two sets of shards whose samples and shards have the same names, and a teacher's embeddings of both."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate("ab"):
        listed = make_pictures(folder / f"{name}-pictures", 9 + 2 * seed, captions=1 + 2 * seed, seed=seed)
        pack(open_source(listed), folder / name, PackOptions(shard_samples=6))
    store(f"{folder}/{{a,b}}/{{000000..000001}}.tar", model, folder / "emb")
    return folder


def batches_of(data, config, *, steps, batch=8):
    made = Batches(data, Preprocess(size=16), fake_tokens, config, 0)
    return train_batches(made, first_step=0, steps=steps, batch_size=batch)


def directly(model, samples, text_ids):
    """Embeddings of the samples' images and of their captions with these ids, by the model itself."""
    images = [members[image_extension(members)] for members in samples]
    captions = [
        next(text for text in captions_of(members)[0] if text_id(text) == wanted)
        for members, wanted in zip(samples, text_ids, strict=True)
    ]
    return model.embed_images(images), model.embed_texts(captions)


@pytest.mark.parametrize("weights", [(None, None), (1, 3)])
def test_a_batch_of_two_sets_finds_its_embeddings(two_sets, model, weights):
    parts = [{"shards": str(two_sets / name), "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    config = DataConfig(train=parts, workers=0)
    data = open_train_data(config, 0)
    teacher = TeacherEmbeddings.open(two_sets / "emb")
    check_teacher(teacher, data, config)
    seen = set()
    for step, batch in enumerate(batches_of(data, config, steps=8)):
        image, text = teacher.lookup(batch["image_ids"], batch["text_ids"])
        assert image.dtype == text.dtype == torch.float32
        assert image.shape == text.shape == (8, teacher.dim)
        samples = [data.read(reference) for reference in data.first(range(8 * step, 8 * step + 8))]
        wanted = directly(model, samples, batch["text_ids"].tolist())
        assert np.allclose(image, wanted[0], atol=1e-3)
        assert np.allclose(text, wanted[1], atol=1e-3)
        seen |= set(zip(batch["image_ids"].tolist(), batch["text_ids"].tolist(), strict=True))
    assert len({image for image, _ in seen}) >= 17
    assert len(seen) > 25, "several captions of the images of the second set were drawn"


def test_ids_are_those_of_the_source_that_names_the_same_shards(two_sets, shards):
    def ids(train):
        data = open_train_data(DataConfig(train=train), 0)
        return {data.image_id(reference) for reference in data.first(range(data.size or 0))}

    assert ids(str(shards)) == {sample_id(open_source(shards).key(i)) for i in range(48)}
    both = open_source(f"{two_sets}/{{a,b}}/{{000000..000001}}.tar")
    wanted = {sample_id(both.key(i)) for i in range(20)}
    assert len(wanted) == 20
    assert ids([str(two_sets / "a"), str(two_sets / "b")]) == wanted
    assert ids([str(two_sets / "b"), str(two_sets / "a" / "000001.tar"), str(two_sets / "a" / "000000.tar")]) == wanted


def test_ids_of_sets_with_keys_of_their_own_are_their_keys(two_sets, shards, tmp_path):
    samples = [(f"mine{i}", {"png": encoded(photo(i), "PNG"), "txt": b"a caption"}) for i in range(5)]
    write_shard(tmp_path / "mine" / "000000.tar", samples)
    data = open_train_data(DataConfig(train=[str(shards), str(tmp_path / "mine")]), 0)
    found = {data.image_id(reference) for reference in data.first(range(53))}
    assert found == {sample_id(open_source(shards).key(i)) for i in range(48)} | {
        sample_id(f"mine{i}") for i in range(5)
    }
    twice = open_train_data(DataConfig(train=[str(shards), str(shards / "000000.tar")]), 0)
    named = {twice.image_id(reference) for reference in twice.first(range(61))}
    assert len(named) == 48, "a shard that is named twice holds the same images twice"


def test_case_and_captions_that_other_images_share(tmp_path, model):
    """Captions are found among those of their own image, in whatever case the batch's id was made."""
    captions = [["a cat", "A Dog"], ["a dog", "ünïcode ẞ"], [], ["a cat", "a cat", "a CAT"]]
    samples = [
        (f"k{i}", {"png": encoded(photo(i), "PNG"), "json": json.dumps({"captions": each}).encode()})
        for i, each in enumerate(captions)
    ]
    write_shard(tmp_path / "s" / "0.tar", samples)
    teacher = TeacherEmbeddings.open(store(str(tmp_path / "s"), model, tmp_path / "e", part_size=1))
    asked = [(0, "A DOG"), (1, "a dog"), (3, "a Cat"), (0, "a cat"), (1, "ÜNÏCODE ß")]
    image_ids = torch.tensor([sample_id(f"k{i}") for i, _ in asked])
    image, text = teacher.lookup(image_ids, torch.tensor([text_id(caption) for _, caption in asked]))
    assert np.allclose(text, model.embed_texts(["A Dog", "a dog", "a cat", "a cat", "ünïcode ẞ"]), atol=1e-3)
    assert np.allclose(image, model.embed_images([samples[i][1]["png"] for i, _ in asked]), atol=1e-3)
    empty = torch.zeros(0, dtype=torch.int64)
    assert [rows.shape for rows in teacher.lookup(empty, empty)] == [(0, 32), (0, 32)]
    for key in ("k1", "k2"):  # the first has other captions, the second none
        with pytest.raises(
            ClipkitError, match=rf"no embedding of the caption with id {text_id('a cat')} of sample '{key}'"
        ):
            teacher.lookup(torch.tensor([sample_id(key)]), torch.tensor([text_id("a cat")]))
    with pytest.raises(ClipkitError, match=rf"e has no embedding of the image with id {sample_id('k9')}; embed all of"):
        teacher.lookup(torch.tensor([sample_id("k0"), sample_id("k9")]), torch.tensor([text_id("a cat")] * 2))


def test_vectors_stay_on_the_disk(two_sets):
    teacher = TeacherEmbeddings.open(two_sets / "emb")
    blocks = [block for side in teacher._blocks.values() for block in side]
    assert len(blocks) == 6
    assert all(isinstance(block, np.memmap) and block.dtype == np.float16 for block in blocks)
    held = [teacher._ids, teacher._order, teacher._starts, teacher._text_ids]
    assert sum(array.nbytes for array in held) <= 32 * 20 + 8 * 42 + 8
    assert teacher.fingerprint == "of-the-teacher"


def test_random_lookups_are_what_the_whole_arrays_say(two_sets):
    opened = Embeddings.open(two_sets / "emb")
    teacher = TeacherEmbeddings.open(two_sets / "emb")
    captions, image_ids = opened.table("text"), opened.table("image")["id"].to_numpy()
    rows = np.random.default_rng(0).integers(len(captions), size=200)
    owners = captions["image_row"].to_numpy()[rows]
    texts = np.array([text_id(text) for text in captions["caption"].to_pylist()])
    image, text = teacher.lookup(torch.from_numpy(image_ids[owners]), torch.from_numpy(texts[rows]))
    assert np.array_equal(image, opened.vectors("image")[owners])
    assert np.array_equal(text, opened.vectors("text")[rows])


def test_what_does_not_fit_is_found_before_training(two_sets, shards, embeddings, model, tmp_path):
    teacher = TeacherEmbeddings.open(two_sets / "emb")
    config = DataConfig(train=str(shards))
    with pytest.raises(
        ClipkitError, match=r"no embedding of sample '.*' of 00000\d\.tar, and of 48 among 48 that were"
    ):
        check_teacher(teacher, open_train_data(config, 0), config)
    config = DataConfig(train=[str(two_sets / "a"), str(two_sets / "b")], templates=["{caption}", "a {caption}"])
    with pytest.raises(ClipkitError, match=r"data\.templates changes the captions"):
        check_teacher(teacher, open_train_data(config, 0), config)
    plain = config.model_copy(update={"templates": ["{caption}"]})
    check_teacher(teacher, open_train_data(plain, 0), plain, first=1000)
    half = TeacherEmbeddings.open(store(str(shards / "000000.tar"), model, tmp_path / "half"))
    config = DataConfig(train=str(shards))
    with pytest.raises(ClipkitError, match="and of 35 among 48 that were looked for; embed all of data.train: clipkit"):
        check_teacher(half, open_train_data(config, 0), config)


def test_what_is_no_teacher(two_sets, shards, index, model_dir, run, tmp_path):
    def refused(folder):
        with pytest.raises(ClipkitError) as caught:
            TeacherEmbeddings.open(folder)
        return str(caught.value)

    assert "no such folder" in refused(tmp_path / "none")
    assert "holds shards, but embeddings is needed" in refused(shards)
    assert "holds index, but embeddings is needed" in refused(index)
    for side, other in (("image", "text"), ("text", "image")):
        assert run("embed", shards, "--model", model_dir, "--sides", side, "--out", tmp_path / side).status == 0
        assert f"has no {other} embeddings, a teacher needs both" in refused(tmp_path / side)
    shutil.copytree(two_sets / "emb", tmp_path / "e")
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    (tmp_path / "e" / "manifest.json").write_text(json.dumps({**manifest, "dtype": "int8"}))
    assert "holds int8, a teacher is stored as float16" in refused(tmp_path / "e")
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
    path = part_table_path(tmp_path / "e", "text", "0001")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert f"{path} has {path.stat().st_size:,} bytes, but" in refused(tmp_path / "e")
    parts = [{name: value for name, value in part.items() if name != "files"} for part in manifest["parts"]]
    (tmp_path / "e" / "manifest.json").write_text(json.dumps({**manifest, "parts": parts}))  # as older ones are
    assert f"{path} has {len(table) - 1} rows, the manifest says {len(table)}" in refused(tmp_path / "e")
    path.write_bytes(b"PAR1")
    assert f"{path} is missing or broken" in refused(tmp_path / "e")
    part_vectors_path(tmp_path / "e", "image", "0000").unlink()
    assert "img_emb_0000.npy is missing or broken" in refused(tmp_path / "e")
