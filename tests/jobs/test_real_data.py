"""The spine on real input, where it is present beside the checkout."""

import json

import pytest

from tests.paths import ROOT

DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data ({DATA}) is not here")


def test_emoji_pack_train_embed_build_search_classify_evaluate(run, tmp_path, recipe):
    emoji = DATA / "emoji"
    assert run("pack", emoji / "emoji.tsv", "--out", tmp_path / "shards").status == 0
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert manifest["counts"]["samples"] == 5382
    flags = ["--set", f"data.train={tmp_path / 'shards'}", "--set", "steps=3"]
    assert run("train", recipe, *flags, "--out", tmp_path / "run").status == 0
    assert run("embed", emoji / "openmoji", "--model", tmp_path / "run", "--out", tmp_path / "emb").status == 0
    assert run("build", tmp_path / "emb", "--out", tmp_path / "index").status == 0
    rows = json.loads(run("search", tmp_path / "index", "a red heart", "-k", 10, "--format", "json").out)
    assert len(rows) == 10
    assert all((emoji / "openmoji" / row["image_path"]).is_file() for row in rows)
    by_image = run("search", tmp_path / "index", "--image", emoji / "noto" / "red_heart.png", "--format", "json")
    assert len(json.loads(by_image.out)) == 10
    labels = ["--labels", "cat,dog,horse", "--model", tmp_path / "run", "--format", "jsonl"]
    assert len(run("classify", emoji / "openmoji", *labels).out.splitlines()) == 1884


def test_flickr8k_packs_learns_and_evaluates(run, tmp_path, recipe):
    assert run("pack", DATA / "flickr8k" / "train.tsv", "--out", tmp_path / "shards").status == 0
    counts = json.loads((tmp_path / "shards/manifest.json").read_text())["counts"]
    assert (counts["samples"], counts["captions"]) == (6000, 30000)
    flags = ["--set", f"data.train={tmp_path / 'shards'}", "--set", "steps=40", "--set", "batch_size=64"]
    assert run("train", recipe, *flags, "--set", "data.workers=1", "--out", tmp_path / "run").status == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5])
    result = run(
        "evaluate", "retrieval", DATA / "flickr8k" / "dev.tsv", "--model", tmp_path / "run", "--format", "json"
    )
    figures = json.loads(result.out)
    assert (figures["images"], figures["captions"]) == (1000, 5000)
    wanted = {f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)}
    assert wanted <= set(figures)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_tiny_looks_up_a_drawing_style_it_never_saw(run, tmp_path):
    """Two vendors teach, the third is looked up by name: a plain pair's recall@10 is 12.6 %, chance 0.6 %."""
    emoji = DATA / "emoji"
    header, *rows = (emoji / "emoji.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, vendors in (("two", ("noto", "openmoji")), ("third", ("fluentui",))):
        kept = [row for row in rows if row.rstrip("\n").split("\t")[4] in vendors]
        (tmp_path / f"{name}.tsv").write_text("".join([header, *kept]), encoding="utf-8")
    root = ["--image-root", emoji]
    assert run("pack", tmp_path / "two.tsv", *root, "--out", tmp_path / "shards").status == 0
    assert run("train", "tiny", "--set", f"data.train={tmp_path / 'shards'}", "--out", tmp_path / "run").status == 0
    call = ["evaluate", "retrieval", tmp_path / "third.tsv", *root, "--model", tmp_path / "run", "--format", "json"]
    figures = json.loads(run(*call).out)
    assert figures["images"] == 1607
    assert figures["image_retrieval_recall@10"] > 0.30
