"""An update embeds what is new or changed and gives what a run from nothing gives, whatever happens on the way."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.data import PackOptions, pack
from clipkit.data.sources import open_source
from clipkit.embedding import Embeddings, EmbedOptions, embed, loading
from clipkit.embedding import pipeline as room
from tests.conftest import tiny_model
from tests.kills import contents
from tests.samples import distinct, photo


class Counted:
    """Embeds with the tiny model in parts of 4 and batches of 3, and counts what is decoded and encoded."""

    def __init__(self, model, monkeypatch):
        self.model = model
        self.decoded, self.images, self.texts = 0, 0, 0
        decode, image, tokenize = loading.shown, model.encode_image, model.tokenize

        def counted_decode(*args):
            self.decoded += 1
            return decode(*args)

        def counted_image(pixels):
            self.images += distinct(pixels)
            return image(pixels)

        def counted_tokenize(texts):
            self.texts += len(texts)
            return tokenize(texts)

        monkeypatch.setattr(loading, "shown", counted_decode)
        monkeypatch.setattr(model, "encode_image", counted_image)
        monkeypatch.setattr(model, "tokenize", counted_tokenize)

    def __call__(self, spec, out, *, update=True, **how):
        """Returns images decoded, images encoded and texts encoded."""
        self.decoded = self.images = self.texts = 0
        settings = {"part_size": 4, "batch_size": 3, "precision": "fp32", "threads": 1, "update": update, **how}
        embed(open_source(spec), self.model, out, EmbedOptions(**settings), model_reference={"fingerprint": "f"})
        return self.decoded, self.images, self.texts


@pytest.fixture
def run_embed(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Counted(tiny_model(), monkeypatch)  # its own, as a cast to bf16 and back is not what it was
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path):
    """A folder of 14 photos, most with a caption beside them, one of them no image."""
    for number in range(14):
        path = tmp_path / "in" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        photo(number, 24, 20).save(path)
        if number % 4:
            path.with_suffix(".txt").write_text(f"photo {number}")
    (tmp_path / "in" / "05.png").write_text("no image")
    return tmp_path / "in"


def as_fresh(run_embed, spec, out, tmp_path, *, bits=False, **how):
    """Hold an update against its slow twin, a run from nothing.

    All must be the same but the last bit of some vectors: other batches are other sums, in fp32 too. Where `bits` is
    given, that as well.
    """
    twin = tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}"
    run_embed(spec, twin, update=False, **how)
    made, wanted = contents(out), contents(twin)
    assert made.keys() == wanted.keys()
    for name in wanted:
        if name.endswith(".npy"):
            ours, theirs = np.load(out / name), np.load(twin / name)
            assert ours.shape == theirs.shape, name
            assert ours.dtype == theirs.dtype == np.float16
            if bits:
                assert np.array_equal(ours, theirs), name
            else:
                near = np.spacing(np.maximum(np.abs(ours), np.abs(theirs))).astype(np.float32) + 1e-6
                assert (np.abs(ours.astype(np.float32) - theirs) <= near).all(), name
        elif name.endswith(".parquet"):
            assert made[name] == wanted[name], name
    ours, theirs = (json.loads(tree["manifest.json"]) for tree in (made, wanted))
    for manifest in () if bits else (ours, theirs):
        for part in manifest["parts"]:
            part["files"] = list(part["files"])
    assert ours == theirs
    assert made.get("ledger.jsonl") == wanted.get("ledger.jsonl")
    Embeddings.open(out).verify()
    return twin


def rows_by_key(folder):
    """Key to the bits of its image's vector."""
    opened = Embeddings.open(folder)
    vectors = np.concatenate(list(opened.blocks("image")))
    return {key: vector.tobytes() for key, vector in zip(opened.table()["key"].to_pylist(), vectors, strict=True)}


def test_only_what_is_new_or_changed_is_embedded(run_embed, photos, tmp_path):
    out = tmp_path / "e"
    assert run_embed(photos, out) == (14, 13, 9)
    before = rows_by_key(out)
    assert len(before) == 13
    photo(99, 24, 20).save(photos / "01.png")  # changed
    photo(98, 24, 20).save(photos / "00a.png")  # new, and everything after it moves
    (photos / "07.png").unlink()  # gone
    (photos / "08.txt").write_text("a caption at last")
    (photos / "09.txt").write_text("another caption")
    (photos / "10.txt").unlink()
    assert run_embed(photos, out) == (2, 2, 3)
    after = rows_by_key(out)
    assert after.keys() == before.keys() - {"07.png"} | {"00a.png"}
    assert {key for key in before if after.get(key) != before[key]} == {"01.png", "07.png"}
    as_fresh(run_embed, photos, out, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_whole_parts_are_new_every_bit_is_that_of_a_run_from_nothing(run_embed, photos, tmp_path, precision):
    for number in (12, 13):
        (photos / f"{number}.png").unlink()
    run_embed(photos, tmp_path / "e", precision=precision)
    for number in range(20, 26):
        photo(number, 24, 20).save(photos / f"{number}.png")
    assert run_embed(photos, tmp_path / "e", precision=precision) == (6, 6, 0)
    as_fresh(run_embed, photos, tmp_path / "e", tmp_path, precision=precision, bits=True)


def test_nothing_new_is_nothing_done(run_embed, photos, tmp_path):
    out = tmp_path / "e"
    run_embed(photos, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run_embed(photos, out) == (0, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_file_that_cannot_be_used_is_not_decoded_again_and_stays_in_the_ledger(run_embed, photos, tmp_path):
    out = tmp_path / "e"
    run_embed(photos, out)
    photo(98, 24, 20).save(photos / "00a.png")
    assert run_embed(photos, out) == (1, 1, 0)
    ledger = Embeddings.open(out).ledger()
    assert [(line["row"], line["key"]) for line in ledger] == [(6, "05.png")]
    as_fresh(run_embed, photos, out, tmp_path)
    photo(5, 24, 20).save(photos / "05.png")
    assert run_embed(photos, out) == (1, 1, 1)
    assert Embeddings.open(out).ledger() == []


def test_what_could_not_be_read_is_tried_again(run_embed, photos, tmp_path, monkeypatch):
    from clipkit.data.sources import Sample, sample

    out, read = tmp_path / "e", Sample.read

    def fails(self):
        if self.key == "03.png":
            raise sample.UnreadSample("cannot be read: Input/output error")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Sample, "read", fails)
        run_embed(photos, out)
    assert [line["key"] for line in Embeddings.open(out).ledger()] == ["03.png", "05.png"]
    (photos / "13.txt").write_text("new words")
    assert run_embed(photos, out) == (1, 1, 2)
    as_fresh(run_embed, photos, out, tmp_path)


def test_words_that_are_mended_bring_a_sample_back(run_embed, photos, tmp_path):
    (photos / "02.json").write_text("{")
    run_embed(photos, tmp_path / "e")
    assert [line["key"] for line in Embeddings.open(tmp_path / "e").ledger()] == ["02.png", "05.png"]
    (photos / "02.json").write_text('{"caption": "whole"}')
    (photos / "03.json").write_text("{")
    assert run_embed(photos, tmp_path / "e")[:2] == (1, 1)
    assert [line["key"] for line in Embeddings.open(tmp_path / "e").ledger()] == ["03.png", "05.png"]
    as_fresh(run_embed, photos, tmp_path / "e", tmp_path)


def test_parts_of_the_same_samples_are_linked_not_copied(run_embed, photos, tmp_path, monkeypatch):
    out = tmp_path / "e"
    run_embed(photos, out)
    before = {path.name: path.stat().st_ino for path in out.rglob("*.*")}
    photo(14, 24, 20).save(photos / "14.png")
    assert run_embed(photos, out) == (1, 1, 0)
    after = {path.name: path.stat().st_ino for path in out.rglob("*.*")}
    for kind in (
        "img_emb_{}.npy",
        "text_emb_{}.npy",
        "metadata_{}.parquet",
        "captions_{}.parquet",
        "stamps_{}.parquet",
    ):
        same = [before[kind.format(n)] == after[kind.format(n)] for n in ("0000", "0001", "0002", "0003")]
        assert same == [True, True, True, False], kind
    as_fresh(run_embed, photos, out, tmp_path)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    photo(15, 24, 20).save(photos / "15.png")
    assert run_embed(photos, out) == (1, 1, 0)
    as_fresh(run_embed, photos, out, tmp_path)


def test_other_cuts_of_the_same_take_everything_over(run_embed, photos, tmp_path):
    run_embed(photos, tmp_path / "e")
    before = rows_by_key(tmp_path / "e")
    assert run_embed(photos, tmp_path / "e", part_size=5, batch_size=2) == (0, 0, 0)
    assert rows_by_key(tmp_path / "e") == before
    as_fresh(run_embed, photos, tmp_path / "e", tmp_path, part_size=5, batch_size=2)
    assert run_embed(photos, tmp_path / "e", part_size=100) == (0, 0, 0)
    as_fresh(run_embed, photos, tmp_path / "e", tmp_path, part_size=100)


def test_a_list_with_other_captions_and_columns_of_any_kind(run_embed, captioned, tmp_path):
    header, *lines = captioned.read_text().splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    kinds = ["text", 1, 2.5, None, [1, "a"], {"b": 2}, True, float("nan"), 3, 4, 5, "6"]
    for number, row in enumerate(rows):
        row["odd"] = kinds[number // 3]

    def write():
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree(captioned.parent / "images", tmp_path / "images", dirs_exist_ok=True)
        return tmp_path / "list.jsonl"

    out = tmp_path / "e"
    for path in (captioned.parent / "images").iterdir():
        os.utime(path, ns=(1, 1))  # so that copies look alike
    assert run_embed(write(), out) == (12, 12, 36)
    rows[4]["caption"] = "another one"
    rows[5]["caption"] = rows[3]["caption"]  # twice now, and one of them there was before
    rows = [*rows[9:], *rows[:9]]  # another order: every part is of other samples
    assert run_embed(write(), out) == (0, 0, 2)
    as_fresh(run_embed, tmp_path / "list.jsonl", out, tmp_path)
    for row in rows:
        row["added"] = 1
    rows.append({"path": "", "caption": "of nothing"})
    assert run_embed(write(), out) == (0, 0, 0)
    assert Embeddings.open(out).ledger()[0]["reason"].startswith("names no image")
    as_fresh(run_embed, tmp_path / "list.jsonl", out, tmp_path)


def test_shards_that_have_not_changed_are_taken_over(run_embed, pictures, tmp_path):
    listed = tmp_path / "list.tsv"
    lines = pictures.read_text().splitlines(keepends=True)
    shutil.copytree(pictures.parent / "images", tmp_path / "images")
    listed.write_text("".join(lines[:21]))
    pack(open_source(listed), tmp_path / "s", PackOptions(shard_samples=10))
    out = tmp_path / "e"
    assert run_embed(tmp_path / "s", out) == (20, 20, 20)
    listed.write_text("".join([lines[0], *lines[3:31]]))  # the second shard begins with what was in the first
    pack(open_source(listed), tmp_path / "s", PackOptions(shard_samples=10, overwrite=True))
    assert run_embed(tmp_path / "s", out) == (28, 28, 28)
    listed.write_text("".join([lines[0], *lines[3:33]]))  # the last one has grown
    pack(open_source(listed), tmp_path / "s", PackOptions(shard_samples=10, overwrite=True))
    assert run_embed(tmp_path / "s", out) == (10, 10, 10)
    as_fresh(run_embed, tmp_path / "s", out, tmp_path)


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_side_alone_is_updated(run_embed, photos, tmp_path, side):
    out = tmp_path / "e"
    run_embed(photos, out, sides=[side])
    photo(97, 24, 20).save(photos / "02.png")
    (photos / "09.txt").write_text("another caption")
    assert run_embed(photos, out, sides=[side]) == ((1, 1, 0) if side == "image" else (0, 0, 1))
    as_fresh(run_embed, photos, out, tmp_path, sides=[side])
    photo(96, 24, 20).save(photos / "00.png")
    (photos / "00.txt").write_text("a caption at last")
    assert run_embed(photos, out, sides=[side]) == ((1, 1, 0) if side == "image" else (0, 0, 1))
    as_fresh(run_embed, photos, out, tmp_path, sides=[side])


def test_a_killed_update_of_a_source_that_changed_again_is_not_lost(run_embed, photos, tmp_path, monkeypatch):
    out = tmp_path / "e"
    run_embed(photos, out)
    old = contents(out)
    for number in range(20, 32):
        photo(number, 24, 20).save(photos / f"{number}.png")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "_check_ids", killed)
        with pytest.raises(KeyboardInterrupt):
            run_embed(photos, out)
    assert contents(out) == old
    photo(32, 24, 20).save(photos / "00a.png")
    assert run_embed(photos, out) == (1, 1, 0)
    as_fresh(run_embed, photos, out, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_unfinished_run_over_a_source_that_changed_is_not_lost(run_embed, photos, tmp_path, monkeypatch):
    out = tmp_path / "e"
    with monkeypatch.context() as patch:
        patch.setattr(room, "_check_ids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_embed(photos, out, update=False)
    photo(32, 24, 20).save(photos / "00a.png")
    with pytest.raises(ClipkitError, match="holds unfinished embeddings made from other input.* add --update to"):
        run_embed(photos, out, update=False)
    assert run_embed(photos, out) == (1, 1, 0)
    as_fresh(run_embed, photos, out, tmp_path)


@pytest.mark.parametrize(
    "name", ["img_emb/img_emb_0001.npy", "captions/captions_0001.parquet", "stamps/stamps_0001.parquet"]
)
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_damaged_is_named_and_embedded_anew(run_embed, photos, tmp_path, capsys, name, cut):
    out = tmp_path / "e"
    run_embed(photos, out)
    data = (out / name).read_bytes()
    (out / name).write_bytes(data[:-3] if cut else data[:60] + bytes([data[60] ^ 1]) + data[61:])
    photo(32, 24, 20).save(photos / "00a.png")
    decoded, images, _ = run_embed(photos, out)
    assert decoded == 1 + 4
    assert images == 1 + 3
    said = capsys.readouterr().err
    assert name in said
    assert "its part is embedded anew" in said
    as_fresh(run_embed, photos, out, tmp_path)


def test_embeddings_made_in_another_way_are_refused_with_one_line(run, refused, photos, model_dir, tmp_path):
    tiny_model(seed=9).save(tmp_path / "other")
    call = ["embed", photos, "--out", tmp_path / "e", "--update", "--model"]
    assert run(*call, model_dir, "--precision", "fp32").status == 1
    photo(32, 24, 20).save(photos / "00a.png")
    before = contents(tmp_path / "e")
    assert "was embedded with model" in refused(*call, tmp_path / "other", "--precision", "fp32")
    assert "with precision fp32, not bf16" in refused(*call, model_dir, "--precision", "bf16")
    line = refused(*call, model_dir, "--precision", "fp32", "--sides", "text")
    assert "with sides image and text, not text; --update keeps to that, --overwrite makes it anew" in line
    assert "say one of them" in refused(*call, model_dir, "--overwrite")
    assert contents(tmp_path / "e") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "in", "other"]
    shutil.rmtree(tmp_path / "e" / "stamps")
    assert "was made by an older clipkit" in refused(*call, model_dir, "--precision", "fp32")


def test_the_command_says_what_it_took_over(run, refused, photos, model_dir, tmp_path):
    call = ["embed", photos, "--out", tmp_path / "e", "--model", model_dir]
    assert "13 images (0 as they were) and 9 captions" in run(*call, "--update").err
    photo(32, 24, 20).save(photos / "00a.png")
    assert "add --update to bring it up to date, or --overwrite" in refused(*call)
    result = run(*call, "--update")
    assert result.status == 1
    assert "14 images (13 as they were) and 9 captions" in result.err
    assert "nothing was done" in run(*call, "--update").err
    assert run(*call).status == 1
    assert run("build", tmp_path / "e", "--verify", "--out", tmp_path / "i").status == 0
    found = json.loads(run("search", tmp_path / "i", "x", "-k", 1, "--format", "json").out)
    assert set(found[0]) == {"rank", "score", "id", "key", "image_path", "caption"}


def test_a_remote_folder_is_updated_as_far_as_its_stamps_go(run_embed, photos, tmp_path):
    import fsspec

    files, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    for path in photos.iterdir():
        files.pipe(f"{url}/{path.name}", path.read_bytes())
    out = tmp_path / "e"
    assert run_embed(url, out) == (14, 13, 9)
    files.pipe(f"{url}/04.png", (photos / "06.png").read_bytes())
    files.pipe(f"{url}/00a.png", (photos / "07.png").read_bytes())
    files.pipe(f"{url}/00.txt", b"now it has one")
    assert run_embed(url, out) == (2, 2, 1)
    as_fresh(run_embed, url, out, tmp_path)
    files.rm(url, recursive=True)


def test_stamps_are_no_users_columns(run_embed, photos, tmp_path):
    run_embed(photos, tmp_path / "e")
    opened = Embeddings.open(tmp_path / "e")
    assert opened.table().column_names == ["id", "key", "image_path", "caption"]
    assert opened.table("text").column_names == ["caption", "image_id", "image_row"]
    stamps = pq.read_table(tmp_path / "e" / "stamps" / "stamps_0001.parquet").to_pylist()
    assert [line["row"] for line in stamps] == [0, None, 1, 2]
    assert stamps[1]["reason"].startswith("not an image")


def test_images_beside_no_captions_at_all(run_embed, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(6):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "in" / f"{number}.png")
    assert run_embed(tmp_path / "in", tmp_path / "e") == (6, 6, 0)
    (tmp_path / "in" / "0.png").unlink()
    assert run_embed(tmp_path / "in", tmp_path / "e") == (0, 0, 0)
    assert Embeddings.open(tmp_path / "e").sides == ["image"]
    (tmp_path / "in" / "3.txt").write_text("the first caption")
    assert run_embed(tmp_path / "in", tmp_path / "e") == (0, 0, 1)
    as_fresh(run_embed, tmp_path / "in", tmp_path / "e", tmp_path)


def unreadable(*keys):
    """Stands in for `Sample.read` while a disk fails at these."""
    from clipkit.data.sources import Sample, sample

    read = Sample.read

    def fails(self):
        if not keys or self.key in keys:
            raise sample.UnreadSample("cannot be read: Input/output error")
        return read(self)

    return fails


def test_what_could_not_be_read_is_tried_again_where_nothing_has_changed(run_embed, photos, tmp_path, monkeypatch):
    from clipkit.data.sources import Sample

    out = tmp_path / "e"
    (photos / "gone.png").symlink_to("nowhere")
    for failing in (("03.png", "04.png"), ("04.png",)):
        with monkeypatch.context() as patch:
            patch.setattr(Sample, "read", unreadable(*failing))
            run_embed(photos, out)
        assert [line["key"] for line in Embeddings.open(out).ledger()] == [*failing, "05.png", "gone.png"]
        identity = Embeddings.open(out).manifest["identity"]
    assert run_embed(photos, out, update=False) == (0, 0, 0)
    assert Embeddings.open(out).manifest["identity"] == identity
    old = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_check_ids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_embed(photos, out)
    assert (run_embed.decoded, run_embed.images) == (1, 1)  # the other is missing, as it was
    assert contents(out) == old
    assert run_embed(photos, out) == (0, 0, 0)
    assert [line["key"] for line in Embeddings.open(out).ledger()] == ["05.png", "gone.png"]
    assert Embeddings.open(out).manifest["identity"] != identity
    before = contents(out)
    for update in (True, False):
        assert run_embed(photos, out, update=update) == (0, 0, 0)
    assert contents(out) == before
    twin = tmp_path / "fresh"
    run_embed(photos, twin, update=False)
    assert rows_by_key(out).keys() == rows_by_key(twin).keys()
    assert Embeddings.open(out).table().equals(Embeddings.open(twin).table())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "fresh", "in"]


def test_where_nothing_could_be_read_the_same_again_tries_again(run_embed, photos, tmp_path, monkeypatch):
    from clipkit.data.sources import Sample

    for update in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(Sample, "read", unreadable())
            with pytest.raises(ClipkitError, match=r"nothing in .* can be used; the first: 00\.png: cannot be read"):
                run_embed(photos, tmp_path / "e", update=update)
    assert run_embed(photos, tmp_path / "e", update=False)[1] == 13


def test_a_shard_that_could_not_be_read_is_read_by_the_next_update(run_embed, shards, tmp_path, monkeypatch):
    from clipkit.data.shards import Shards

    read = Shards._read

    def fails(self, path, i, members):
        if i in (4, 5, 20):
            raise ClipkitError(f"cannot read {path}: Input/output error")
        return read(self, path, i, members)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "_read", fails)
        run_embed(shards, tmp_path / "e")
    assert [line["row"] for line in Embeddings.open(tmp_path / "e").ledger()] == [4, 5, 20]
    assert run_embed(shards, tmp_path / "e") == (3, 3, 3)
    assert Embeddings.open(tmp_path / "e").ledger() == []
