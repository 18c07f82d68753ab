"""`clipkit evaluate zeroshot --unknown`: figures against scikit-learn, sources of every kind, what keeps them."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from clipkit.classification import class_vectors
from clipkit.data.sources import open_source
from clipkit.evaluation import SharedWork
from clipkit.evaluation.unknown import class_scores
from clipkit.models import DualEncoder, LazyModel, probabilities
from clipkit.storage import Cache
from tests.conftest import make_pictures, tiny_model
from tests.evaluation.test_evaluation import make_classes
from tests.samples import photo


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return make_classes(tmp_path_factory.mktemp("known") / "c", 12, ("cat", "dog", "sea_lion"))


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unknown")
    make_pictures(folder, 9, seed=3)
    return folder


def call(classes, model_dir, *more):
    return ["evaluate", "zeroshot", classes, "--model", model_dir, "-k", 1, "--format", "json", *more]


def test_figures_are_scikit_learns_and_the_accuracy_stays(run, classes, unknown, model_dir):
    plain = json.loads(run(*call(classes, model_dir)).out)
    result = run(*call(classes, model_dir, "--unknown", unknown / "images"))
    assert result.status == 0
    shown = json.loads(result.out)
    assert shown.items() >= plain.items()
    assert shown["unknown_images"] == 9
    work = SharedWork(LazyModel(model_dir, Cache(None), precision="fp32"))
    vectors = class_vectors(["cat", "dog", "sea lion"], ["{}"], work.texts)
    known, others = (work.images(open_source(where)).vectors for where in (classes, unknown / "images"))
    cosines = np.concatenate([known, others]).astype(np.float64) @ vectors.T
    truth = np.arange(len(cosines)) < len(known)
    for name, scores in (
        ("unknown", probabilities(cosines, work.facts.scale).max(axis=1)),
        ("unknown_max_cosine", cosines.max(axis=1)),
    ):
        assert shown[f"{name}_auroc"] == pytest.approx(roc_auc_score(truth, scores))
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert shown[f"{name}_fpr95"] == pytest.approx(false[np.argmax(true >= 0.95)])
        assert (shown[f"chance_{name}_auroc"], shown[f"chance_{name}_fpr95"]) == (0.5, 0.95)
        for figure in ("auroc", "fpr95"):
            low, high = shown[f"{name}_{figure}_low"], shown[f"{name}_{figure}_high"]
            assert low <= shown[f"{name}_{figure}"] <= high
            assert low < high
    table = run(*call(classes, model_dir, "--unknown", unknown / "images", "--format", "human")).out
    assert "unknown_auroc" in table
    assert "9 unknown_images" in table


def test_a_source_of_any_kind_says_the_same(run, refused, classes, unknown, model_dir, tmp_path):
    for source, made in ((classes, "known"), (unknown / "images", "others")):
        embed = ["embed", source, "--model", model_dir, "--out", tmp_path / made, "--precision", "fp32"]
        assert run(*embed).status == 0
    wanted = json.loads(run(*call(classes, model_dir, "--unknown", unknown / "images")).out)
    for known, others in (
        (classes, unknown / "list.tsv"),
        (classes, tmp_path / "others"),
        (tmp_path / "known", unknown / "images"),
        (tmp_path / "known", tmp_path / "others"),
    ):
        shown = json.loads(run(*call(known, model_dir, "--unknown", others)).out)
        for name in ("unknown_auroc", "unknown_fpr95", "unknown_max_cosine_auroc"):
            assert shown[name] == pytest.approx(wanted[name], abs=0.1), (name, known, others)  # float16
    tiny_model(seed=4).save(tmp_path / "other")
    assert "was made with model" in refused(*call(classes, tmp_path / "other", "--unknown", tmp_path / "others"))
    assert "--unknown is of zeroshot" in refused(
        "evaluate", "retrieval", unknown / "list.tsv", "--model", model_dir, "--unknown", classes
    )
    assert "no such source" in refused(*call(classes, model_dir, "--unknown", tmp_path / "none"))


def test_another_unknown_source_is_another_result(run, classes, unknown, model_dir):
    first = json.loads(run(*call(classes, model_dir, "--unknown", unknown / "images")).out)
    assert json.loads(run(*call(classes, model_dir, "--unknown", unknown / "images")).out) == first
    photo(77, 40, 32).save(unknown / "images" / "more.png")
    more = json.loads(run(*call(classes, model_dir, "--unknown", unknown / "images")).out)
    (unknown / "images" / "more.png").unlink()
    assert (first["unknown_images"], more["unknown_images"]) == (9, 10)
    same = json.loads(run(*call(classes, model_dir, "--unknown", classes)).out)
    assert same["unknown_auroc"] == 0.5
    assert "unknown_auroc" not in json.loads(run(*call(classes, model_dir)).out)


def test_what_cannot_be_read_counts_for_the_status(run, refused, classes, model_dir, tmp_path):
    make_pictures(tmp_path, 3)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    result = run(*call(classes, model_dir, "--unknown", tmp_path / "images"))
    assert result.status == 1
    assert "1 could not be used; the first: broken.png" in result.err
    shown = json.loads(result.out)
    assert (shown["images"], shown["unknown_images"], shown["left_out"]) == (12, 3, 1)
    for path in (tmp_path / "images").glob("0*.png"):
        path.unlink()
    assert "nothing in" in refused(*call(classes, model_dir, "--unknown", tmp_path / "images"))


def test_a_collapsed_model_scores_exactly_chance(run, classes, unknown, model_dir, monkeypatch):
    one = torch.nn.functional.normalize(torch.ones(1, 32), dim=-1)
    monkeypatch.setattr(DualEncoder, "encode_image", lambda self, pixels: one.repeat(len(pixels), 1))
    monkeypatch.setattr(DualEncoder, "encode_text", lambda self, tokens: one.repeat(len(tokens), 1))
    shown = json.loads(run(*call(classes, model_dir, "--unknown", unknown / "images", "--no-cache")).out)
    for name in ("unknown_auroc", "unknown_fpr95", "unknown_max_cosine_auroc", "unknown_max_cosine_fpr95"):
        assert shown[name] == pytest.approx(shown[f"chance_{name}"], abs=1e-12), name


def test_two_models_are_paired_and_a_worse_rate_is_a_regression(run, classes, unknown, model_dir, tmp_path):
    tiny_model(seed=4).save(tmp_path / "other")
    two = call(classes, model_dir, "--model", tmp_path / "other", "--unknown", unknown / "images")
    rows = {row["figure"]: row for row in json.loads(run(*two).out)}
    row = rows["unknown_auroc"]
    apart = row[f"{tmp_path / 'other'}_difference"]
    assert apart == pytest.approx(row[str(tmp_path / "other")] - row[str(model_dir)])
    file = tmp_path / "r.json"
    alone = call(classes, model_dir, "--unknown", unknown / "images")
    assert run(*alone, "--out", file).status == 0
    assert run(*alone, "--baseline", file).status == 0
    written = json.loads(file.read_text())
    written[0]["clipkit"]["figures"]["unknown_fpr95"] = -2.0  # lower is better
    written[0]["clipkit"].pop("unknown_samples")
    file.write_text(json.dumps(written))
    worse = run(*alone, "--baseline", file)
    assert worse.status == 1
    assert "regression: " in worse.err
    assert "unknown_fpr95" in worse.err
    assert run(*alone, "--out", tmp_path / "r.html").status == 0


def test_sure_answers_stay_apart():
    image = np.array([[1.0, 0.0], [0.9, 0.1]])
    scores = class_scores(image, np.eye(2), 500.0)["unknown"]
    assert probabilities(image @ np.eye(2), 500.0).max(axis=1).tolist() == [1, 1]
    assert 0 > scores[0] > scores[1]
