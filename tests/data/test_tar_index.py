"""Sidecars: what stands where in a tar, kept beside it or in the user's cache, and never trusted when stale."""

import io
import tarfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.data.shards import Shards, tar_index
from clipkit.data.shards.tar_index import index_tar, load_index, read_defects, write_defects, write_index
from tests.samples import tar_of

NAMES = st.tuples(st.sampled_from(["a", "b", "d/a", "é", "x" * 120]), st.sampled_from(["jpg", "txt", "json", "cls"]))


@given(st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_every_member_stands_where_the_index_says(tmp_path_factory, members):
    """The slow twin reads the tar from front to back."""
    path = tar_of(tmp_path_factory.mktemp("t") / "a.tar", [(f"{key}.{ext}", data) for (key, ext), data in members])
    expected: dict[str, dict[str, bytes]] = {}
    for (key, ext), data in members:
        expected.setdefault(key, {}).setdefault(ext, data)
    write_index(path, index_tar(path))
    index = load_index(path)
    assert index is not None
    raw = path.read_bytes()
    found = {
        index.key(i): {ext: raw[offset : offset + size] for ext, (offset, size) in index.members(i).items()}
        for i in range(len(index))
    }
    assert found == expected
    assert list(found) == list(expected)
    assert len(index.problems) == len(members) - sum(len(m) for m in expected.values())
    keys = list(expected)
    assert [keys[i] for i in index.without_image] == [k for k in keys if "jpg" not in expected[k]]
    assert [keys[i] for i in index.without_text] == [k for k in keys if not {"txt", "json"} & set(expected[k])]
    assert index.key_range == ((min(keys), max(keys)) if keys else ("", ""))
    fresh = index_tar(path)
    assert (fresh.digest, fresh.extensions, fresh.problems) == (index.digest, index.extensions, index.problems)


def test_a_folder_that_cannot_be_written_has_its_sidecars_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    tar = tar_of(tmp_path / "theirs" / "a.tar", [("k.jpg", b"1"), ("k.txt", b"a")])
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    write = tar_index.atomic_write

    def refuse(path, mode="wb"):
        if path.parent == tar.parent:
            raise ClipkitError("cannot write")
        return write(path, mode)

    monkeypatch.setattr(tar_index, "atomic_write", refuse)
    monkeypatch.setattr("clipkit.core.files.atomic_write", refuse)
    shards = Shards.open(str(tar))
    shards.keep_defects(0, {"k": "broken"})
    assert [path.name for path in tar.parent.iterdir()] == ["a.tar"]
    assert len(list((tmp_path / "cache" / "sidecars").iterdir())) == 2
    monkeypatch.setattr(tar_index, "index_tar", None)  # found, not made again
    assert load_index(tar) is not None
    assert Shards.open(str(tar)).defects(0) == {"k": "broken"}


def test_nothing_can_be_written_anywhere(tmp_path, monkeypatch, capsys):
    tar = tar_of(tmp_path / "a.tar", [("k.txt", b"a")])

    def refuse(path, mode="wb"):
        raise ClipkitError("cannot write")

    monkeypatch.setattr(tar_index, "atomic_write", refuse)
    assert len(Shards.open(str(tar))) == 1
    assert "what was learnt of" in capsys.readouterr().err


def test_defects_count_for_the_tar_that_was_checked(tmp_path):
    tar = tar_of(tmp_path / "a.tar", [("k.txt", b"a")])
    assert read_defects(tar) == {}
    write_defects(tar, {"k": "why"})
    assert read_defects(tar) == {"k": "why"}
    tar_of(tar, [("k.txt", b"a"), ("l.txt", b"b")])
    assert read_defects(tar) == {}
    (tmp_path / "a.defects.json").write_text("{")
    assert read_defects(tar) == {}


def test_a_sidecar_of_another_layout_is_made_anew(tmp_path):
    tar = tar_of(tmp_path / "a.tar", [("k.txt", b"a")])
    table = pa.table({"key": ["k"]}).replace_schema_metadata({"layout": "1", "tar": tar_index.stamp_of(tar)})
    with pa.OSFile(str(tmp_path / "a.idx.arrow"), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    assert load_index(tar) is None
    assert Shards.open(str(tar))[0] == {"txt": b"a"}
    assert load_index(tar) is not None


def test_a_name_that_is_no_utf8_has_a_key(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("caf\xe9.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"a"))
    shards = Shards.open(str(tmp_path / "a.tar"))
    assert shards.key(0) == "caf\\xe9"
    assert shards[0] == {"txt": b"a"}


def test_a_tar_that_is_gone_is_named(tmp_path):
    with pytest.raises(ClipkitError, match=r"cannot read .*a\.tar: No such file"):
        index_tar(tmp_path / "a.tar")
