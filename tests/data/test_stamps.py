"""Stamps of samples: by what it is known that one has not changed."""

import os
import shutil

import fsspec
from PIL import Image

from clipkit.data import PackOptions, pack
from clipkit.data.sources import open_source
from clipkit.data.sources.list_file import ListSource


def stamps(spec, **how):
    source = open_source(spec, **how)
    return {source.key(i): source.stamp(i) for i in range(len(source))}


def changes(before, after):
    """Keys whose image, and keys whose words have another stamp; both must have the same keys."""
    assert before.keys() == after.keys()
    return tuple({key for key in before if before[key][side] != after[key][side]} for side in (0, 1))


def test_stamps_of_a_folder_tell_what_has_changed(tmp_path):
    for name in ("a.png", "b.png", "deep/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("b")
    before = stamps(tmp_path)
    assert all(len(stamp) == 16 for pair in before.values() for stamp in pair)
    assert len({stamp for pair in before.values() for stamp in pair}) == 6
    assert stamps(tmp_path) == before
    Image.new("RGB", (5, 4)).save(tmp_path / "deep/a.png")
    first = stamps(tmp_path)
    assert changes(before, first) == ({"deep/a.png"}, set())
    (tmp_path / "b.txt").write_text("another b")
    (tmp_path / "a.json").write_text("{}")
    second = stamps(tmp_path)
    assert changes(first, second) == (set(), {"a.png", "b.png"})
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content)
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert changes(second, stamps(tmp_path)) == ({"a.png"}, set())
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    assert stamps(tmp_path)["b.png"].image is None


def test_stamps_of_a_list_are_of_the_files_and_of_the_rows_that_name_them(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    listed = tmp_path / "list.csv"
    listed.write_text("path,caption,x\na.png,one,1\nb.png,two,2\na.png,three,3\n")
    before = stamps(listed)
    listed.write_text("path,caption,x\nb.png,two,2\na.png,one,1\na.png,three,3\n")
    assert stamps(listed) == before
    listed.write_text("path,caption,x\na.png,one,1\nb.png,two,4\na.png,three,3\n")
    assert changes(before, stamps(listed)) == (set(), {"b.png"})
    listed.write_text("path,caption,x\na.png,one,1\nb.png,two,2\n")
    assert changes(before, stamps(listed)) == (set(), {"a.png"})
    assert changes(before, stamps(listed, caption_column="x")) == (set(), {"a.png", "b.png"})
    (tmp_path / "b.png").unlink()
    assert stamps(listed)["b.png"].image is None


def test_stamps_of_shards_are_of_the_shard_and_the_place_in_it(pictures, shards, tmp_path):
    before = stamps(shards)
    assert len({stamp for pair in before.values() for stamp in pair}) == 2 * 48
    lines = pictures.read_text().splitlines(keepends=True)
    shutil.copytree(pictures.parent / "images", tmp_path / "images")
    (tmp_path / "list.tsv").write_text("".join([*lines[:-1], lines[-1].replace("\t", "\tsurely ", 1)]))
    pack(open_source(tmp_path / "list.tsv"), tmp_path / "again", PackOptions(shard_samples=13))
    last = {key for key in before if int(key[-3:]) >= 39}
    assert changes(before, stamps(tmp_path / "again")) == (last, last)
    shutil.copytree(tmp_path / "again", tmp_path / "elsewhere")
    assert stamps(tmp_path / "elsewhere") == stamps(tmp_path / "again")
    (tmp_path / "elsewhere" / "manifest.json").unlink()  # what others made has no checksums
    first = stamps(tmp_path / "elsewhere" / "{000000..000003}.tar")
    os.utime(tmp_path / "elsewhere" / "000001.tar", ns=(1, 1))
    second = {f"images/{number:03d}" for number in range(13, 26)}
    assert changes(first, stamps(tmp_path / "elsewhere" / "{000000..000003}.tar")) == (second, second)


def test_stamps_at_a_url_go_as_far_as_the_server_tells(pictures, memory, tmp_path, monkeypatch):
    url, put = memory
    put(pictures.parent)
    before = stamps(f"{url}/list.tsv")
    assert stamps(f"{url}/list.tsv") == before
    fsspec.filesystem("memory").pipe(f"{url}/images/001.png", b"other")
    fsspec.filesystem("memory").rm(f"{url}/images/002.png")
    after = stamps(f"{url}/list.tsv")
    assert changes(before, after) == ({"images/001.png", "images/002.png"}, set())
    assert after["images/002.png"].image is None
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    put(tmp_path, "f")
    before = stamps(f"{url}/f")
    fsspec.filesystem("memory").pipe(f"{url}/f/a.txt", b"b")
    assert changes(before, stamps(f"{url}/f")) == (set(), {"a.png"})
    monkeypatch.setattr("clipkit.storage.remote._info", lambda *_: {"size": None})
    assert stamps(f"{url}/f") == {"a.png": (None, None)}


def test_a_clean_copy_has_stamps_of_its_own_keys(shards):
    from clipkit.data.check import scan
    from clipkit.data.check.clean import CleanSource

    scanned, source = scan(str(shards)), open_source(shards)
    kept = CleanSource(scanned, {0, 5})
    assert [kept.stamp(i).image for i in range(46)] == [source.stamp(i).image for i in range(48) if i not in (0, 5)]
    assert len({kept.stamp(i).words for i in range(46)}) == 46
    assert kept.without_image(0).captions == source[1].captions


def test_a_list_of_whose_state_a_server_says_nothing_is_known_by_its_rows(monkeypatch):
    """Two lists of one size, where there is no ETag and no time."""
    found = set()
    for name in ("a.png", "b.png"):
        rows = [{"path": "https://a.org/x.png", "caption": name}]
        monkeypatch.setattr("clipkit.data.sources.list_file.read_rows", lambda spec, rows=rows: rows)
        monkeypatch.setattr("clipkit.data.sources.list_file.stamp", lambda spec: "24")
        monkeypatch.setattr(
            "clipkit.data.sources.files.sizes_and_stamps", lambda urls, **how: [(9, "9 mark")] * len(urls)
        )
        found.add(ListSource("https://a.org/l.tsv", None, None, None, True).identity())
    assert len(found) == 2
