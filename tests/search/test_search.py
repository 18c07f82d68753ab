"""The index answers as brute force does, brings its metadata, and knows its model."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.embedding import Embeddings
from clipkit.search import Index, build_index
from tests.conftest import tiny_model


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("k", [1, 7, 48, 60])
def test_search_is_brute_force(index, embeddings, side, k):
    stored = Embeddings.open(embeddings).vectors(side)
    queries = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    found = Index.open(index).search(queries, k, side)
    scores, rows = found.scores, found.positions
    exact = queries @ stored.T
    # By the scores, not the rows: equal captions have equal vectors, and their order among themselves is open.
    assert np.allclose(scores, -np.sort(-exact, axis=1)[:, :k], atol=1e-5)
    assert np.allclose(scores, np.take_along_axis(exact, rows, axis=1), atol=1e-5)
    assert all(len(set(found)) == min(k, 48) for found in rows.tolist())
    assert scores.shape == (9, min(k, 48))


def test_rows_and_vectors_belong_to_the_positions(index, embeddings):
    opened, stored = Index.open(index), Embeddings.open(embeddings)
    assert opened.sides == ["image", "text"]
    assert len(opened) == 48
    assert opened.rows([5, 3]) == stored.table().take([5, 3]).to_pylist()
    assert np.array_equal(opened.vectors([5, 3]).astype(np.float32), stored.vectors()[[5, 3]])
    row = opened.rows([7], "text")[0]
    assert row["caption"] == stored.table()["caption"].to_pylist()[7]
    assert row["image_path"] == "images/007.png"
    found = opened.search(stored.vectors()[:4], 3, where="image_path < 'images/002'")
    assert found.positions.shape == (4, 2 if len(opened) < 3 else 3)
    assert found.rows == [opened.rows(positions) for positions in found.positions]
    assert [len(rows) for rows in found.rows] == [2] * 4  # the third may not be found


def test_an_index_over_several_folders(run, pictures, captioned, model_dir, tmp_path):
    for name, source in (("a", pictures), ("b", captioned)):
        root = tmp_path / name
        shutil.copytree(source.parent / "images", root / name)
        assert run("embed", root, "--model", model_dir, "--out", tmp_path / f"{name}-emb").status == 0
    assert run("build", tmp_path / "a-emb", tmp_path / "b-emb", "--out", tmp_path / "i").status == 0
    opened = Index.open(tmp_path / "i")
    assert len(opened) == 60
    assert {row["image_path"].split("/")[0] for row in opened.rows(range(60))} == {"a", "b"}
    with pytest.raises(ClipkitError, match="sample of the name .* more than once"):
        build_index([Embeddings.open(tmp_path / "a-emb")] * 2, tmp_path / "j")


def test_the_command_finds_by_text_and_by_image(run, index, pictures, model_dir):
    rows = json.loads(run("search", index, "a red heart", "-k", 5, "--format", "json").out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows == sorted(rows, key=lambda row: -row["score"])
    assert {"rank", "score", "id", "key", "image_path", "caption", "number"} == set(rows[0])
    own = pictures.parent / "images" / "011.png"
    first = json.loads(run("search", index, "--image", own, "-k", 1, "--format", "jsonl").out)
    assert first["image_path"] == "images/011.png"
    assert first["score"] == pytest.approx(1, abs=2e-3)
    lines = run("search", index, "--image", own, "-k", 2, "--format", "csv").out.splitlines()
    assert lines[0].startswith("rank,score,")
    assert len(lines) == 3
    table = run("search", index, "a [bold]star", "--in", "text", "-k", 2).out
    assert "images/" in table
    everything = run("search", index, "x", "-k", 100, "--format", "json")
    assert len(json.loads(everything.out)) == 48
    assert "there are 48 image results" in everything.err


def test_a_moved_index_is_told_its_model(run, refused, index, model_dir, tmp_path):
    moved = tmp_path / "far" / "away" / "index"
    shutil.copytree(index, moved)
    assert "name it with --model" in refused("search", moved, "x")
    assert run("search", moved, "x", "--model", model_dir, "--format", "json").status == 0


def test_another_model_is_refused_with_both_fingerprints(refused, index, model, tmp_path):
    other = tiny_model(seed=9)
    other.save(tmp_path / "other")
    line = refused("search", index, "x", "--model", tmp_path / "other")
    assert model.fingerprint()[:12] in line
    assert other.fingerprint()[:12] in line


def test_embeddings_of_two_models_make_no_index(run, refused, pictures, embeddings, tmp_path):
    tiny_model(seed=9).save(tmp_path / "other")
    assert run("embed", pictures, "--model", tmp_path / "other", "--out", tmp_path / "e").status == 0
    assert "come from different models" in refused("build", embeddings, tmp_path / "e", "--out", tmp_path / "i")


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros((1, 31)), 5, "do not fit an index of dimension 32"),
        (np.zeros(32), 5, "do not fit"),
        (np.full((1, 32), np.nan), 5, "NaN"),
        (np.zeros((1, 32)), 0, "k must be at least 1"),
    ],
)
def test_wrong_queries(index, queries, k, message):
    with pytest.raises(ClipkitError, match=message):
        Index.open(index).search(queries, k)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("segments/000001/image.vectors.faiss", lambda data: data[:500]),
        ("segments/000001/image.vectors.faiss", lambda data: data[:20]),
        ("segments/000001/text.vectors.faiss", lambda data: b""),
        ("segments/000001/image.arrow", lambda data: data[:200]),
        ("generations/000001.json", lambda data: data[:100]),
        ("generations/000001.json", lambda data: data.replace(b'"segments"', b'"segment"')),
        ("current.json", lambda data: b"{}"),
        ("manifest.json", lambda data: data[:50]),
    ],
)
def test_a_cut_or_altered_index_is_named(refused, index, tmp_path, name, damage):
    folder = tmp_path / "index"
    shutil.copytree(index, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert name in refused("search", folder, "x")
    (folder / name).unlink()
    assert name.rpartition("/")[0] in refused("search", folder, "x")


def test_metadata_of_another_length_is_named(refused, index, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(index, folder)
    state = json.loads((folder / "generations/000001.json").read_text())
    state["segments"][0]["rows"]["image"] = 49
    (folder / "generations/000001.json").write_text(json.dumps(state))
    assert "where 49" in refused("search", folder, "x")


def test_wrong_questions(refused, index, tmp_path):
    assert "ask with a text" in refused("search", index)
    assert "2 parts and 3 weights" in refused("search", index, "x", "y", "--weights", "1,2,3")
    assert "numbers with commas" in refused("search", index, "x", "--weights", "1;2")
    assert "cancel each other" in refused("search", index, "x", "--minus", "x")
    assert "no column 'width'" in refused("search", index, "x", "--where", "width > 3")
    assert "no column 'colour' to collapse by" in refused("search", index, "x", "--collapse", "colour")
    assert "no such image" in refused("search", index, "--image", tmp_path / "none.png")
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg: not an image" in refused("search", index, "--image", tmp_path / "text.jpg")
    assert "no such folder" in refused("search", tmp_path / "none", "x")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert "is no clipkit artifact" in refused("search", tmp_path, "x")


def test_other_questions_to_measure_with_are_another_build(run, refused, embeddings, model_dir, tmp_path):
    (tmp_path / "a.txt").write_text("a red heart\na star\n")
    (tmp_path / "b.txt").write_text("a blue star\n")
    build = ["build", embeddings, "--model", model_dir, "--out", tmp_path / "i"]
    assert run(*build, "--queries", tmp_path / "a.txt").status == 0
    assert run(*build, "--queries", tmp_path / "a.txt").status == 0
    for other in ([], ["--queries", tmp_path / "b.txt"]):
        assert "made from other input or settings" in refused(*build, *other)
    assert run(*build, "--queries", tmp_path / "b.txt", "--overwrite").status == 0
    assert np.load(tmp_path / "i" / "queries" / "image.npy").shape == (1, 32)
