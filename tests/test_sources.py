"""Folders, lists and shards as one thing."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.errors import BadSample, ClipkitError
from clipkit.sources import check_ids, open_source, sample_id

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


def test_two_keys_with_one_id_are_refused():
    check_ids(["a", "b", "c"], [1, 2, 3])
    with pytest.raises(ClipkitError, match="'b' and 'a' have the same id"):
        check_ids(["a", "b"], [1, 1])


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
