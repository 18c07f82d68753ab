"""Which files of a source are looked at, and that each of them has a row."""

import io
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipkit.core import ClipkitError, UnreadSample
from clipkit.data.sources import Globs, open_source
from tests.kills import FORK

PATHS = [
    "a.jpg",
    "B.JPG",
    "c.png",
    "cats/1.jpg",
    "cats/old/2.jpg",
    "cats/old/3.txt",
    "x/cats/4.jpg",
    ".h/5.jpg",
    ".6.jpg",
]


@pytest.mark.parametrize(
    ("include", "exclude", "passing"),
    [
        ([], [], [0, 1, 2, 3, 4, 5, 6]),
        (["**"], [], [0, 1, 2, 3, 4, 5, 6]),
        (["*"], [], [0, 1, 2, 3, 4, 5, 6]),
        (["*.jpg"], [], [0, 1, 3, 4, 6]),
        (["*.JPG"], [], [0, 1, 3, 4, 6]),
        (["/*.jpg"], [], [0, 1]),
        (["./*.jpg"], [], [0, 1]),
        (["cats/*"], [], [3]),
        (["cats/**"], [], [3, 4, 5]),
        (["cats/"], [], [3, 4, 5, 6]),
        (["/cats/"], [], [3, 4, 5]),
        (["**/cats/*"], [], [3, 6]),
        (["**/*.jpg"], [], [0, 1, 3, 4, 6]),
        (["cats/**/*.jpg"], [], [3, 4]),
        (["**/**/old/**/**"], [], [4, 5]),
        (["?.jpg"], [], [0, 1, 3, 4, 6]),
        (["[a-c].*"], [], [0, 2]),
        (["[!a].*"], [], [1, 2, 3, 4, 5, 6]),
        (["*.jpg", "*.png"], ["cats/**"], [0, 1, 2, 6]),
        ([], ["*.jpg"], [2, 5]),
        ([], ["cats/"], [0, 1, 2]),
        (["b.jpg"], [], []),  # the case of the rest does count
        (["*JPG"], [], [1]),
        ([".*"], [], [8]),
        ([".h/*"], [], [7]),
        (["**/.*", "**/.*/**"], ["*.jpg"], []),
        (["*.jpg", ".*.jpg"], [], [0, 1, 3, 4, 6, 8]),
        (["cats"], [], []),
    ],
)
def test_patterns(include, exclude, passing):
    globs = Globs(include, exclude)
    assert [at for at, path in enumerate(PATHS) if globs.passes(path)] == passing
    assert bool(globs) == bool(include or exclude)


@pytest.mark.parametrize(
    ("pattern", "passing"),
    [
        ("Dr.Smith*", ["Dr.Smith.jpg", "Dr.Smith"]),
        ("Dr.Smith*.JPG", ["Dr.Smith.jpg"]),
        ("Dr.smith*", ["Dr.smith.jpg", "Dr.Smith"]),  # of the last, it is the ending
        ("*.J*", ["Dr.Smith.jpg", "Dr.smith.jpg", "v1.B.jPG"]),
        ("*.B*", ["v1.B.jPG"]),
        ("v1.b.*", []),
        ("v1.[!B]*", []),
        ("*.[!j]*g", ["Dr.Smith.jpg", "Dr.smith.jpg", "X.Y/a.png"]),  # a star is of dots too
        ("/X.Y/*.PNG", ["X.Y/a.png"]),
        ("x.y/", []),
        ("X.Y/", ["X.Y/a.png"]),
        ("*[.]jpg", ["Dr.Smith.jpg", "Dr.smith.jpg", "v1.B.jPG"]),
    ],
)
def test_a_dot_within_a_name_begins_no_ending(pattern, passing):
    names = ["Dr.Smith.jpg", "Dr.smith.jpg", "Dr.Smith", "v1.B.jPG", "X.Y/a.png"]
    assert [name for name in names if Globs([pattern]).passes(name)] == passing
    assert [name for name in names if not Globs([], [pattern]).passes(name)] == passing


def by_expression(pattern):
    """A slow twin: the whole pattern as one regular expression, for patterns of full paths without hidden names."""
    built = ""
    for part in re.split(r"(\*\*/|/\*\*$|\*|\?)", pattern):
        built += {"**/": "(?:.*/)?", "/**": "/.+", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    return re.compile(built, re.DOTALL)


NAME = st.text("ab1", min_size=1, max_size=3)


@given(
    st.lists(st.sampled_from(["**", "*", "?", "a", "b1", "a*", "*b"]), min_size=2, max_size=4).map("/".join),
    st.lists(NAME, min_size=1, max_size=5).map("/".join),
)
def test_patterns_of_paths_agree_with_one_expression(pattern, path):
    simple = re.sub(r"\*\*(/\*\*)+", "**", pattern)
    if simple == "**":
        assert Globs([pattern]).passes(path)
    else:
        assert Globs([pattern]).passes(path) == bool(by_expression(simple).fullmatch(path))


def test_many_stars_take_no_time_to_speak_of():
    assert not Globs(["**/a/**/a/**/a/**/a/*b"]).passes("/".join("a" * 40))
    assert not Globs(["*a*a*a*a*a*a*a*ab"]).passes("a" * 60)


@pytest.mark.parametrize("pattern", ["", "/", "../x", "a/../b"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(ClipkitError, match="is no pattern of paths"):
        Globs([pattern])


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.PNG", "cats/1.png", "cats/old/2.png", ".h/3.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8)).save(place / name)
    (place / "a.txt").write_text("a caption")
    (place / "notes.md").write_text("no image")
    (place / "noend").write_bytes((place / "a.png").read_bytes())
    return place


def keys(source):
    return [source.key(row) for row in range(len(source))]


def test_a_folder_by_patterns(folder):
    assert keys(open_source(folder)) == ["a.png", "b.PNG", "cats/1.png", "cats/old/2.png"]
    every = ["a.png", "a.txt", "b.PNG", "cats/1.png", "cats/old/2.png", "noend", "notes.md"]
    assert keys(open_source(folder, globs=Globs(["**"]))) == every
    assert keys(open_source(folder, globs=Globs([], ["cats/"]))) == ["a.png", "b.PNG", "noend", "notes.md"]
    source = open_source(folder, globs=Globs(["*.png"], ["old/"]))
    assert keys(source) == ["a.png", "b.PNG", "cats/1.png"]
    assert source[0].captions == ("a caption",)  # the patterns are of images
    assert keys(open_source(folder, globs=Globs([".h/"]))) == [".h/3.png"]
    with pytest.raises(ClipkitError, match=r"no file in .* passes --include \*\.gif --exclude x; patterns are"):
        open_source(folder, globs=Globs(["*.gif"], ["x"]))
    assert open_source(folder, globs=Globs(["a.*", "b.*"])).identity() != open_source(folder).identity()


def test_captions_of_images_that_are_left_out_are_left_out(tmp_path):
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    assert keys(open_source(tmp_path, globs=Globs([], ["*.png"]))) == ["b.jpg"]
    assert keys(open_source(tmp_path, globs=Globs(["*.txt"], ["*.png"]))) == ["a.txt", "b.txt"]


def test_lists_and_shards_by_patterns(pictures, shards):
    listed = open_source(pictures, globs=Globs(["00?.png"], ["**/*3.png"]))
    assert keys(listed) == [f"images/{n:03d}.png" for n in range(10) if n != 3]
    whole = open_source(pictures)
    assert listed[3].captions == whole[4].captions
    assert (listed.size(3), listed.stamp(3)) == (whole.size(4), whole.stamp(4))
    assert listed.identity() != open_source(pictures, globs=Globs(["00?.png"])).identity()
    packed = open_source(shards, globs=Globs(["*.png"], ["images/04*"]))
    assert len(packed) == 40
    assert packed[5].read() == whole[5].read()
    with pytest.raises(ClipkitError, match=r"no image of .* passes --include \*\.gif; the first is images/000\.png"):
        open_source(pictures, globs=Globs(["*.gif"]))


def test_vectors_by_patterns(run, refused, embeddings, index, model_dir):
    for source in (embeddings, index):
        call = ["classify", source, "--labels", "a,b", "--format", "jsonl"]
        whole = [json.loads(line) for line in run(*call).out.splitlines()]
        rows = [json.loads(line) for line in run(*call, "--include", "00*.png").out.splitlines()]
        assert rows == whole[:10]
        assert "no image passes" in refused(*call, "--include", "*.gif")


def test_embed_takes_patterns(run, folder, model_dir, tmp_path):
    call = ["embed", folder, "--model", model_dir, "--sides", "image", "--out"]
    assert run(*call, tmp_path / "a", "--include", "*.png", "--exclude", "cats/").status == 0
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["counts"]["images"] == 2
    assert run(*call, tmp_path / "b", "--include", "**").status == 1
    ledger = [json.loads(line) for line in (tmp_path / "b" / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in ledger] == ["a.txt", "notes.md"]


# Every kind of file


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def zoo(place):
    """Files that are images, files that are none for a reason, and what is no file."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = picture.convert("P")
    data = encoded(picture, "PNG")
    good = {
        "rgb.JPG": encoded(picture, "JPEG"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "turned.jpeg": encoded(picture, "JPEG", exif=exif),
        "deep.png": encoded(Image.fromarray(rng.integers(0, 65535, (40, 48), np.uint16)), "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=0),
        "moving.gif": encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)], duration=50),
        "web.webp": encoded(picture.convert("RGBA"), "WEBP"),
        "av.avif": encoded(picture, "AVIF"),
        "scan.TIFF": encoded(picture.convert("1"), "TIFF"),
        "old.bmp": encoded(picture, "BMP"),
        "with space.png": data,
        "grüße 猫.png": data,
        "two\nlines.png": data,
        "-dash.png": data,
        "wrong-ending.gif": data,
        "same.png": data,
    }
    bomb = bytearray(data)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    bad = {
        "cut.png": (data[: len(data) // 2], "cannot be decoded"),
        "cut.jpg": (good["rgb.JPG"][:300], "Truncated File Read|cannot be decoded"),
        "empty.png": (b"", r"the file is empty \(0 bytes\)"),
        "bomb.png": (bytes(bomb), "60000x60000 pixels exceed the limit"),
        "text.jpg": (b"hello", "not an image that Pillow knows"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "pip install pillow-heif|cannot be|not an image|broken"),
    }
    place.mkdir()
    for name, content in good.items():
        (place / name).write_bytes(content)
    for name, (content, _) in bad.items():
        (place / name).write_bytes(content)
    (place / "link.png").symlink_to("same.png")
    (place / "dangling.png").symlink_to("nowhere.png")
    (place / "loop.png").symlink_to("loop.png")
    (place / "folder.png").mkdir()
    (place / "to-folder").symlink_to(place)
    (place / ".hidden.png").write_bytes(data)
    os.mkfifo(place / "pipe.png")
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= {"dangling.png": "No such file", "loop.png": "symbolic links", "pipe.png": "no file but a pipe"}
    return {*good, "link.png"}, reasons


def test_every_file_has_a_row_and_the_unreadable_are_listed(run, model_dir, tmp_path):
    good, bad = zoo(tmp_path / "zoo")
    call = ["classify", tmp_path / "zoo", "--labels", "cat,dog", "--model", model_dir]
    result = run(*call, "--format", "jsonl")
    rows = {row["path"]: row for row in map(json.loads, result.out.splitlines())}
    assert result.status == 1
    assert {name for name, row in rows.items() if row["status"] == "ok"} == good
    assert {name for name, row in rows.items() if row["status"] == "unreadable"} == set(bad)
    for name, reason in bad.items():
        assert re.search(reason, rows[name]["reason"]), rows[name]
        assert name in result.err
    assert rows["same.png"]["score"] == rows["link.png"]["score"]
    assert "links to folders are not followed: to-folder" in result.err
    (tmp_path / "zoo" / "notes.md").write_text("hello")
    every = run(*call, "--format", "csv", "--include", "**", "--include", ".*")
    assert every.status == 1
    assert every.out.count(",unreadable,") == len(bad) + 1
    assert every.out.count(",ok,") == len(good) + 1
    human = run(*call)
    assert "two\\nlines.png" in human.out


def test_a_folder_that_must_not_be_read_is_named():
    tmp_path = Path(tempfile.mkdtemp())  # where others than its owner come to
    for name in ("open/a.png", "shut/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    tmp_path.chmod(0o755)
    (tmp_path / "shut").chmod(0)
    here, there = FORK.Pipe()

    def look():
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may read everything
        try:
            source = open_source(tmp_path)
            there.send((keys(source), source.problems))
        except ClipkitError as error:
            there.send(str(error))

    process = FORK.Process(target=look)
    process.start()
    found = here.recv()
    process.join()
    (tmp_path / "shut").chmod(0o755)
    shutil.rmtree(tmp_path)
    reason = "the folder cannot be read: Permission denied"
    assert found == (["open/a.png"], [{"key": "shut", "reason": reason, "unread": True}])


def test_heic_is_read_where_that_is_installed(run, model_dir, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (the extra heif)")
    from clipkit.images import decode, identify

    picture = Image.new("RGB", (64, 48), "navy")
    picture.paste("red", (0, 0, 32, 24))
    pillow_heif.from_pillow(picture).save(tmp_path / "a.HEIC", quality=95)
    pillow_heif.from_pillow(picture.convert("RGBA")).save(tmp_path / "b.heif", quality=95)
    for name in ("a.HEIC", "b.heif"):
        seen = decode(tmp_path / name)
        assert (seen.mode, seen.size) == ("RGB", (64, 48))
        assert np.abs(np.asarray(seen).astype(int) - np.asarray(picture)).mean() < 6
        assert identify(tmp_path / name) == ("HEIF", 64, 48)
    data = (tmp_path / "a.HEIC").read_bytes()
    (tmp_path / "cut.heic").write_bytes(data[: len(data) // 2])
    result = run("classify", tmp_path, "--labels", "a,b", "--model", model_dir, "--format", "jsonl")
    assert [json.loads(line)["status"] for line in result.out.splitlines()] == ["ok", "ok", "unreadable"]


def test_heic_says_what_to_install_and_is_tried_again(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr("PIL.Image.ID", [kind for kind in Image.ID if "HEIF" not in kind])
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    from clipkit.images import decode

    with pytest.raises(UnreadSample, match="pip install pillow-heif"):
        decode(Path(tmp_path / "b.heic"))
    call = ["classify", tmp_path, "--labels", "a,b", "--model", model_dir, "--format", "jsonl"]
    first = run(*call)
    assert (
        json.loads(first.out.splitlines()[1])["reason"] == "HEIC images need another package: pip install pillow-heif"
    )
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setattr(
        "clipkit.images.decoding._opened", lambda data: Image.open(io.BytesIO(encoded(Image.new("L", (9, 9)), "PNG")))
    )
    again = run(*call)  # as if it had been installed meanwhile: nothing was kept of it
    assert [json.loads(line)["status"] for line in again.out.splitlines()] == ["ok", "ok"]
