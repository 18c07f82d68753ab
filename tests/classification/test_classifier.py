"""Classification: nothing is encoded twice, and from files, embeddings and an index come the same decisions."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import clipkit
from clipkit.classification import (
    ImageOptions,
    Rule,
    cached_prompts,
    classify_images,
    open_images,
    prompt_set,
    write_report,
)
from clipkit.classification.classified import Classified
from clipkit.classification.classifier import zero_shot
from clipkit.classification.decisions import decide
from clipkit.classification.images import Images
from clipkit.classification.labels import as_label_set
from clipkit.classification.prompt_ablation import ablate
from clipkit.core import ClipkitError
from clipkit.data.sources import open_source
from clipkit.embedding import Embeddings, EncodeOptions, cached_images, cached_texts
from clipkit.models import DualEncoder, LazyModel
from clipkit.storage import Cache
from tests.conftest import tiny_model
from tests.samples import distinct

LABELS = ["red heart", "blue star", "green ring"]


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of a tower was for."""
    found = {"image": [], "text": []}
    for side, name in (("image", "encode_image"), ("text", "encode_text")):
        whole = getattr(DualEncoder, name)

        def counted(self, rows, side=side, whole=whole):
            found[side].append(distinct(rows))
            return whole(self, rows)

        monkeypatch.setattr(DualEncoder, name, counted)
    return found


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "5b.jpg").write_text("not an image")
    return tmp_path


def classify(run, folder, model, *more):
    result = run("classify", folder, "--labels", ",".join(LABELS), "--model", model, "--format", "jsonl", *more)
    return result.status, [json.loads(line) for line in result.out.splitlines()]


def test_a_second_run_asks_no_tower_and_an_edited_file_asks_once(run, calls, folder, model_dir, monkeypatch):
    first = classify(run, folder, model_dir)
    assert (sum(calls["image"]), sum(calls["text"])) == (9, 6)  # two prompts each
    loaded = []
    monkeypatch.setattr("clipkit.models.loading.load_model", lambda *about: loaded.append(about))
    calls["image"].clear(), calls["text"].clear()
    assert classify(run, folder, model_dir) == first
    assert (calls, loaded) == ({"image": [], "text": []}, [])
    monkeypatch.undo()


def test_an_edited_file_asks_once(run, calls, folder, model_dir):
    status, before = classify(run, folder, model_dir)
    calls["image"].clear(), calls["text"].clear()
    Image.new("RGB", (30, 24), "red").save(folder / "3.png")
    again = classify(run, folder, model_dir)
    assert (calls["image"], calls["text"]) == ([1], [])
    assert (status, [row["path"] for row in before]) == (again[0], [row["path"] for row in again[1]])
    changed = [a["path"] for a, b in zip(before, again[1], strict=True) if a != b]
    assert changed == ["3.png"]
    calls["image"].clear()
    alone = classify(run, folder, model_dir, "--no-cache")[1]
    assert [row["score"] for row in alone] == [pytest.approx(row["score"], abs=1e-3) for row in again[1]]
    assert sum(calls["image"]) == 9


def test_another_model_or_precision_or_folder_is_not_what_was_kept(run, calls, folder, model_dir, tmp_path):
    classify(run, folder, model_dir)
    other = tmp_path / "other"
    tiny_model(seed=5).save(other)
    for more in ((other,), (model_dir, "--precision", "fp32"), (model_dir, "--precision", "bf16")):
        calls["image"].clear()
        classify(run, folder, *more)
        if more[1:] != ("--precision", "bf16"):
            assert sum(calls["image"]) == 9 or LazyModel(model_dir, Cache(None)).facts.precision == "fp32"
    shutil.copytree(other, tmp_path / "copy")  # of another place, but the same model
    calls["image"].clear()
    classify(run, folder, tmp_path / "copy")
    assert calls["image"] == []


def test_the_facts_of_a_model_follow_its_files(own_cache, tmp_path):
    cache = Cache(own_cache)
    tiny_model(seed=1).save(tmp_path / "m")
    facts = LazyModel(tmp_path / "m", cache).facts
    again = LazyModel(tmp_path / "m", cache)
    assert (again.facts, "_loaded" in vars(again)) == (facts, False)
    time.sleep(0.01)
    tiny_model(seed=2).save(tmp_path / "m")
    other = LazyModel(tmp_path / "m", cache)
    assert other.facts.fingerprint == tiny_model(seed=2).fingerprint() != facts.fingerprint
    assert "_loaded" in vars(other)


def test_weights_exchanged_unseen_are_noticed(own_cache, tmp_path):
    cache = Cache(own_cache)
    tiny_model(seed=1).save(tmp_path / "m")
    assert LazyModel(tmp_path / "m", cache).facts
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")}
    tiny_model(seed=2).save(tmp_path / "m")
    for path, at in times.items():
        os.utime(path, ns=(at, at))
    stale = LazyModel(tmp_path / "m", cache)
    assert stale.facts
    with pytest.raises(ClipkitError, match="another model than it was"):
        _ = stale.towers


def test_what_was_done_before_an_interruption_is_kept(folder, model_dir, own_cache, calls):
    cache, source = Cache(own_cache), open_source(folder)
    options = EncodeOptions(batch_size=2, decoding="fast")
    whole = cached_images(source, LazyModel(model_dir, Cache(None)), Cache(None), options)
    half = LazyModel(model_dir, cache)
    cached_images(source, half, cache, options, rows=range(6))
    calls["image"].clear()
    found = cached_images(source, LazyModel(model_dir, cache), cache, options)
    assert sum(calls["image"]) < 9
    assert np.allclose(found.image, whole.image, atol=1e-5)
    assert (found.rows, found.left_out) == (whole.rows, whole.left_out)


def test_texts_are_encoded_once_each(model, own_cache, calls):
    cache = Cache(own_cache)
    lazy = LazyModel.of(model)
    found = cached_texts(["a", "b", "a"], lazy, cache)
    assert sum(calls["text"]) == 2
    assert np.allclose(found, model.embed_texts(["a", "b", "a"]), atol=1e-6)
    calls["text"].clear()
    assert np.array_equal(cached_texts(["b", "a"], lazy, cache), found[[1, 0]])
    assert calls["text"] == []
    assert cached_prompts("openai80", cache) == cached_prompts("openai80", cache) == prompt_set("openai80")


def test_files_embeddings_and_an_index_are_classified_alike(run, pictures, embeddings, model, model_dir, tmp_path):
    assert run("build", embeddings, "--out", tmp_path / "index", "--kind", "Flat").status == 0
    by_index = clipkit.classify(tmp_path / "index", LABELS, model)
    by_vectors = clipkit.classify(embeddings, LABELS, model)
    assert by_index == by_vectors
    some = run("classify", tmp_path / "index", "--labels", ",".join(LABELS), "--model", model_dir, "--format", "jsonl",
               "--where", 'image_path < "images/007"')  # fmt: skip
    rows = [json.loads(line) for line in some.out.splitlines()]
    assert [row["path"] for row in rows] == [row["path"] for row in by_index[:7]]


def test_one_door_opens_files_and_vectors_and_names_their_model(pictures, embeddings, model_dir):
    cache = Cache(None)
    vectors = open_images(embeddings, [], cache)
    assert [model.facts.fingerprint for model in vectors.models] == [Embeddings.open(embeddings).fingerprint]
    assert vectors.files is None
    images = vectors.embed()
    with pytest.raises(ClipkitError, match="name the model to classify with"):
        open_images(pictures, [], cache)
    files = open_images(pictures, vectors.models, cache)
    assert files.files is not None
    others = files.embed()
    assert np.allclose(images.block(0, slice(0, 3)), others.block(0, slice(0, 3)), atol=1e-2)
    there = open_images(embeddings, [model_dir], cache, ImageOptions(image_root=str(pictures.parent))).embed()
    assert (images.size(2), there.size(2)) == (None, others.size(2))
    assert there.read(2) == others.read(2)
    assert there.place(2) == others.place(2)


def test_wrong_ways_to_ask(refused, folder, embeddings, model_dir, tmp_path):
    call = ["--labels", "a,b", "--model", model_dir]
    assert "--where is a condition on what an index says" in refused("classify", folder, *call, "--where", "x > 1")
    assert "several need the images" in refused("classify", embeddings, *call, "--model", model_dir)
    assert "between 0 and 1, got 2" in refused("classify", folder, *call, "--threshold", "2")
    tiny_model(seed=9).save(tmp_path / "other")
    told = refused("classify", embeddings, "--labels", "a,b", "--model", tmp_path / "other")
    assert "was made with model" in told


def test_unsure_ones_are_marked_and_never_dropped(run, folder, model_dir):
    rows = classify(run, folder, model_dir)[1]
    margins = sorted(row["margin"] for row in rows if row["margin"] is not None)
    marked = classify(run, folder, model_dir, "--min-margin", margins[4])[1]
    assert [row["path"] for row in marked] == [row["path"] for row in rows]
    for row, free in zip(marked, rows, strict=True):
        sure = free["status"] == "ok" and free["margin"] >= margins[4]
        assert row["status"] == ("ok" if sure else free["status"].replace("ok", "unsure"))
    background = classify(run, folder, model_dir, "--background", "nothing,a blank page")[1]
    assert {row["status"] for row in background} <= {"ok", "background", "unreadable"}


def test_two_models_together(run, folder, model_dir, tmp_path):
    tiny_model(seed=3).save(tmp_path / "other")
    alone = [classify(run, folder, which)[1] for which in (model_dir, tmp_path / "other")]
    both = classify(run, folder, model_dir, "--model", tmp_path / "other")[1]
    for a, b, joint in zip(*alone, both, strict=True):
        if joint["status"] == "ok":
            shares = [dict(row["top"]) for row in (a, b)]
            assert dict(joint["top"]) == pytest.approx({n: (shares[0][n] + shares[1][n]) / 2 for n in LABELS}, abs=1e-5)
            assert joint["score"] is None


def test_a_prompt_is_judged_alone_and_by_its_absence(model, pictures):
    cache, lazy = Cache(None), LazyModel.of(model)
    images = open_images(pictures, [lazy], cache).embed()
    vectors = images.block(0, slice(0, len(images)))
    truth = np.random.default_rng(0).integers(3, size=len(images))
    prompts = ["{}", "a {}.", "the {} there"]
    found = ablate(LABELS, prompts, model.embed_texts, vectors, truth)

    def accuracy(some):
        decided = classify_images(images, [zero_shot(as_label_set(LABELS), some, lazy, cache)], Rule())
        return float((decided.classes[:, 0] == truth).mean())

    assert [each.alone for each in found] == [accuracy([prompt]) for prompt in prompts]
    assert [each.without for each in found] == [accuracy([p for p in prompts if p != each.prompt]) for each in found]
    assert np.isnan(ablate(LABELS, ["{}"], model.embed_texts, vectors, truth)[0].without)


GROUPS = """
labels: [red heart, blue star, green ring, paper]
background: [nothing at all]
hierarchy:
  sign: {warm: [red heart], cold: [blue star, green ring]}
"""


def test_groups_and_several_labels_in_every_format(run, folder, model_dir, tmp_path):
    (tmp_path / "labels.yaml").write_text(GROUPS)
    call = ["classify", folder, "--labels", tmp_path / "labels.yaml", "--model", model_dir, "--top", 5]
    rows = [json.loads(line) for line in run(*call, "--format", "jsonl").out.splitlines()]
    for row in rows:
        shares = dict(row["top"])
        path = {"red heart": ["sign", "warm"], "paper": [], "nothing at all": [], None: []}
        assert [name for name, _ in row["groups"]] == path.get(row["label"], ["sign", "cold"])
        for name, share in row["groups"]:
            own = {"sign": LABELS, "warm": LABELS[:1], "cold": LABELS[1:]}[name]
            assert share == pytest.approx(sum(shares[label] for label in own), abs=1e-6)
    several = run(*call, "--format", "jsonl", "--multi-label", "--threshold", "0.5")
    for row in map(json.loads, several.out.splitlines()):
        shares = dict(row["top"])
        wanted = {name for name, share in shares.items() if share >= 0.5 and name != "nothing at all"}
        assert set(row["labels"]) == wanted
        assert row["status"] == ("unreadable" if row["label"] is None else "ok" if wanted else "background")
    for more in ((), ("--multi-label",)):
        lines = run(*call, "--format", "csv", *more).out.splitlines()
        assert len(lines) == 11
        assert lines[0].endswith("groups,labels" if more else "groups")


def test_a_model_that_only_compares_labels_needs_something_to_compare_with(refused, folder, model_dir):
    told = refused("classify", folder, "--labels", "a,b", "--model", model_dir, "--multi-label")
    assert "--background" in told


def test_the_page_holds_all_that_it_shows(run, model_dir, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(40):
        where = tmp_path / "photos" / ("cat", "Sea_Lion", "other")[number % 3]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(where / f"{number}.png")
    (tmp_path / "photos" / "cat" / "bad.png").write_text("<b>no image")
    page = tmp_path / "page.html"
    call = ["classify", tmp_path / "photos", "--labels", "cat,sea lion", "--model", model_dir, "--min-margin", 0.0001]
    result = run(*call, "--report", page)
    assert result.status == 1
    told = re.search(r"([\d.]+)% of 27 are in the folder of their label \(95 % interval", result.err)
    text = page.read_text()
    assert f"<b>{told[1]}%</b>" in text
    assert 24 < text.count("data:image") <= 2 * 24 + 1  # at most so many of each label, and the matrix
    assert "cat/bad.png" in text
    assert "<b>no image" not in text
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    rows = [json.loads(line) for line in run(*call, "--format", "jsonl").out.splitlines()]
    in_place = [row["label"] == row["path"].partition("/")[0].replace("_", " ").lower() for row in rows if row["label"]]
    known = [row["label"] and not row["path"].startswith("other") for row in rows]
    right = sum(in_place)
    assert f"{right / sum(map(bool, known)):.1%}" == f"{told[1]}%"


def test_pictures_of_a_page_are_small_as_soon_as_they_are_read(monkeypatch, tmp_path):
    """Hundreds of large photos on a page must not be held at once, nor two dozen of a class."""
    sizes = []
    monkeypatch.setattr(
        "clipkit.core.html_report.Report.sheet", lambda self, shown: sizes.extend(each[0].size for each in shown)
    )
    images = Images([f"{n}.png" for n in range(5)], lambda *_: np.zeros((5, 2)))
    decisions = decide(np.full((5, 2), 0.5), None, Rule())
    picture = {0: Image.new("RGB", (3000, 600)), 1: Image.new("L", (20, 30)), 2: Image.new("RGB", (600, 3000))}.get
    classified = Classified(images, as_label_set(LABELS[:2]), decisions)
    write_report(tmp_path / "a.html", classified, about="", picture=picture)
    assert sizes == [(256, 51), (20, 30), (51, 256)]


def test_where_all_images_are_examples_there_is_no_accuracy(run, model_dir, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        where = tmp_path / "photos" / ("cat", "dog")[number % 2]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(where / f"{number}.png")
    page = tmp_path / "page.html"
    call = ["classify", tmp_path / "photos", "--labels", "cat,dog", "--model", model_dir, "--report", page]
    result = run(*call, "--examples", tmp_path / "photos", "--method", "prototypes")
    assert result.status == 0
    assert "6 of the images are among the examples" in result.err
    assert "nan" not in result.err
    assert "in the folder of their label" not in result.err
    assert "What was taken for what" not in page.read_text()


def test_prompts_are_judged_without_what_cannot_be_read_which_is_told(run, folder, model_dir):
    (folder / "red heart").mkdir()
    (folder / "0.png").rename(folder / "red heart" / "0.png")
    call = ["classify", folder, "--labels", ",".join(LABELS), "--model", model_dir, "--ablate-prompts"]
    result = run(*call, "--prompts", "{}|a {}", "--format", "jsonl")
    assert result.status == 1
    assert len(result.out.splitlines()) == 2
    assert "1 of 10 cannot be read; the first: 5b.jpg" in result.err
    (folder / "5b.jpg").unlink()
    assert run(*call, "--prompts", "{}|a {}").status == 0


def test_a_page_of_embeddings_finds_its_pictures_where_it_is_told(run, embeddings, model_dir, pictures, tmp_path):
    call = ["classify", embeddings, "--labels", "cat,dog", "--model", model_dir, "--report"]
    assert run(*call, tmp_path / "a.html").status == 0
    assert "These pictures are not at hand" in (tmp_path / "a.html").read_text()
    assert run(*call, tmp_path / "b.html", "--image-root", pictures.parent).status == 0
    assert "not at hand" not in (tmp_path / "b.html").read_text()


@pytest.mark.parametrize(("beside", "broken"), [("json", b"{"), ("txt", b"caf\xe9")])
def test_a_fault_of_the_words_is_not_remembered_as_the_images(model_dir, tmp_path, own_cache, calls, beside, broken):
    for name in "ab":
        Image.new("RGB", (9, 9), (name == "a" and "red") or "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    (tmp_path / f"a.{beside}").write_bytes(broken)

    def found():
        images = cached_images(open_source(tmp_path), LazyModel(model_dir, Cache(own_cache)), Cache(own_cache))
        return images.rows, [line["key"] for line in images.left_out], sum(calls["image"])

    assert found() == ([1], ["a.png", "c.png"], 1)
    assert found() == ([1], ["a.png", "c.png"], 1)
    (tmp_path / f"a.{beside}").write_bytes(b"[]" if beside == "txt" else b'{"caption": "red"}')
    assert found() == ([0, 1], ["c.png"], 2)
    assert found() == ([0, 1], ["c.png"], 2)  # it is kept now, and so is what is no image
    (tmp_path / f"a.{beside}").write_bytes(broken)
    assert found() == ([1], ["a.png", "c.png"], 2)


def test_another_version_embeds_anew(model_dir, tmp_path, own_cache, calls, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for version in ("1", "1", "2"):
        monkeypatch.setattr("clipkit.embedding.cached.__version__", version)
        monkeypatch.setattr("clipkit.models.lazy.__version__", version)
        lazy = LazyModel(model_dir, Cache(own_cache))
        cached_images(open_source(tmp_path), lazy, Cache(own_cache))
        cached_texts(["a"], lazy, Cache(own_cache))
    assert (sum(calls["image"]), sum(calls["text"])) == (2, 2)
