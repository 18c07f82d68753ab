"""Embedding: the exchange layout, nothing lost, and a kill costs a part at most."""

import json
import shutil
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.data.sources import open_source, sample_id
from clipkit.embedding import Embeddings, EmbedOptions, embed_source
from clipkit.embedding import loading as room
from clipkit.storage import Stage
from tests.conftest import tiny_model
from tests.distributed import run_together


def test_the_layout_is_clip_retrievals(embeddings, pictures, model):
    assert sorted(p.name for p in embeddings.iterdir()) == [
        "captions",
        "img_emb",
        "manifest.json",
        "metadata",
        "stamps",
        "text_emb",
    ]
    names = [p.name for p in sorted((embeddings / "img_emb").iterdir())]
    assert names == ["img_emb_0000.npy", "img_emb_0001.npy", "img_emb_0002.npy"]
    source = open_source(pictures)
    image = np.concatenate([np.load(embeddings / "img_emb" / name) for name in names])
    assert image.dtype == np.float16
    assert image.shape == (48, 32)
    wanted = model.embed_images([source[i].read() for i in range(48)])
    assert np.allclose(image, wanted, atol=1e-3)
    text = np.concatenate([np.load(p) for p in sorted((embeddings / "text_emb").iterdir())])
    assert np.allclose(text, model.embed_texts([source[i].captions[0] for i in range(48)]), atol=1e-3)
    table = pq.read_table(sorted((embeddings / "metadata").iterdir())[1]).to_pylist()
    assert len(table) == 20
    assert table[3] == {
        "id": sample_id("images/023.png"),
        "key": "images/023.png",
        "image_path": "images/023.png",
        "caption": source[23].captions[0],
        "number": "23",
    }


def test_several_captions_have_rows_that_lead_to_their_image(captioned, model, tmp_path):
    from clipkit.embedding import embed

    embed(
        open_source(captioned),
        model,
        tmp_path / "e",
        EmbedOptions(precision="fp32", part_size=5),
        model_reference={"fingerprint": "f"},
    )
    opened = Embeddings.open(tmp_path / "e")
    assert opened.manifest["counts"] == {"images": 12, "captions": 36, "left_out": 0, "parts": 3}
    captions, images = opened.table("text"), opened.table("image")
    assert captions["image_row"].to_pylist() == [i for i in range(12) for _ in range(3)]
    assert captions["image_id"].to_pylist() == images["id"].take(captions["image_row"]).to_pylist()
    assert opened.vectors("text").shape == (36, 32)
    assert np.allclose(opened.vectors("text"), model.embed_texts(captions["caption"].to_pylist()), atol=1e-3)


def test_every_input_is_a_row_or_a_line_of_the_ledger(run, model_dir, tmp_path):
    folder = tmp_path / "in"
    (folder / "späte bilder").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for name, mode in {
        "rgb.png": "RGB",
        "späte bilder/grau.JPG": "L",
        "cmyk.jpg": "CMYK",
        "p.gif": "P",
        "a.webp": "RGBA",
    }.items():
        noise.convert(mode).save(folder / name)
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(folder / "sixteen.png")
    (folder / "cut.png").write_bytes((folder / "rgb.png").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("path,caption")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    result = run("embed", folder, "--model", model_dir, "--out", tmp_path / "e")
    assert result.status == 1
    assert "4 could not be used" in result.err
    keys = set(Embeddings.open(tmp_path / "e").table()["key"].to_pylist())
    ledger = [json.loads(line) for line in (tmp_path / "e" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["key"] for line in ledger} == {"cut.png", "empty.jpg", "text.jpg", "gone.png"}
    assert len(keys) == 6
    assert keys | {line["key"] for line in ledger} == {open_source(folder).key(i) for i in range(10)}


def test_columns_of_any_kind_survive(run, pictures, model_dir, tmp_path):
    rows = [
        {"path": "images/000.png", "caption": "a", "x": "text", "tags": ["p", "q"]},
        {"path": "images/001.png", "caption": "b", "x": 1, "late": float("nan")},
        {"path": "images/002.png", "caption": "c", "x": 2.5, "late": 3, "score": 7},
        {"path": "images/003.png", "caption": "d", "late": "word"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "e"
    call = ["embed", tmp_path / "list.jsonl", "--image-root", pictures.parent, "--model", model_dir, "--part-size", "3"]
    assert run(*call, "--out", out).status == 0
    table = Embeddings.open(out).table().to_pylist()
    assert [row["x"] for row in table] == ["text", "1", "2.5", None]
    assert [row["tags"] for row in table] == ['["p", "q"]', None, None, None]
    assert [row["late"] for row in table][2:] == ["3", "word"]
    assert table[2]["score_"] == 7
    assert run("build", out, "--out", tmp_path / "i").status == 0
    found = json.loads(run("search", tmp_path / "i", "x", "--format", "json").out)
    assert all(-1 <= row["score"] <= 1 for row in found)


def together(rank, port=1):
    """What torchrun tells a process, with nobody at the address."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in told.items()}, "MASTER_ADDR": "127.0.0.1"}


def test_processes_that_were_started_together_share_the_work_and_one_sums_up(pictures, model_dir, tmp_path):
    call = ["embed", pictures, "--model", model_dir, "--part-size", "2", "--precision", "fp32", "--out", tmp_path / "e"]
    done = run_together(*call, processes=2)
    assert [status for _, status in done] == [0, 0], done
    said = [err for err, _ in done]
    assert Embeddings.open(tmp_path / "e").vectors("image").shape == (48, 32)
    summed_up = ["48 images and 48 captions" in each for each in said]
    assert sorted(summed_up) == [False, True], said
    other = said[summed_up.index(False)]
    assert other.count("\n") == 1
    assert "another process finished it" in other or "finished before" in other


def test_whatever_its_rank_it_waits_for_nobody_and_who_commits_sums_up(run, pictures, model_dir, tmp_path, monkeypatch):
    for name, value in together(1).items():
        monkeypatch.setenv(name, value)
    result = run("embed", pictures, "--model", model_dir, "--out", tmp_path / "e")
    assert result.status == 0
    assert "48 images and 48 captions" in result.err
    assert "next: clipkit build" in result.err
    assert not torch.distributed.is_initialized()
    result = run("embed", pictures, "--model", model_dir, "--out", tmp_path / "e")
    assert result.err.endswith("/e: finished before, of the same input; nothing was done\n")


@pytest.mark.parametrize(("told", "share"), [(None, 12), ("1", 12), ("5", 2), ("40", 1), ("", 12)])
def test_processes_that_were_started_together_share_the_cores_for_decoding(pictures, model, monkeypatch, told, share):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if told is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    used = []
    monkeypatch.setattr(room, "cores", lambda: 12)
    monkeypatch.setattr(room, "in_threads", lambda load, rows, threads, ahead: used.append(threads) or map(load, rows))
    embed_source(open_source(pictures), model, rows=range(2), show=None)
    assert used == [share]


def test_who_comes_too_late_to_commit_says_so(run, embeddings, pictures, model_dir, tmp_path, monkeypatch):
    def meanwhile(self, _):
        manifest = json.loads((embeddings / "manifest.json").read_text())
        (self.folder / "manifest.json").write_text(json.dumps({**manifest, "identity": self.identity}))
        return iter(())

    monkeypatch.setattr(Stage, "pending", meanwhile)
    result = run("embed", pictures, "--model", model_dir, "--out", tmp_path / "e")
    assert result == (0, "", f"{tmp_path / 'e'}: another process finished it\n")


def test_the_same_again_does_nothing_and_a_changed_file_is_noticed(run, refused, model_dir, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    out = tmp_path / "out" / "e"
    assert run("embed", tmp_path, "--model", model_dir, "--out", out).status == 0
    before = (out / "img_emb/img_emb_0000.npy").stat().st_mtime_ns
    assert run("embed", tmp_path, "--model", model_dir, "--out", out).status == 0
    assert (out / "img_emb/img_emb_0000.npy").stat().st_mtime_ns == before
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    assert "made from other input" in refused("embed", tmp_path, "--model", model_dir, "--out", out)
    assert run("embed", tmp_path, "--model", model_dir, "--out", out, "--overwrite").status == 0


def test_one_side_only(run, pictures, model_dir, tmp_path):
    assert run("embed", pictures, "--model", model_dir, "--sides", "image", "--out", tmp_path / "i").status == 0
    assert Embeddings.open(tmp_path / "i").sides == ["image"]
    assert run("embed", pictures, "--model", model_dir, "--sides", "text", "--out", tmp_path / "t").status == 0
    opened = Embeddings.open(tmp_path / "t")
    assert opened.sides == ["text"]
    assert opened.vectors("text").shape == (48, 32)
    assert not (tmp_path / "t" / "img_emb").exists()


FILES = ["img_emb/img_emb_0001.npy", "text_emb/text_emb_0000.npy", "metadata/metadata_0002.parquet"]
FILES += ["captions/captions_0001.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_altered_is_named(refused, embeddings, tmp_path, name):
    shutil.copytree(embeddings, tmp_path / "e")
    path = tmp_path / "e" / name
    data = path.read_bytes()
    Embeddings.open(tmp_path / "e").verify()
    path.write_bytes(data[:-1])
    with pytest.raises(ClipkitError, match=f"{name} has {len(data) - 1:,} bytes, but {len(data):,} were written"):
        Embeddings.open(tmp_path / "e")
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    opened = Embeddings.open(tmp_path / "e")
    with pytest.raises(ClipkitError, match=f"{name} was altered"):
        opened.verify()
    line = refused("build", tmp_path / "e", "--verify", "--out", tmp_path / "i")
    assert f"{name} was altered after it was written" in line
    assert not (tmp_path / "i").exists()
    path.unlink()
    assert f"{name} is missing; bring it back" in refused("build", tmp_path / "e", "--out", tmp_path / "i")


def test_checksums_are_those_of_b2sum(embeddings):
    written = {
        name: told for part in Embeddings.open(embeddings).manifest["parts"] for name, told in part["files"].items()
    }
    there = [path for path in sorted(embeddings.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    assert sorted(written) == [str(path.relative_to(embeddings)) for path in there]
    said = subprocess.run(["b2sum", *there], capture_output=True, text=True, check=True).stdout.split()
    assert [written[str(path.relative_to(embeddings))]["blake2b"] for path in there] == said[::2]
    assert [written[str(path.relative_to(embeddings))]["bytes"] for path in there] == [p.stat().st_size for p in there]


def test_what_an_older_clipkit_wrote_is_read_without_checksums(run, embeddings, refused, tmp_path):
    shutil.copytree(embeddings, tmp_path / "e")
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    for part in manifest["parts"]:
        del part["files"]
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
    assert run("build", tmp_path / "e", "--out", tmp_path / "i").status == 0
    assert "has no checksums" in refused("build", tmp_path / "e", "--verify", "--out", tmp_path / "j")
    path = tmp_path / "e" / "img_emb" / "img_emb_0001.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(ClipkitError, match=r"img_emb_0001\.npy has shape \(19, 32\), the manifest says \(20, 32\)"):
        Embeddings.open(tmp_path / "e").vectors()
    path.unlink()
    with pytest.raises(ClipkitError, match=r"img_emb_0001\.npy is missing or broken"):
        Embeddings.open(tmp_path / "e").vectors()


def test_two_samples_with_one_id_are_named(model, tmp_path, monkeypatch):
    from clipkit.data.sources import sample
    from clipkit.embedding import embed

    for number in range(5):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(sample, "sample_id", lambda key: 7 if key in ("1.png", "4.png") else sample_id(key))
    with pytest.raises(ClipkitError, match=r"'4\.png' and '1\.png' have the same id; rename one"):
        embed(
            open_source(tmp_path),
            model,
            tmp_path / "e",
            EmbedOptions(precision="fp32", part_size=2),
            model_reference={"fingerprint": "f"},
        )


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_broken_model_is_named_and_its_vectors_are_not_kept(pictures, tmp_path, side):
    from clipkit.embedding import embed

    model = tiny_model()
    broken = model.backbone.visual.proj if side == "image" else model.backbone.text_projection
    with torch.no_grad():
        broken[3, 5] = float("nan")
    with pytest.raises(ClipkitError, match="is not finite; its weights are broken"):
        options = EmbedOptions(precision="fp32")
        embed(open_source(pictures), model, tmp_path / "e", options, model_reference={"fingerprint": "f"})
    assert not list((tmp_path / "e").rglob("*.npy"))
    assert not (tmp_path / "e" / "manifest.json").exists()


def test_a_part_that_is_made_again_leaves_nothing_of_what_it_was_before(model, tmp_path, monkeypatch):
    """Killed before its record was written, and now nothing of it can be read: other readers take every file."""
    from clipkit.data.sources import Sample, sample
    from clipkit.embedding import embed

    for number in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("words")

    def make():
        options = EmbedOptions(precision="fp32", part_size=2)
        return embed(open_source(tmp_path), model, tmp_path / "e", options, model_reference={"fingerprint": "f"})

    def killed(self, name, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "finish_part", killed)
        with pytest.raises(KeyboardInterrupt):
            make()
    read = Sample.read

    def fails(self):
        if self.key in ("0.png", "1.png"):
            raise sample.UnreadSample("cannot be read: Stale file handle")
        return read(self)

    monkeypatch.setattr(Sample, "read", fails)
    assert make().manifest["counts"]["images"] == 2
    names = sorted(path.name for path in (tmp_path / "e").rglob("*_0000.*"))
    assert names == ["stamps_0000.parquet"]
