"""The demo: a sketch of it in the usual suite, the real one among the slow proofs."""

import json

import numpy as np
import pytest

from clipkit.data import COLOURS, SHAPES, caption, draw, held_out_pairs, random_scene
from tests.core.test_html_report import assert_refers_to_nothing_outside


def test_scenes_are_a_function_of_the_seed():
    def one(seed):
        rng = np.random.default_rng(seed)
        scene = random_scene(rng, [("red", "heart"), ("blue", "ring")])
        return np.asarray(draw(scene, rng)), caption(scene, rng), scene

    assert np.array_equal(one(1)[0], one(1)[0])
    assert one(1)[1] == one(1)[1]
    assert {one(seed)[2].name for seed in range(20)} == {"red heart", "blue ring"}


def test_every_shape_shows_its_colour():
    for shape in SHAPES:
        for colour, (rgb, _) in COLOURS.items():
            rng = np.random.default_rng(0)
            scene = random_scene(rng, [(colour, shape)])
            pixels = np.asarray(draw(scene, rng)).reshape(-1, 3).astype(int)
            near = np.abs(pixels - rgb).max(axis=1) <= 16
            assert near.sum() > 20, (colour, shape)


def test_held_out_pairs_leave_every_colour_and_shape_in_training():
    pairs = held_out_pairs(np.random.default_rng(0))
    assert sorted(colour for colour, _ in pairs) == sorted(COLOURS)
    assert sorted(shape for _, shape in pairs) == sorted(SHAPES)


def test_captions_name_colour_or_shape_in_some_words():
    rng = np.random.default_rng(0)
    said = []
    for _ in range(400):
        scene = random_scene(rng, [(c, s) for c in COLOURS for s in SHAPES])
        text = caption(scene, rng)
        colour = any(word in text for word in COLOURS[scene.colour][1])
        shape = any(word in text for word in SHAPES[scene.shape])
        assert colour or shape, text
        said.append(colour and shape)
        assert "  " not in text
    assert 0.7 < np.mean(said) < 0.85


SKETCH = ["--pictures", 64, "--set", "steps=3", "--set", "batch_size=16", "--set", "data.workers=0"]


def test_a_sketch_of_the_demo(run, tmp_path):
    out = tmp_path / "demo"
    result = run("demo", *SKETCH, "--out", out)
    assert result.status == 0, result.err
    assert "Zero-shot accuracy on 8 pairs never seen together, among 64 names:" in result.err
    assert f"Report, with pictures: {out / 'report' / 'index.html'}" in result.err
    assert_refers_to_nothing_outside((out / "report" / "index.html").read_text())
    figures = json.loads((out / "report" / "report.json").read_text())
    assert figures["zeroshot_accuracy_chance"] == 1 / 64
    held_out = set(figures["held_out_pairs"])
    assert len(held_out) == 8
    lists = {name: (out / "pictures" / f"{name}.tsv").read_text().splitlines()[1:] for name in ("train", "unseen")}
    shown = {name: {" ".join(line.split("\t")[2:]) for line in lines} for name, lines in lists.items()}
    assert shown["unseen"] == held_out
    assert not shown["train"] & held_out
    assert "stands already" in run("demo", *SKETCH, "--out", out).err


def test_a_killed_demo_goes_on(run, tmp_path, monkeypatch):
    from clipkit import search

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "build_index", killed)
        assert run("demo", *SKETCH, "--out", tmp_path / "demo").status == 2
    trained = (tmp_path / "demo/run/manifest.json").stat().st_mtime_ns
    assert run("demo", *SKETCH, "--out", tmp_path / "demo").status == 0
    assert (tmp_path / "demo/run/manifest.json").stat().st_mtime_ns == trained


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_names_pairs_that_it_never_saw(run, tmp_path):
    assert run("demo", "--out", tmp_path / "demo").status == 0
    figures = json.loads((tmp_path / "demo/report/report.json").read_text())
    assert figures["zeroshot_accuracy"] > 10 * figures["zeroshot_accuracy_chance"]
    assert (
        figures["retrieval"]["image_retrieval_recall@10"] > 5 * figures["retrieval"]["chance_image_retrieval_recall@10"]
    )
