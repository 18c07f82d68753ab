"""Folders, lists and shards as one thing."""

import io
import json
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.core import BadSample, ClipkitError
from clipkit.data import PackOptions, pack
from clipkit.data.packing import shard_keys
from clipkit.data.sources import check_ids, open_source, sample_id
from tests.samples import tar_of

ROWS = [
    {"path": "a.png", "caption": 'a "quoted" cat', "lang": "en"},
    {"path": "b.png", "caption": "ein Hund, groß", "lang": "de"},
    {"path": "a.png", "caption": "the same cat", "lang": "en"},
]


def write_list(folder, kind):
    path = folder / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        path.write_text(
            'path,caption,lang\na.png,"a ""quoted"" cat",en\nb.png,"ein Hund, groß",de\na.png,the same cat,en\n'
        )
    else:
        path.write_text(
            'path\tcaption\tlang\na.png\ta "quoted" cat\ten\nb.png\tein Hund, groß\tde\na.png\tthe same cat\ten\n'
        )
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_list_says_the_same(tmp_path, kind):
    source = open_source(write_list(tmp_path, kind))
    assert len(source) == 2
    assert source[0].captions == ('a "quoted" cat', "the same cat")
    assert source[1].captions == ("ein Hund, groß",)
    assert source[1].columns == {"path": "b.png", "lang": "de"}
    assert source[0].id == sample_id("a.png") == source[0].id < 2**63
    with pytest.raises(BadSample, match="No such file"):
        source[0].read()


def test_a_tsv_field_that_is_quoted_as_a_whole_is_unquoted(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text('path\tcaption\na.png\t"says ""hi"""\nb.png\t"left open\nc.png\tplain\n')
    source = open_source(path)
    assert [source[i].captions[0] for i in range(3)] == ['says "hi"', '"left open', "plain"]


def test_columns_are_found_by_name_and_named_when_missing(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("File_Name,Title,extra\na.png,a cat,1\n")
    assert open_source(path)[0].captions == ("a cat",)
    path.write_text("picture,words\na.png,a cat\n")
    with pytest.raises(ClipkitError, match="no image column; its columns are picture, words"):
        open_source(path)
    assert open_source(path, image_column="picture", caption_column="words")[0].captions == ("a cat",)
    with pytest.raises(ClipkitError, match="no column 'wrods'; its columns are picture, words"):
        open_source(path, image_column="picture", caption_column="wrods")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "path,caption\na.png\n", "row 2 has 1 fields"),
        ("x.csv", 'path,caption\na.png,"open\n', "quotation"),
        ("x.jsonl", "{}\nnot json\n", "line 2 is no JSON"),
        ("x.csv", "path,caption\n", "no rows"),
        ("x.parquet", "not parquet", "no readable parquet"),
        ("x.txt", "a", "is no source"),
        ("x.json", "{", "is not valid JSON"),
        ("x.json", '{"a": 1}', "is no list: expected COCO's captions"),
        ("x.json", '{"images": [{"id": 1}]}', r"images\[0\] has no id or no file_name"),
        ("x.json", '{"images": []}', "no rows"),
    ],
)
def test_a_broken_list_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ClipkitError, match=message):
        open_source(tmp_path / name)


def test_a_folder_with_captions_beside_its_images(tmp_path):
    for name in ("b/x.JPG", "a.png", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b/x.json").write_text('{"captions": ["one", "two"], "w": 3}')
    source = open_source(tmp_path, captions_required=True)
    assert [source.key(i) for i in range(len(source))] == ["a.png", "b/x.JPG"]
    assert source[0].captions == ("a cat",)
    assert source[1].captions == ("one", "two")
    assert source[1].columns == {"path": "b/x.JPG", "w": 3}


def test_identity_follows_the_content(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    before = open_source(tmp_path).identity()
    assert open_source(tmp_path).identity() == before
    Image.new("RGB", (9, 4)).save(tmp_path / "a.png")
    assert open_source(tmp_path).identity() != before


def test_empty_and_missing(tmp_path):
    with pytest.raises(ClipkitError, match="no images in"):
        open_source(tmp_path)
    with pytest.raises(ClipkitError, match="no such source"):
        open_source(tmp_path / "none")


def test_a_packed_list_holds_the_same_samples(pictures, shards):
    listed, packed = open_source(pictures), open_source(shards)
    assert len(listed) == len(packed) == 48
    for i in (0, 20, 47):
        assert packed[i].read() == listed[i].read()
        assert packed[i].captions == listed[i].captions
        assert packed[i].columns == listed[i].columns
        assert packed.size(i) == listed.size(i)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3], None),
        ([1], None),
        ([2, 1, 2], "'c' and 'a' have the same id; rename one of them"),
        ([5, 9, 1, 9, 9], "'d' and 'b' have the same id"),
    ],
)
def test_two_keys_with_one_id_are_refused(ids, message):
    keys = dict(zip("abcde", ids, strict=False))

    def check():
        check_ids(np.array(ids), lambda twin: [key for key, number in keys.items() if number == twin])

    if message is None:
        check()
    else:
        with pytest.raises(ClipkitError, match=message):
            check()


def test_a_users_columns_do_not_hide_what_clipkit_says(tmp_path):
    (tmp_path / "list.csv").write_text("img,caption,path,score,captions\na.png,a cat,elsewhere,9,3\n")
    sample = open_source(tmp_path / "list.csv", image_column="img", caption_column="caption")[0]
    assert sample.columns == {"path": "a.png", "path_": "elsewhere", "score_": "9", "captions_": "3"}
    (tmp_path / "list.csv").write_text("path,caption,caption\na.png,a,b\n")
    with pytest.raises(ClipkitError, match="two columns named 'caption'"):
        open_source(tmp_path / "list.csv")


def test_a_folder_of_pictures_with_an_archive_among_them_stays_one(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.TXT").write_text("\ufeffa cat", encoding="utf-8")
    (tmp_path / "backup.tar").write_bytes(b"")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert source[0].captions == ("a cat",)


COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 9, "file_name": "b.png", "width": 4, "height": 4, "license": 3},
        {"id": 5, "file_name": "a.png", "width": 4, "height": 4, "license": 3},
        {"id": 7, "file_name": "none.png", "width": 4, "height": 4, "license": 3},
    ],
    "annotations": [
        {"id": 1, "image_id": 5, "caption": "zebra "},
        {"id": 2, "image_id": 9, "caption": "b"},
        {"id": 3, "image_id": 5, "caption": "a second"},
        {"id": 4, "image_id": 5, "caption": "a first"},
        {"id": 5, "image_id": 77, "caption": "of nothing"},
    ],
}


@pytest.fixture
def coco(tmp_path):
    """COCO's layout: annotations in one folder, pictures in another."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), (len(name), 0, ord(name[0]))).save(tmp_path / "val" / name)
    (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps(COCO))
    return tmp_path


def check_coco(source, folder):
    assert [source.key(i) for i in range(len(source))] == ["b.png", "a.png", "none.png"]
    assert [source[i].captions for i in range(3)] == [("b",), ("zebra", "a second", "a first"), ()]
    assert source[1].columns == {"path": "a.png", "image_id": 5, "license": 3}
    assert source[1].read() == (folder / "val" / "a.png").read_bytes()
    assert source.size(1) == (folder / "val" / "a.png").stat().st_size
    assert source.size(2) == 0
    with pytest.raises(BadSample):
        source[2].read()


def test_coco_captions(coco, run, capsys):
    listed = coco / "annotations" / "captions_val.json"
    check_coco(open_source(listed, image_root=coco / "val", captions_required=True), coco)
    assert "1 captions are of no image that it lists" in capsys.readouterr().err
    assert run("pack", listed, "--image-root", coco / "val", "--out", coco / "s").status == 1
    (line,) = [json.loads(line) for line in (coco / "s" / "ledger.jsonl").read_text().splitlines()]
    assert (line["key"], line["row"]) == ("none.png", 2)


def test_an_image_of_coco_without_a_caption_is_in_the_ledger(coco, run):
    Image.new("RGB", (4, 4)).save(coco / "val" / "none.png")
    assert run("pack", coco / "annotations/captions_val.json", "--image-root", coco / "val", "--out", coco / "s").status
    line = json.loads((coco / "s" / "ledger.jsonl").read_text())
    assert line == {"row": 2, "key": "none.png", "reason": "the sample has no caption"}


def test_cocos_boxes_are_no_captions(tmp_path):
    boxes = {**COCO, "annotations": [{"id": 1, "image_id": 5, "bbox": [0, 0, 1, 1]}]}
    (tmp_path / "instances.json").write_text(json.dumps(boxes))
    with pytest.raises(ClipkitError, match="has no caption column; its columns are file_name, image_id, license"):
        open_source(tmp_path / "instances.json", captions_required=True)
    assert len(open_source(tmp_path / "instances.json")) == 3


def test_a_json_list_of_objects_is_a_list(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    assert open_source(tmp_path / "list.json")[0].captions == ('a "quoted" cat', "the same cat")


def test_coco_at_a_url(coco, memory, capsys):
    url, put = memory
    put(coco)
    check_coco(open_source(f"{url}/annotations/captions_val.json", image_root=f"{url}/val"), coco)
    assert "asking for the size and state of 3 remote files" in capsys.readouterr().err


def test_a_list_at_a_url_and_urls_in_a_list(pictures, memory, tmp_path):
    url, put = memory
    put(pictures.parent)
    here, there = open_source(pictures), open_source(f"{url}/list.tsv")
    assert there.remote
    assert not here.remote
    assert len(here) == len(there)
    assert [there.key(i) for i in range(48)] == [here.key(i) for i in range(48)]
    assert there[5].columns == here[5].columns
    assert there[5].read() == here[5].read()
    assert there.identity() == open_source(f"{url}/list.tsv").identity()
    pack(there, tmp_path / "there", PackOptions(shard_samples=13, workers=2))
    pack(here, tmp_path / "here", PackOptions(shard_samples=13))
    for path in (tmp_path / "here").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    mixed = tmp_path / "mixed.tsv"
    mixed.write_text(f"path\tcaption\n{url}/images/001.png\tfar\n{pictures.parent}/images/002.png\tnear\n")
    source = open_source(mixed)
    assert [source[i].read() for i in range(2)] == [here[1].read(), here[2].read()]
    assert [source[i].extension for i in range(2)] == ["png", "png"]
    before = source.identity()
    fsspec.filesystem("memory").pipe(f"{url}/images/001.png", b"other")
    assert open_source(mixed).identity() != before


def test_a_folder_at_a_url(memory, tmp_path):
    url, put = memory
    for name in ("b/x.JPG", "a.png", ".hidden.png", ".git/c.png"):
        (tmp_path / "f" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "f" / name)
    (tmp_path / "f/a.txt").write_text("a cat")
    (tmp_path / "f/b/x.json").write_text('{"captions": ["one", "two"], "w": 3}')
    put(tmp_path / "f", "deep/f")
    here = open_source(tmp_path / "f", captions_required=True)
    for spec in (f"{url}/deep/f", f"{url}/deep/f/", f"file://{tmp_path}/f"):
        there = open_source(spec, captions_required=True)
        assert [there.key(i) for i in range(len(there))] == ["a.png", "b/x.JPG"]
        for i in range(2):
            assert (there[i].captions, there[i].columns) == (here[i].captions, here[i].columns)
            assert there[i].read() == here[i].read()
            assert there.size(i) == here.size(i)
    with pytest.raises(ClipkitError, match=r"no images in memory://.*/deep/f/a.txt"):
        open_source(f"{url}/deep/f/a.txt")
    with pytest.raises(ClipkitError, match="there is no such file"):
        open_source(f"{url}/nowhere")


def test_shards_at_a_url(shards, memory, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    url, put = memory
    put(shards)
    here = open_source(shards)
    for spec in (url, f"{url}/{{000000..000003}}.tar"):
        there = open_source(spec, captions_required=True)
        assert there.shards.identity() == here.shards.identity()
        assert there[20].read() == here[20].read()
    pack(there, tmp_path / "again", PackOptions(shard_samples=13, workers=2))
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_list_at_a_url_by_the_command(run, refused, pictures, memory, tmp_path):
    url, put = memory
    put(pictures.parent)
    (tmp_path / "list.tsv").write_text("path\tcaption\n001.png\tone\nnone.png\ttwo\n")
    call = ["pack", tmp_path / "list.tsv", "--image-root", f"{url}/images", "--out", tmp_path / "s"]
    assert run(*call).status == 1
    line = json.loads((tmp_path / "s" / "ledger.jsonl").read_text())
    assert line["reason"] == f"{url}/images/none.png: there is no such file"
    assert f"{url}/none.tsv: there is no such file" in refused("pack", f"{url}/none.tsv", "--out", tmp_path / "t")


def test_keys_of_urls_are_plain():
    assert shard_keys(["https://a.org/b/c.d.jpg?size=3#x", "s3://bucket/d.png"]) == ["a.org/b/c_d", "bucket/d"]


def test_images_behind_a_web_server_are_read_by_forked_workers(pictures, shards, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=pictures.parent))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        source = open_source(f"http://127.0.0.1:{server.server_port}/list.tsv")
        pack(source, tmp_path / "s", PackOptions(shard_samples=13, workers=2))
    finally:
        server.shutdown()
        server.server_close()
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()


def test_rows_without_an_image_are_ledger_lines_and_the_rest_is_used(pictures, run, tmp_path):
    first, second = (line.split("\t")[0] for line in pictures.read_text().splitlines()[1:3])
    lines = [{"path": first}, {"path": "", "caption": "b"}, {"caption": "c"}]
    lines += [{"path": f"./{first}", "caption": "a"}, {"path": second, "caption": "d"}]
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("pack", listed, "--image-root", pictures.parent, "--out", tmp_path / "s")
    assert result.status == 1, result
    source = open_source(tmp_path / "s")
    assert [source[i].captions for i in range(len(source))] == [("a",), ("d",)]
    ledger = [json.loads(line) for line in (tmp_path / "s" / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in ledger[:2]] == ["row 2 below the header", "row 3 below the header"]
    listed.write_text('{"path": "", "caption": "b"}\n')
    with pytest.raises(ClipkitError, match="no row names an image in column 'path'"):
        open_source(listed)


def test_coco_with_ids_that_are_none(tmp_path):
    (tmp_path / "c.json").write_text('{"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": []}')
    with pytest.raises(ClipkitError, match=r"images\[0\] has no id or no file_name"):
        open_source(tmp_path / "c.json")


@pytest.mark.parametrize("kind", ["list", "folder", "shards"])
def test_without_its_image_a_sample_says_the_same_and_nothing_large_is_read(pictures, shards, tmp_path, kind):
    folder = shutil.copytree(shards if kind == "shards" else pictures.parent, tmp_path / "copy")
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "003.txt").write_text("beside it")
    source = open_source(folder / "list.tsv" if kind == "list" else folder)
    whole = source[3]
    assert whole.captions
    for path in folder.rglob("*.png"):
        path.unlink()
    if kind == "shards":
        (offset, size) = source.shards.members(3)["png"]
        tar = source.shards.tar_of(3)
        data = bytearray(tar.read_bytes())
        data[offset : offset + size] = bytes(size)
        tar.write_bytes(data)
    found = source.without_image(3)
    assert (found.key, found.captions, found.columns, found.extension) == (
        whole.key,
        whole.captions,
        whole.columns,
        whole.extension,
    )
    assert not isinstance(found.image, bytes)


def test_names_and_captions_that_are_no_unicode_can_be_written(tmp_path, run):
    """A file system takes any bytes for a name, and JSON half of a surrogate pair for a text."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes((tmp_path / "a.png").read_bytes())
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json")).write_text('{"caption": "a \\ud83d cat", "\\udcff": 1}')
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(2)] == ["a.png", "caf\\udce9.png"]
    assert source[1].captions == ("a ? cat",)
    assert source[1].columns == {"path": "caf\\udce9.png", "\\udcff": 1}
    assert source[1].read() == source[0].read()
    (tmp_path / "list.jsonl").write_text(
        '{"path": "caf\\udce9.png", "caption": "half \\ud83d"}\n{"path": "\\udce9.png"}\n'
    )
    listed = open_source(tmp_path / "list.jsonl")
    assert listed[0].captions == ("half ?",)
    assert listed[0].read() == source[0].read()
    assert run("pack", tmp_path / "list.jsonl", "--out", tmp_path / "s").status == 1
    line = json.loads((tmp_path / "s" / "ledger.jsonl").read_text())
    assert line["key"] == "\\udce9.png"


def test_names_that_no_file_can_have_are_lines_of_the_ledger(tmp_path, run):
    """One row of millions may hold a zero byte, or half of a surrogate pair."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"path": name, "caption": "x"} for name in ("a.png", "a\0.png", "\ud83d.png", "long" * 2000)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path / "list.jsonl")
    assert source.identity()
    assert [source.size(i) > 0 for i in range(4)] == [True, False, False, False]
    assert [source.stamp(i).image is None for i in range(4)] == [False, True, True, True]
    assert run("pack", tmp_path / "list.jsonl", "--out", tmp_path / "s").status == 1
    ledger = [json.loads(line) for line in (tmp_path / "s" / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in ledger] == ["a\0.png", "\\ud83d.png", "long" * 2000]
    assert "no file can have this name" in ledger[0]["reason"]


def test_a_path_in_shards_may_be_anything(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    members = {}
    for key, path in {"a": '"half \\ud83d"', "b": "null", "c": "7", "d": '["x"]', "e": '"whole"'}.items():
        members |= {f"{key}.png": image.getvalue(), f"{key}.json": f'{{"path": {path}, "caption": "x"}}'.encode()}
    source = open_source(tar_of(tmp_path / "s.tar", members))
    assert [source[i].columns["path"] for i in range(5)] == ["half ?", "b", "7", "['x']", "whole"]
