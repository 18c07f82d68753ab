"""Embedding survives what folders hold and what machines do: strange files, and a kill at any moment, alone or not."""

import json
import os
import shutil
import struct
import unicodedata
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.data.sources import open_source, sample_id
from clipkit.embedding import Embeddings, EmbedOptions, embed
from tests.conftest import tiny_model
from tests.kills import apart, begin, contents, killed
from tests.samples import encoded, photo, png


def bomb() -> bytes:
    """A PNG of 60,000 by 60,000 pixels in a hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def rotated(image, orientation):
    """The same picture to look at, stored turned, with the Exif tag that says so."""
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image.transpose(turn), "PNG", exif=exif)


def make_strange(folder: Path) -> tuple[set[str], set[str]]:
    """A folder of files of all kinds; returns keys of those that are images, and of those that are none."""
    picture = photo(1, 40, 30)
    good = {
        "upright.png": encoded(picture, "PNG"),
        **{f"turned-{orientation}.png": rotated(picture, orientation) for orientation in (3, 6, 8)},
        "cmyk.jpg": encoded(picture.convert("CMYK")),
        "grey.jpg": encoded(picture.convert("L")),
        "sixteen.png": encoded(Image.fromarray(np.full((9, 9), 30000, np.uint16)), "PNG"),
        "float.tif": encoded(Image.new("F", (9, 9), 0.5), "TIFF"),
        "palette.gif": encoded(picture.convert("P"), "GIF"),
        "clear.webp": encoded(picture.convert("RGBA"), "WEBP"),
        "one pixel.bmp": encoded(Image.new("RGB", (1, 1)), "BMP"),
        "thin.png": encoded(Image.new("RGB", (900, 1)), "PNG"),
        "copies/upright.png": encoded(picture, "PNG"),
        "copies/upright copy.png": encoded(picture, "PNG"),
        "späte bilder/größe.PNG": png(1),
        unicodedata.normalize("NFD", "späte bilder 2/größe.PNG"): png(2),
        "絵文字/🦊,\t'\"\n.jpeg": encoded(photo(3)),
        "not a png.png": encoded(photo(4)),
    }
    whole = encoded(photo(2), "PNG")
    bad = {
        "zero.jpg": b"",
        "truncated.jpg": encoded(photo(2))[:900],
        "truncated.png": whole[: len(whole) // 2],
        "bomb.png": bomb(),
        "text.jpg": b"path,caption",
        "header only.png": whole[:40],
    }
    for name, data in {**good, **bad}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "folder.jpg").symlink_to(folder)  # links to folders are not followed
    latin = os.fsencode(folder) + b"/caf\xe9.png"
    Path(os.fsdecode(latin)).write_bytes(png(5))
    return {*good, "caf\\udce9.png"}, {*bad, "gone.png"}


def embedded(source, model, out, **how):
    options = EmbedOptions(**{"precision": "fp32", "part_size": 4, "batch_size": 3, "threads": 2, **how})
    return embed(open_source(source), model, out, options, model_reference={"fingerprint": "f"})


def test_every_file_is_a_row_or_a_line_of_the_ledger(model, tmp_path):
    good, bad = make_strange(tmp_path / "in")
    for stem, words in {"grey": "\ud800 half a pair", "cmyk": "whole"}.items():
        about = {"captions": [words], "n": 2**70, "\udcff": "\ud83d", "deep": {"\ud800": [1]}}
        (tmp_path / "in" / f"{stem}.json").write_text(json.dumps(about))
    manifest = embedded(tmp_path / "in", model, tmp_path / "e").manifest
    opened = Embeddings.open(tmp_path / "e")
    table = opened.table()
    assert sorted(table["key"].to_pylist()) == sorted(good)
    assert {line["key"] for line in opened.ledger()} == bad
    assert len(open_source(tmp_path / "in")) == len(good) + len(bad)
    assert manifest["counts"]["images"] + manifest["counts"]["left_out"] == len(good) + len(bad)
    assert opened.vectors().shape == (len(good), 32)
    assert np.allclose(np.linalg.norm(opened.vectors(), axis=1), 1, atol=2e-3)
    assert table["id"].to_pylist() == [sample_id(key) for key in table["key"].to_pylist()]
    row = dict(zip(table["key"].to_pylist(), opened.vectors(), strict=True))
    for name in ("turned-3.png", "turned-6.png", "turned-8.png", "copies/upright.png", "copies/upright copy.png"):
        assert row[name] @ row["upright.png"] > 0.9999, name
    about = {line["key"]: line for line in table.to_pylist()}
    assert about["grey.jpg"]["caption"] == "? half a pair"
    assert about["cmyk.jpg"]["n"] == str(2**70)
    assert about["cmyk.jpg"]["\\udcff"] == "?"
    assert about["cmyk.jpg"]["deep"] == '{"?": [1]}'


def test_the_layout_is_what_embedding_reader_needs(model, tmp_path):
    """Files of vectors and of metadata that sort alike, with as many rows each; nothing else in these folders."""
    good, bad = make_strange(tmp_path / "in")
    embedded(tmp_path / "in", model, tmp_path / "e", part_size=1)  # most parts have a row, and some have none
    assert len(Embeddings.open(tmp_path / "e").manifest["parts"]) == len(good) + len(bad)
    vectors = sorted((tmp_path / "e" / "img_emb").iterdir())
    tables = sorted((tmp_path / "e" / "metadata").iterdir())
    assert len(vectors) == len(tables) == len(good)
    assert [path.stem.rpartition("_")[2] for path in vectors] == [path.stem.rpartition("_")[2] for path in tables]
    assert {path.suffix for path in vectors} == {".npy"}
    assert {path.suffix for path in tables} == {".parquet"}
    shapes = [np.load(path, mmap_mode=None).shape for path in vectors]
    assert {len(shape) for shape in shapes} == {2}
    assert [rows for rows, _ in shapes] == [pq.read_metadata(path).num_rows for path in tables]
    for path in vectors:
        with path.open("rb") as handle:
            assert np.lib.format.read_magic(handle) == (1, 0)
            assert np.lib.format.read_array_header_1_0(handle)[1:] == (False, np.dtype("<f2"))
    assert all(rows for rows, _ in shapes)
    everything = np.concatenate([np.load(path) for path in vectors])
    opened = Embeddings.open(tmp_path / "e")
    assert np.array_equal(everything, np.concatenate(list(opened.blocks("image"))))
    assert [len(block) for block in opened.blocks("image")] == [table.num_rows for table in opened.tables("image")]
    assert opened.table().num_rows == len(good)


@pytest.mark.skipif(find_spec("embedding_reader") is None, reason="embedding-reader is not installed")
def test_embedding_reader_reads_it(embeddings):
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(
        embeddings_folder=str(embeddings / "img_emb"),
        metadata_folder=str(embeddings / "metadata"),
        meta_columns=["image_path", "caption"],
        file_format="parquet_npy",
    )
    found = list(reader(batch_size=7, start=0, end=reader.count))
    assert np.array_equal(
        np.concatenate([rows for rows, _ in found]), np.concatenate(list(Embeddings.open(embeddings).blocks("image")))
    )
    told = [path for _, meta in found for path in meta["image_path"].tolist()]
    assert told == Embeddings.open(embeddings).table()["image_path"].to_pylist()


def _killed_anywhere(folder: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model()
    make_strange(folder / "in")
    for number, path in enumerate(sorted((folder / "in").glob("*.png"))):
        path.with_suffix(".txt").write_text(f"picture {number}")

    def work(out, update):
        embedded(folder / "in", model, out, update=update)

    # In processes of their own, so that this one starts no threads and can be forked.
    assert not killed(work, folder / "old" / "e", False, at=10**6)
    (folder / "in" / "turned-3.png").unlink()
    (folder / "in" / "cmyk.txt").write_text("words at last")
    (folder / "in" / "a new one.png").write_bytes(png(77))
    (folder / "in" / "grey.jpg").write_bytes(encoded(photo(78)))
    assert not killed(work, folder / "new" / "e", False, at=10**6)
    shutil.copytree(folder / "old", folder / "updated")
    assert not killed(work, folder / "updated" / "e", True, at=10**6)
    old, new, updated = (contents(folder / name / "e") for name in ("old", "new", "updated"))
    assert new != old
    assert updated.keys() == new.keys()
    kills = {False: 0, True: 0}

    @given(update=st.booleans(), at=st.lists(st.integers(1, 280), min_size=1, max_size=2), together=st.booleans())
    @settings(max_examples=18, deadline=None, database=None)
    def check(update, at, together):
        place = folder / "killed"
        shutil.rmtree(place, ignore_errors=True)
        if update:
            shutil.copytree(folder / "old", place)
        for moment in at:
            if together:  # one of two that share the work; the other one does the rest
                other = begin(work, place / "e", update)
            kills[update] += killed(work, place / "e", update, at=moment)
            if together:
                other.join()
                assert other.exitcode == 0
                break
            if update:
                assert contents(place / "e") in (old, updated)
            elif (place / "e" / "manifest.json").exists():
                assert contents(place / "e").items() >= new.items()
        if not together:
            assert not killed(work, place / "e", update, at=10**6)
        assert [path.name for path in place.iterdir()] == ["e"]
        found, wanted = contents(place / "e"), updated if update else new
        other_names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        assert not other_names, other_names

    check()
    assert sum(kills.values()) > 4, kills


def test_killed_at_any_change_to_the_disk_alone_or_beside_another_it_ends_with_the_same_bytes(tmp_path):
    assert apart(_killed_anywhere, tmp_path) == 0
