"""`clipkit check`: each defect is found and named, duplicates and leaks too, and a clean copy is clean."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clipkit.core import read_json
from clipkit.data import PackOptions, pack
from clipkit.data.check import FINDING_KINDS, CheckOptions, scan
from clipkit.data.check.scanning import SAMPLE
from clipkit.data.shards import Shards
from clipkit.data.sources import open_source
from clipkit.images import decoding
from clipkit.models import token_counter
from tests.conftest import make_pictures
from tests.core.test_html_report import assert_refers_to_nothing_outside
from tests.samples import encoded, photo, tar_of


def jpeg(seed: int) -> bytes:
    return encoded(photo(seed), quality=90)


def good(first: int, count: int = 3) -> dict[str, bytes]:
    """Members of whole samples, each with a picture and a caption of its own."""
    found = {}
    for seed in range(first, first + count):
        found |= {f"s{seed}.jpg": jpeg(seed), f"s{seed}.txt": f"caption number {seed}".encode()}
    return found


def checked(run, *args):
    """The command's status and its JSON."""
    result = run("check", *args, "--format", "json")
    assert result.status in (0, 1), result
    return result.status, json.loads(result.out)


def places(found, kind):
    return [(line["shard"], line["key"]) for line in found["findings"] if line["kind"] == kind]


def test_a_clean_set_is_clean(run, tmp_path):
    tar_of(tmp_path / "a.tar", good(0))
    tar_of(tmp_path / "b.tar", good(10, 4))
    status, found = checked(run, tmp_path)
    assert (status, found["clean"], found["findings"]) == (0, True, [])
    sizes = sum(len(jpeg(seed)) for seed in [0, 1, 2, 10, 11, 12, 13])
    assert [found[name] for name in ("shards", "samples", "captions", "bytes", "defects")] == [2, 7, 7, sizes, 0]
    assert [found[name] for name in ("width_min", "width_max", "height_median")] == [96, 96, 80]
    assert (found["tokens_median"], found["context_length"], found["captions_cut"]) == (6.0, 77, 0)
    assert run("check", tmp_path, "--strict").status == 0


BAD_SAMPLES = {
    "image_broken": {"x.jpg": jpeg(50)[:-300], "x.txt": b"cut inside"},
    "image_empty": {"x.jpg": b"", "x.txt": b"nothing"},
    "image_missing": {"x.txt": b"no image"},
    "caption_missing": {"x.jpg": jpeg(50)},
    "caption_empty": {"x.jpg": jpeg(51), "x.txt": b"  \n"},
    "caption_broken": {"x.jpg": jpeg(50), "x.txt": b"\xff\xfe\xfa"},
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_bad_sample_is_named_and_remembered_for_training(run, tmp_path, kind):
    tar_of(tmp_path / "a.tar", good(0))
    tar_of(tmp_path / "b.tar", good(10) | BAD_SAMPLES[kind])
    status, found = checked(run, tmp_path)
    assert status == 1
    assert (found["defects"], found[kind]) == (1, 1)
    assert places(found, kind) == [("b.tar", "x")]
    shards = Shards.open(str(tmp_path))
    assert shards.defects(0) == {}
    assert list(shards.defects(1)) == ["x"]
    assert (tmp_path / "a.defects.json").is_file()


def test_other_ways_to_be_bad(run, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)
    members = good(0) | {"x.jpg": jpeg(50), "x.json": b'{"caption"', "y.png": b"no picture", "y.txt": b"y"}
    tar_of(tmp_path / "a.tar", members | {"z.jpg": encoded(photo(51, 200, 100)), "z.txt": b"z"})
    _, found = checked(run, tmp_path)
    assert places(found, "caption_broken") == [("a.tar", "x")]
    assert places(found, "image_broken") == [("a.tar", "y")]
    assert places(found, "image_too_large") == [("a.tar", "z")]
    assert found["defects"] == 3


def test_one_sample_can_be_bad_twice(run, tmp_path):
    tar_of(tmp_path / "a.tar", good(0) | {"x.jpg": b""})
    _, found = checked(run, tmp_path)
    assert {line["kind"] for line in found["findings"]} == {"image_empty", "caption_missing"}
    (reason,) = Shards.open(str(tmp_path)).defects(0).values()
    assert "no caption" in reason
    assert "0 bytes" in reason


def test_quick_reads_headers_and_forgets_nothing_that_a_full_check_knew(run, tmp_path):
    tar_of(tmp_path / "a.tar", good(0) | BAD_SAMPLES["image_broken"])
    assert checked(run, tmp_path)[1]["image_broken"] == 1
    status, found = checked(run, tmp_path, "--quick")
    assert (status, found["quick"], found["image_broken"]) == (0, True, 0)
    assert list(Shards.open(str(tmp_path)).defects(0)) == ["x"]
    tar_of(tmp_path / "a.tar", good(0) | BAD_SAMPLES["image_empty"])
    assert checked(run, tmp_path, "--quick")[1]["image_empty"] == 1


def cut_after_the_last_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    path.write_bytes(path.read_bytes()[:end])


def damage_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[third : third + 512] = b"\x01" * 512
    path.write_bytes(data)


BAD_SHARDS = {
    "shard_empty": lambda path: path.write_bytes(b""),
    "shard_unreadable": lambda path: path.write_bytes(b"this is no tar" * 100),
    "shard_truncated": lambda path: path.write_bytes(path.read_bytes()[: 512 + 700]),
    "between members": cut_after_the_last_member,
    "damaged inside": damage_a_header,
    "no sample": lambda path: tar_of(path, {"README": b"words"}),
}


@pytest.mark.parametrize("how", BAD_SHARDS)
def test_a_bad_shard_is_named_and_stops_nothing(run, tmp_path, how):
    for number, name in enumerate("abc"):
        tar_of(tmp_path / f"{name}.tar", good(10 * number))
    BAD_SHARDS[how](tmp_path / "b.tar")
    kind = {"between members": "shard_truncated", "damaged inside": "shard_truncated", "no sample": "shard_empty"}
    status, found = checked(run, tmp_path)
    assert status == 1
    assert places(found, kind.get(how, how)) == [("b.tar", None)]
    whole = {"between members": 3, "damaged inside": 1}.get(how, 0)
    assert found["samples"] - found["image_missing"] - found["caption_missing"] >= 6 + whole


@pytest.fixture
def packed(tmp_path):
    """Two shards of clipkit's own, three samples each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
        (folder / f"{seed}.txt").write_text(f"picture {seed}")
    pack(open_source(folder), tmp_path / "packed", PackOptions(shard_samples=3))
    return tmp_path / "packed"


def test_shards_are_held_against_their_manifest(run, packed):
    assert checked(run, packed)[0] == 0
    tar = packed / "000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"picture 4", b"picture 9"))
    status, found = checked(run, packed)
    assert (status, places(found, "shard_changed")) == (1, [("000001.tar", None)])
    assert "checksum" in found["findings"][0]["reason"]
    assert places(checked(run, tar)[1], "shard_changed") == [("000001.tar", None)]  # named by itself, too
    tar.write_bytes(data + b"\0" * 10240)
    assert "bytes, the manifest says" in checked(run, packed)[1]["findings"][0]["reason"]
    tar.unlink()
    status, found = checked(run, packed)
    assert (status, places(found, "shard_missing"), found["samples"]) == (1, [("000001.tar", None)], 3)
    assert places(checked(run, packed / "{000000..000001}.tar")[1], "shard_missing") == [("000001.tar", None)]


def test_keys_that_stand_twice(run, tmp_path):
    members = [*good(0).items(), ("s1.jpg", jpeg(40)), ("s1.txt", b"another")]
    tar_of(tmp_path / "in" / "a.tar", members)
    status, found = checked(run, tmp_path / "in")
    assert status == 1
    assert set(places(found, "key_twice")) == {("a.tar", "s1")}
    tar_of(tmp_path / "across" / "a.tar", good(0))
    renamed = {name.replace("s10", "s0"): data for name, data in good(10).items()}
    tar_of(tmp_path / "across" / "b.tar", renamed)
    status, found = checked(run, tmp_path / "across")
    assert (status, places(found, "key_in_other_shard")) == (0, [("b.tar", "s0")])
    assert run("check", tmp_path / "across", "--strict").status == 1


def test_exact_duplicates_are_defects_and_near_ones_notes(run, tmp_path):
    copy, small = encoded(photo(1), quality=60), encoded(photo(2).resize((60, 50)), "PNG")
    more = {"copy.jpg": copy, "copy.txt": b"compressed again", "small.png": small, "small.txt": b"made small"}
    tar_of(tmp_path / "a.tar", good(0) | more)
    status, found = checked(run, tmp_path)
    assert status == 0
    near = [line for line in found["findings"] if line["kind"] == "near_duplicate"]
    assert [(line["key"], line["other_key"]) for line in near] == [("copy", "s1"), ("small", "s2")]
    assert all(line["distance"] <= 6 and not line["defect"] for line in near)
    assert run("check", tmp_path, "--strict").status == 1
    tar_of(tmp_path / "b.tar", {"same.jpg": jpeg(0), "same.txt": b"the same bytes"})
    status, found = checked(run, tmp_path)
    assert (status, found["duplicate"], found["near_duplicate"]) == (1, 1, 2)
    (line,) = [line for line in found["findings"] if line["kind"] == "duplicate"]
    assert (line["shard"], line["key"], line["other_shard"], line["other_key"]) == ("b.tar", "same", "a.tar", "s0")


def test_of_equal_pictures_one_that_can_be_trained_on_stays(run, tmp_path):
    tar_of(tmp_path / "a.tar", {"bare.jpg": jpeg(0), **good(0)})
    _, found = checked(run, tmp_path, "--fix", "--out", tmp_path / "fixed")
    assert places(found, "duplicate") == [("a.tar", "bare")]
    assert [open_source(tmp_path / "fixed").key(i) for i in range(3)] == ["s0", "s1", "s2"]


def test_even_surfaces_are_no_duplicates_of_each_other(run, tmp_path):
    members = good(0)
    for number, grey in enumerate((40, 41, 120, 200)):
        grain = np.random.default_rng(number).integers(-2, 3, (64, 64, 3)) + grey
        members |= {f"flat{number}.jpg": encoded(Image.fromarray(grain.astype(np.uint8))), f"flat{number}.txt": b"grey"}
    tar_of(tmp_path / "a.tar", members)
    status, found = checked(run, tmp_path)
    assert (status, found["near_duplicate"], found["flat_images"]) == (0, 0, 4)
    assert (found["duplicate_captions"], found["samples_with_duplicate_captions"]) == (1, 4)
    assert found["frequent_captions"] == [{"caption": "grey", "samples": 4}]


@pytest.mark.parametrize("form", ["shards", "list", "folder"])
def test_against_finds_copies_however_they_were_made(run, tmp_path, form):
    tar_of(tmp_path / "train" / "a.tar", good(0, 6))
    other = tmp_path / "test"
    other.mkdir()
    photo(0).resize((250, 200), Image.Resampling.LANCZOS).save(other / "bigger.png")
    photo(1).save(other / "smaller.webp", quality=40)
    photo(2).filter(ImageFilter.GaussianBlur(1)).save(other / "blurred.jpg", quality=70)
    (other / "same.jpg").write_bytes(jpeg(3))
    photo(99).save(other / "new.jpg")
    (other / "broken.jpg").write_bytes(jpeg(98)[:400])
    spec = other
    if form == "list":
        spec = tmp_path / "test.tsv"
        spec.write_text("path\n" + "".join(f"test/{path.name}\n" for path in sorted(other.iterdir())))
    elif form == "shards":
        spec = tar_of(tmp_path / "o" / "t.tar", {path.name: path.read_bytes() for path in sorted(other.iterdir())})
    status, found = checked(run, tmp_path / "train", "--against", spec)
    assert (status, found["shared"]) == (1, 4)
    pairs = [(line["key"], Path(line["other_key"]).stem) for line in found["findings"]]
    assert pairs == [("s0", "bigger"), ("s1", "smaller"), ("s2", "blurred"), ("s3", "same")]
    assert found["findings"][3]["distance"] == 0
    assert {line["other"] for line in found["findings"]} == {str(spec)}
    assert found["against"] == [{"source": str(spec), "samples": 6, "unreadable": 1, "shared": 4}]
    assert checked(run, tmp_path / "train", "--against", spec, "--quick")[1]["shared"] == 1


def test_two_other_sets(run, tmp_path):
    for name, first in (("mine", 0), ("one", 2), ("two", 20)):
        tar_of(tmp_path / name / "a.tar", good(first))
    others = ["--against", tmp_path / "two", "--against", tmp_path / "one"]
    status, found = checked(run, tmp_path / "mine", *others)
    assert (status, [line["shared"] for line in found["against"]]) == (1, [0, 1])
    assert checked(run, tmp_path / "mine", *others[:2])[0] == 0


def everything_bad(folder: Path) -> Path:
    """A set with a defect of nearly every kind, and 7 samples to keep."""
    bad = {}
    for number, members in enumerate(BAD_SAMPLES.values()):
        bad |= {f"bad{number}{name[1:]}": data for name, data in members.items()}
    again = {"again.jpg": jpeg(0), "again.txt": b"as s0", "near.webp": encoded(photo(1), "WEBP"), "near.txt": b"as s1"}
    tar_of(folder / "a.tar", good(0) | bad | again)
    tar_of(folder / "b.tar", good(10))
    (folder / "c.tar").write_bytes(b"no tar" * 200)
    return folder


def test_a_fixed_copy_is_clean_and_says_what_it_left_out(run, tmp_path):
    source = everything_bad(tmp_path / "bad")
    status, found = checked(run, source, "--fix", "--out", tmp_path / "fixed")
    assert status == 1
    lines = [json.loads(line) for line in (tmp_path / "fixed" / "ledger.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["kind"]) for line in lines[:1]] == [("c.tar", "shard_unreadable")]
    assert {line["kind"] for line in lines[1:]} == {*BAD_SAMPLES, "duplicate"}
    assert found["samples"] == 7 + len(lines) - 1
    status, again = checked(run, tmp_path / "fixed")
    assert (status, again["samples"], again["near_duplicate"]) == (0, 7, 1)
    before = (tmp_path / "fixed" / "ledger.jsonl").read_bytes()
    assert run("check", source, "--fix", "--out", tmp_path / "fixed").status == 1  # finished: nothing changes
    assert (tmp_path / "fixed" / "ledger.jsonl").read_bytes() == before
    checked(run, source, "--strict", "--fix", "--out", tmp_path / "strict")
    assert checked(run, tmp_path / "strict", "--strict")[1]["samples"] == 6
    shared = tar_of(tmp_path / "test" / "t.tar", good(11, 1))
    checked(run, source, "--against", shared, "--fix", "--out", tmp_path / "unshared")
    assert checked(run, tmp_path / "unshared", "--against", shared)[1]["samples"] == 6


def test_a_fix_that_was_killed_goes_on(run, tmp_path, monkeypatch):
    from clipkit.data.check import clean

    source = everything_bad(tmp_path / "bad")
    monkeypatch.setattr(clean, "write_ledger", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("check", source, "--fix", "--out", tmp_path / "fixed").status == 130
    monkeypatch.undo()
    assert run("check", source, "--fix", "--out", tmp_path / "fixed").status == 1
    assert len((tmp_path / "fixed" / "ledger.jsonl").read_text().splitlines()) == 8
    assert checked(run, tmp_path / "fixed")[0] == 0


def test_a_fixed_copy_tells_equal_keys_of_shards_apart(run, tmp_path):
    for name, seed in (("a", 0), ("b", 10)):
        tar_of(tmp_path / "in" / f"{name}.tar", {"000.jpg": jpeg(seed), "000.txt": name.encode()})
    assert checked(run, tmp_path / "in", "--fix", "--out", tmp_path / "out")[0] == 0
    fixed = open_source(tmp_path / "out")
    assert [(fixed.key(i), fixed[i].captions) for i in range(2)] == [("a/000", ("a",)), ("b/000", ("b",))]


def test_shards_of_one_name_in_two_folders_are_told_apart(run, tmp_path):
    for seed, name in enumerate("ab"):
        tar_of(tmp_path / name / "0.tar", {"k.jpg": jpeg(seed), "k.txt": name.encode(), "e.jpg": b"", "e.txt": b"e"})
    status, found = checked(run, tmp_path / "{a,b}" / "0.tar")
    assert status == 1
    assert places(found, "image_empty") == [("a/0.tar", "e"), ("b/0.tar", "e")]
    run("check", tmp_path / "{a,b}" / "0.tar", "--fix", "--out", tmp_path / "clean")
    packed = Shards.open(str(tmp_path / "clean"))
    assert [packed.key(i) for i in range(len(packed))] == ["a/0/k", "b/0/k"]


def test_lists_and_folders_are_checked_too(run, tmp_path):
    listed = make_pictures(tmp_path / "pictures", 6, captions=2)
    images = tmp_path / "pictures" / "images"
    (images / "001.png").unlink()
    (images / "002.png").write_bytes(b"")
    status, found = checked(run, listed)
    assert status == 1
    assert places(found, "image_missing") == [(None, "images/001.png")]
    assert places(found, "image_empty") == [(None, "images/002.png")]
    status, found = checked(run, images)
    assert (status, found["captions"], found["caption_missing"]) == (1, 0, 0)  # a folder of pictures has no captions
    (images / "002.png").unlink()
    assert run("check", images).status == 0
    (images / "003.txt").write_text("a caption")
    assert places(checked(run, images)[1], "caption_missing") == [(None, f"00{i}.png") for i in (0, 4, 5)]


def test_captions_are_measured_with_the_models_tokenizer(run, tmp_path, model, model_dir):
    long = "a very long caption " * 10
    tar_of(tmp_path / "a.tar", good(0) | {"x.jpg": jpeg(50), "x.txt": long.encode()})
    status, found = checked(run, tmp_path, "--model", model_dir)
    assert (status, found["context_length"], found["captions_cut"], found["tokens_max"]) == (0, 24, 1, 42)
    assert run("check", tmp_path, "--model", model_dir, "--strict").status == 1
    counter = token_counter(str(model_dir))
    texts = ["a red heart", "", "Ünïcode 漢字 42!"]
    kept = [int((row != 0).sum()) for row in model.tokenize(texts)]
    assert counter.count(texts) == kept
    assert token_counter("open_clip:ViT-B-32").count(texts) == counter.count(texts)


def test_a_hugging_face_tokenizer_counts_as_it_cuts(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "red", "heart"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    CLIPConfig(text_config={"max_position_embeddings": 6}, vision_config={}).save_pretrained(tmp_path)
    counter = token_counter(str(tmp_path))
    assert (counter.context_length, counter.count(["a red heart", "a " * 9, ""])) == (6, [3, 9, 0])


def test_the_page_holds_all_it_shows(run, tmp_path):
    source = everything_bad(tmp_path / "bad")
    other = tar_of(tmp_path / "o" / "o.tar", good(12, 1))
    result = run("check", source, "--against", other, "--report", tmp_path / "page", "--format", "json")
    page = (tmp_path / "page" / "index.html").read_text()
    assert_refers_to_nothing_outside(page)
    assert read_json(tmp_path / "page" / "report.json") == json.loads(result.out)
    for text in ("Near duplicates: 1", "Exact duplicates: 1", "Also in the other set: 1", "c.tar", "caption_broken"):
        assert text in page, text
    assert page.count("data:image/") >= 2 + 6 + 7
    assert run("check", source, "--report", tmp_path / "other.html").status == 1
    assert (tmp_path / "other.json").is_file()
    one, two = ((tmp_path / f"{seed}.html") for seed in (1, 2))
    for path in (one, two):
        run("check", source, "--report", path, "--seed", path.stem)
    assert one.read_text() != two.read_text()


def test_forms_of_output(run, tmp_path):
    source = everything_bad(tmp_path / "bad")
    _, found = checked(run, source)
    lines = run("check", source, "--format", "jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == found["findings"]
    assert {"kind", "defect", "shard", "key", "reason", "other_key", "distance"} <= set(json.loads(lines[0]))
    assert run("check", source, "--format", "csv").out.startswith("kind,defect,shard,key,reason,")
    human = run("check", source)
    assert "image_broken" in human.out
    assert "c.tar" in human.out
    for kind, (defect, _) in FINDING_KINDS.items():
        assert found[kind] == len(places(found, kind))
        assert all(line["defect"] == defect for line in found["findings"] if line["kind"] == kind)


def test_what_cannot_be_done_is_status_2(refused, tmp_path):
    tar_of(tmp_path / "s" / "a.tar", good(0))
    assert "no such source" in refused("check", tmp_path / "none")
    assert "belong together" in refused("check", tmp_path / "s", "--fix")
    assert "belong together" in refused("check", tmp_path / "s", "--out", tmp_path / "o")
    assert "which is read to make it" in refused("check", tmp_path / "s", "--fix", "--out", tmp_path)
    assert "no such source" in refused("check", tmp_path / "s", "--against", tmp_path / "none")
    assert "no such model" in refused("check", tmp_path / "s", "--model", "nothing")


def test_a_set_of_unreadable_shards_alone_is_reported(run, refused, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(b"")
    status, found = checked(run, tmp_path / "in", "--report", tmp_path / "page")
    assert (status, found["samples"], found["width_max"]) == (1, 0, None)
    result = run("check", tmp_path / "in", "--fix", "--out", tmp_path / "out")
    assert result.status == 2
    assert "is left for a clean copy" in result.err


def test_the_scan_keeps_few_bytes_and_leaves_the_warning_filters_alone(packed):
    import warnings

    before = list(warnings.filters)
    found = scan(str(packed), CheckOptions(threads=4))
    assert warnings.filters == before
    assert SAMPLE.itemsize == found.samples.nbytes // len(found) == 86
    shutil.rmtree(packed)
