"""Shards: any webdataset reader reads ours, and we read anybody's."""

import gc
import io
import os
import shutil
import subprocess

import pytest
import webdataset
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.data import PackOptions, pack
from clipkit.data.packing import shard_keys
from clipkit.data.shards import Shards
from clipkit.data.shards import reader as room
from clipkit.data.sources import open_source
from tests.samples import tar_of


def png(colour=(1, 2, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_we_write(shards):
    ours = Shards.open(str(shards))
    tars = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(ours) == len(theirs) == 48
    for i, sample in enumerate(theirs):
        assert sample["__key__"] == ours.key(i)
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == ours[i]
    del theirs
    gc.collect()  # webdataset leaves the tars open; their warning belongs to this test


def test_we_read_what_webdataset_writes(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"k{i}", "png": png(), "txt": f"caption {i}", "json": {"n": i}})
    source = open_source(str(tmp_path / "{000..002}.tar"))
    assert len(source) == 5
    assert source[4].captions == ("caption 4",)
    assert source[4].columns == {"path": "k4", "n": 4}
    assert source[4].read() == png()


def test_we_read_plain_tars_and_img2datasets_captions(tmp_path):
    members = {"d/one.two.png": png(), "d/one.txt": b"first", "x.jpg": b"no image", "x.json": b'{"caption": "second"}'}
    tar_of(tmp_path / "a.tar", members)
    shards = Shards.open(str(tmp_path))
    assert [shards.key(i) for i in range(len(shards))] == ["d/one", "x"]
    assert shards[0] == {"two.png": png(), "txt": b"first"}
    assert open_source(tmp_path)[1].captions == ("second",)


def test_sidecars_are_made_kept_and_not_trusted_when_stale(tmp_path):
    tar = tar_of(tmp_path / "a.tar", {"one.txt": b"1"})
    assert len(Shards.open(str(tar))) == 1
    sidecar = tmp_path / "a.idx.arrow"
    assert sidecar.is_file()
    tar_of(tar, {"other.txt": b"other", "two.txt": b"2" * 300})
    again = Shards.open(str(tar))  # just as long: tar pads
    assert [again.key(0), again[1]] == ["other", {"txt": b"2" * 300}]
    sidecar.write_bytes(b"rubbish")
    assert Shards.open(str(tar))[1] == {"txt": b"2" * 300}


def test_members_that_do_not_stand_together_are_one_sample(tmp_path):
    tar_of(tmp_path / "a.tar", {"./b.png": png(), "./a.txt": b"a", "./b.txt": b"b", "./a.png": png()})
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["./b", "./a"]
    assert [source[i].captions for i in range(2)] == [("b",), ("a",)]


def test_shards_that_count_from_zero_each_have_keys_of_their_own(tmp_path):
    for name in ("x", "y"):
        tar_of(tmp_path / f"{name}.tar", {"000.png": png(), "000.txt": name.encode()})
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(2)] == ["x/000", "y/000"]
    pack(source, tmp_path / "packed")
    again = open_source(tmp_path / "packed")
    assert [again[i].captions for i in range(2)] == [("x",), ("y",)]


def test_half_packed_shards_pass_for_nothing(pictures, tmp_path, monkeypatch):
    from clipkit.data import packing

    write, done = packing.write_shard, []

    def stop_at_the_third(path, samples):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        return write(path, samples)

    monkeypatch.setattr(packing, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(pictures), tmp_path / "s", PackOptions(shard_samples=13))
    with pytest.raises(ClipkitError, match="holds unfinished shards"):
        open_source(tmp_path / "s")
    monkeypatch.setattr(packing, "write_shard", write)
    assert pack(open_source(pictures), tmp_path / "s", PackOptions(shard_samples=13))["counts"]["samples"] == 48


def test_images_by_another_name_get_the_ending_of_what_they_are(tmp_path):
    for name in ("a.jfif", "b"):
        Image.new("RGB", (9, 9)).save(tmp_path / name, "JPEG")
    (tmp_path / "list.csv").write_text("path,caption\na.jfif,a\nb,b\n")
    pack(open_source(tmp_path / "list.csv"), tmp_path / "s")
    source = open_source(tmp_path / "s")
    assert [source[i].extension for i in range(2)] == ["jpg", "jpg"]
    assert source[0].read() == (tmp_path / "a.jfif").read_bytes()


def test_a_tar_cut_in_the_middle_of_a_member_gives_what_stands_before(tmp_path, capsys):
    tar = tar_of(tmp_path / "a.tar", {"one.txt": b"1", "two.txt": b"2" * 5000})
    tar.write_bytes(tar.read_bytes()[:3000])
    shards = Shards.open(str(tar))
    assert [shards.key(i) for i in range(len(shards))] == ["one"]
    assert "cut short" in capsys.readouterr().err


def test_a_shard_cut_after_it_was_indexed_is_named(tmp_path):
    tar = tar_of(tmp_path / "a.tar", {"one.txt": b"1" * 5000})
    shards = Shards.open(str(tar))
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(ClipkitError, match=r"a\.tar ends before sample 'one'"):
        shards[0]


def test_empty_shards(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ClipkitError, match="hold no samples"):
        Shards.open(str(tmp_path))
    tar_of(tmp_path / "b.tar", {"one.txt": b"1"})
    assert len(Shards.open(str(tmp_path))) == 1
    assert "a.tar is empty" in capsys.readouterr().err
    (tmp_path / "c.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ClipkitError, match=r"c\.tar is no readable tar"):
        Shards.open(str(tmp_path))
    with pytest.raises(ClipkitError, match="no such shard"):
        Shards.open(str(tmp_path / "{x,y}.tar"))


def test_equal_input_gives_equal_bytes(pictures, shards, tmp_path):
    pack(open_source(pictures), tmp_path / "again", PackOptions(shard_samples=13))
    for path in sorted(shards.glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_keys_are_the_paths_wherever_possible():
    assert shard_keys(["a/b.png", "c.jpg"]) == ["a/b", "c"]
    assert shard_keys(["../up/b.x.png", "/abs/with space.jpg"]) == ["up/b_x", "abs/with_space"]
    twice = shard_keys(["a.png", "a.jpg", "b.png"])
    assert twice[2] == "b"
    assert len(set(twice)) == 3
    assert all(key.startswith("a~") for key in twice[:2])


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command here")
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_we_read_what_the_tar_command_writes(tmp_path, form):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    names = ["a", "b", "deep/c", "x" * 90, "é"]
    for number, name in enumerate(names):
        (tmp_path / "in" / f"{name}.png").write_bytes(png((number, 0, 0)))
        (tmp_path / "in" / f"{name}.txt").write_text(f"caption {number}")
    subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "s.tar", "-C", tmp_path / "in", "."], check=True)
    source = open_source(str(tmp_path / "s.tar"))
    found = {source.key(i).removeprefix("./"): source[i] for i in range(len(source))}
    assert set(found) == set(names)
    for number, name in enumerate(names):
        assert found[name].captions == (f"caption {number}",)
        assert found[name].read() == png((number, 0, 0))


def test_repacking_keeps_every_member_and_notices_changed_contents(tmp_path):
    def make(label, caption):
        with webdataset.ShardWriter(str(tmp_path / "in-%d.tar"), maxcount=9, verbose=0) as writer:
            writer.write({"__key__": "k", "png": png(), "txt": caption, "cls": label, "npy": b"abc"})

    make(3, "one")
    source = open_source(str(tmp_path / "in-0.tar"))
    pack(source, tmp_path / "out")
    assert Shards.open(str(tmp_path / "out"))[0].keys() == {"png", "txt", "json", "cls", "npy"}
    make(4, "two")  # of the same size
    again = open_source(str(tmp_path / "in-0.tar"))
    assert again.shards.identity() == source.shards.identity()
    with pytest.raises(ClipkitError, match="made from other input"):
        pack(again, tmp_path / "out")


def test_a_damaged_tar_is_in_the_ledger_of_pack(pictures, tmp_path):
    pack(open_source(pictures), tmp_path / "s")
    tar = tmp_path / "s" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:50_000])
    manifest = pack(open_source(str(tar)), tmp_path / "again")
    assert manifest["counts"]["left_out"] >= 1
    assert "cut short" in (tmp_path / "again" / "ledger.jsonl").read_text()


def numbered(path, *values):
    """A tar of a sample for each value; each tar a time of its own."""
    tar_of(path, {f"{path.stem}{n}.png": png((value, 0, 0)) for n, value in enumerate(values)})
    os.utime(path, ns=(1, sum(values)))
    return path


def test_a_shard_that_changes_before_it_is_known_by_its_stamp_is_named(tmp_path):
    """Else its old samples would pass for those of the new one in every update to come."""
    source = open_source(numbered(tmp_path / "a.tar", 1, 2))
    numbered(tmp_path / "a.tar", 3, 4)
    with pytest.raises(ClipkitError, match=r"a\.tar was changed while it was read; run this again"):
        source.identity()
    assert open_source(tmp_path / "a.tar").identity()


def test_a_shard_that_changes_while_others_are_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "MAX_OPEN", 1)
    numbered(tmp_path / "a.tar", 1, 2)
    numbered(tmp_path / "b.tar", 3)
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(3)] == ["a0", "a1", "b0"]
    os.utime(tmp_path / "a.tar", ns=(1, 99))  # the same samples as before
    assert [source.key(i) for i in (1, 2)] == ["a1", "b0"]
    numbered(tmp_path / "a.tar", 4)
    for row in (0, 1):
        with pytest.raises(ClipkitError, match=r"a\.tar was changed while it was read; run this again"):
            source.key(row)
