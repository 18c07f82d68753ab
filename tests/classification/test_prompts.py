"""Zero-shot classification: class vectors by the recipe, a row for every image, the same from embeddings."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import clipkit
from clipkit.classification import class_vectors, prompt_set
from clipkit.core import ClipkitError
from clipkit.models import probabilities
from tests.conftest import tiny_model

LABELS = ["red heart", "blue star", "green ring"]


def test_class_vectors_are_the_mean_of_the_prompts(model):
    prompts = ["a {}.", "{}", "the {} there"]
    vectors = class_vectors(LABELS, prompts, model.embed_texts)
    for label, vector in zip(LABELS, vectors, strict=True):
        each = [model.embed_texts([prompt.format(label)])[0] for prompt in prompts]
        mean = np.mean([e / np.linalg.norm(e) for e in each], axis=0)
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_probabilities_are_a_softmax_that_does_not_overflow():
    cosines = np.array([[0.9, 0.1], [-1.0, 1.0]], np.float32)
    shares = probabilities(cosines, 1000.0)
    assert np.allclose(shares.sum(axis=1), 1)
    assert shares[0, 0] > 0.999
    gentle = probabilities(cosines, 2.0)
    assert gentle[0, 0] == pytest.approx(np.exp(1.8) / (np.exp(1.8) + np.exp(0.2)))


def test_rows_from_a_folder_and_from_embeddings_agree(model, pictures, embeddings):
    by_list = clipkit.classify(pictures, LABELS, model)
    by_vectors = clipkit.classify(embeddings, LABELS, model)
    assert [row["path"] for row in by_list] == [row["path"] for row in by_vectors]
    assert len(by_list) == 48
    for a, b in zip(by_list, by_vectors, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=2e-3)
        assert sum(share for _, share in a["top"]) == pytest.approx(1)
        assert a["margin"] == pytest.approx(a["top"][0][1] - a["top"][1][1])
        assert a["top"][0] == [a["label"], a["probability"]]
    with pytest.raises(ClipkitError, match="was made with model"):
        clipkit.classify(embeddings, LABELS, tiny_model(seed=3))


def test_the_command_prints_one_row_per_file(run, model_dir, tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 20), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1b.jpg").write_text("not an image")
    result = run("classify", tmp_path, "--labels", "cat, dog,horse", "--model", model_dir, "--format", "jsonl")
    assert result.status == 1
    assert "1 of 4 cannot be read; the first: 1b.jpg: not an image" in result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["path"] for row in rows] == ["0.png", "1.png", "1b.jpg", "2.png"]
    wanted = {"path", "label", "score", "probability", "margin", "top", "status", "reason"}
    assert all(set(row) == wanted for row in rows)
    assert [row["status"] for row in rows] == ["ok", "ok", "unreadable", "ok"]
    assert rows[2]["label"] is None
    (tmp_path / "labels.txt").write_text("cat\n\ndog\nhorse\n")
    again = run("classify", tmp_path, "--labels", tmp_path / "labels.txt", "--model", model_dir, "--format", "jsonl")
    assert again.out == result.out
    table = run("classify", tmp_path, "--labels", "cat,dog", "--model", model_dir, "--prompts", "a {}|{}")
    assert "probability" in table.out
    assert re.search(r"(cat|dog) [123]\b", table.err)


def test_labels_and_prompts_that_make_no_sense(refused, model_dir, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    call = ["classify", tmp_path, "--model", model_dir, "--labels"]
    assert "no labels" in refused(*call, ",")
    assert "'cat' is given twice" in refused(*call, "cat,dog,cat")
    assert "did you mean 'photo'" in refused(*call, "cat", "--prompts", "foto")
    assert "has no {}" in refused(*call, "cat", "--prompts", "a {}|nothing")
    assert "no such file of labels: lables.txt" in refused(*call, "lables.txt")
    assert "name the model" in refused("classify", tmp_path, "--labels", "cat")


def test_many_labels_on_the_command_line(run, model_dir, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    labels = ",".join(f"label number {i}" for i in range(200))
    assert run("classify", tmp_path, "--labels", labels, "--model", model_dir, "--format", "json").status == 0


def test_prompt_sets():
    assert prompt_set("plain") == ["{}"]
    assert len(prompt_set("openai80")) == 80
    assert prompt_set("one {}| two {} ") == ["one {}", "two {}"]
