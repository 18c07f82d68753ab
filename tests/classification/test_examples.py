"""Labelled examples through the command: what they teach, how far to believe it, and from where on to accept it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.classification import Learning, Rule, classify_images, fit_classifiers, open_examples, wanted_threshold
from clipkit.classification.examples import Examples
from clipkit.classification.fit import LEARNERS
from clipkit.classification.images import Images
from clipkit.classification.labels import Label, LabelSet, as_label_set
from clipkit.core import ClipkitError
from clipkit.data import draw, random_scene
from clipkit.metrics import auroc, fpr_at_tpr
from clipkit.models import LazyModel
from clipkit.models.lazy import ModelFacts
from clipkit.storage import Cache
from tests.conftest import tiny_model

COLOUR_NAMES = ["red", "green", "blue"]
NAMES = ["alpha", "beta", "gamma", "delta"]


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of squares of three colours: ``examples/COLOUR``, and others in ``photos/COLOUR``."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    paint = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}
    for name, colour in paint.items():
        for folder, count in (("examples", 6), ("photos", 8)):
            (root / folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(scale=35, size=(24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{number}.png")
    return root


def ask(run, photos, model, *more):
    call = ["classify", photos / "photos", "--labels", "red,green,blue", "--model", model, "--format", "jsonl"]
    result = run(*call, *more)
    return [json.loads(line) for line in result.out.splitlines()], result


def right(rows):
    return np.mean([row["label"] == row["path"].partition("/")[0] for row in rows])


@pytest.mark.parametrize("method", ["linear", "tip-adapter", "prototypes"])
def test_the_command_learns_from_examples(run, photos, model_dir, method):
    plain, _ = ask(run, photos, model_dir)
    rows, result = ask(run, photos, model_dir, "--examples", photos / "examples", "--method", method)
    assert right(plain) < 0.6  # the model never learned anything
    assert right(rows) > 0.9
    assert f"{method}: 18 examples of 3 classes" in result.err
    assert {row["example"] for row in rows} == {False}
    again, told = ask(run, photos, model_dir, "--examples", photos / "examples", "--method", method)
    assert (again, told.err) == (rows, result.err)


def test_examples_are_known_by_their_bytes(run, photos, model_dir, tmp_path):
    shutil.copytree(photos, tmp_path / "all")
    for name in COLOUR_NAMES:  # an example among the photos under another name, in the wrong folder
        shutil.copy(photos / "examples" / name / "0.png", tmp_path / "all" / "photos" / "red" / f"copy of {name}.png")
    rows, result = ask(run, tmp_path / "all", model_dir, "--examples", photos / "examples")
    assert sorted(row["path"] for row in rows if row["example"]) == [
        f"red/copy of {n}.png" for n in sorted(COLOUR_NAMES)
    ]
    assert "3 of the images are among the examples" in result.err
    assert "of 24 are in the folder of their label" in result.err


def test_examples_of_two_classes_and_copies(run, photos, model_dir, tmp_path):
    shutil.copytree(photos / "examples", tmp_path / "examples")
    shutil.copy(tmp_path / "examples" / "red" / "0.png", tmp_path / "examples" / "blue" / "9.png")
    shutil.copy(tmp_path / "examples" / "red" / "1.png", tmp_path / "examples" / "red" / "9.png")
    (tmp_path / "examples" / "blue" / "bad.png").write_text("no image")
    (tmp_path / "examples" / "else").mkdir()
    shutil.copy(photos / "photos" / "red" / "0.png", tmp_path / "examples" / "else" / "x.png")
    rows, result = ask(run, photos, model_dir, "--examples", tmp_path / "examples")
    assert result.status == 1
    assert "3 of the examples cannot be used" in result.err
    assert "1 images of" in result.err
    assert len(rows) == 24
    cache = Cache(None)
    found = open_examples(str(tmp_path / "examples"), as_label_set(COLOUR_NAMES), [LazyModel(model_dir, cache)], cache)
    assert len(found) == 18  # 19 that are of one class, with the copy, without the one of two
    assert len(set(found.groups.tolist())) == 17
    reasons = {line["key"]: line["reason"] for line in found.left_out}
    assert reasons["red/0.png"] == reasons["blue/9.png"] == "is an example of blue and of red"


def test_examples_from_embeddings_are_known_by_their_vectors(run, photos, model_dir, tmp_path):
    assert run("embed", photos / "examples", "--model", model_dir, "--out", tmp_path / "ex").status == 0
    assert run("embed", photos / "photos", "--model", model_dir, "--out", tmp_path / "emb").status == 0
    rows, _ = ask(run, photos, model_dir, "--examples", tmp_path / "ex")
    files, _ = ask(run, photos, model_dir, "--examples", photos / "examples")
    assert [row["label"] for row in rows] == [row["label"] for row in files]
    call = ["--labels", "red,green,blue", "--model", model_dir, "--format", "jsonl", "--examples", photos / "examples"]
    stored = [json.loads(line) for line in run("classify", tmp_path / "emb", *call).out.splitlines()]
    assert [row["label"] for row in stored] == [row["label"] for row in files]
    itself = [json.loads(line) for line in run("classify", tmp_path / "ex", *call).out.splitlines()]
    assert all(row["example"] for row in itself)


def test_several_models_learn_together(run, photos, model_dir, tmp_path):
    tiny_model(seed=3).save(tmp_path / "other")
    rows, result = ask(run, photos, model_dir, "--model", tmp_path / "other", "--examples", photos / "examples")
    assert right(rows) > 0.9
    assert result.err.count("strength") == 2


def test_wrong_ways_to_learn(refused, photos, model_dir, tmp_path):
    call = ["classify", photos / "photos", "--labels", "red,green,blue", "--model", model_dir]
    examples = ["--examples", photos / "examples"]
    (tmp_path / "none" / "rad").mkdir(parents=True)
    shutil.copy(photos / "photos" / "red" / "0.png", tmp_path / "none" / "rad")
    for more, told in [
        (["--method", "linear"], "--examples FOLDER"),
        (["--calibrate"], "no temperature is kept"),
        ([*examples, "--multi-label"], "one label each"),
        (["--temperature", "-1"], "is above 0"),
        ([*examples, "--calibrate", "--temperature", "2"], "is not fitted too"),
        (["--precision-wanted", "0.9"], "--examples FOLDER"),
        ([*examples, "--precision-wanted", "0.99"], "at least 299 must be right"),
        ([*examples, "--precision-wanted", "1"], "want less than 1"),
        ([*examples, "--precision-wanted", "1.5"], "cannot be had"),
        ([*examples, "--precision-wanted", "0.9", "--threshold", "0.5"], "leave out --threshold"),
        (["--examples", tmp_path / "none"], "did you mean 'red'"),
        (["--examples", tmp_path / "nothing"], "nothing"),
    ]:
        assert told in refused(*call, *more), more


class Fake:
    """A model whose texts and images are vectors that are given."""

    spec = "fake"

    def __init__(self, scale, text):
        self.text, self.towers = text, self
        self.facts = ModelFacts(f"{text.sum()}", "fp32", text.shape[1], scale, None)

    def embed_texts(self, texts, _):
        return self.text[[NAMES.index(text.split()[-1]) for text in texts]]


def drawn(text, temperature, scale, count, seed):
    """Images and classes that are as the softmax of scaled cosines divided by a temperature says."""
    rng = np.random.default_rng(seed)
    images = unit(rng.normal(size=(count, text.shape[1])))
    logits = scale / temperature * (images @ text.T).astype(np.float64)
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return images, truth


def examples_of(images, truth):
    return Examples(
        "some", Images([f"{n}" for n in range(len(images))], lambda _, at: images[at]),
        np.arange(len(truth)), truth, np.arange(len(truth)),
    )  # fmt: skip


TEXT = unit(np.random.default_rng(5).normal(size=(4, 12)))
LABELS = as_label_set(NAMES)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found_and_kept(own_cache, temperature):
    scale, cache = 10.0, Cache(own_cache)
    model = Fake(scale, TEXT)
    images, truth = drawn(TEXT, temperature, scale, 4000, 1)
    fit = fit_classifiers(LABELS, ["{}"], [model], cache, Learning("zero-shot", calibrate=True),
                          examples_of(images, truth))  # fmt: skip
    # Of 4,000 samples the temperature's relative standard error is below 3 %.
    assert fit.temperatures[0] == pytest.approx(temperature, rel=0.1)
    assert fit.judged is not None
    assert fit.judged.error(fit.judged.after) < 0.03
    if temperature != 1:
        assert fit.judged.error(fit.judged.before) > 0.1
    later = fit_classifiers(LABELS, ["{}"], [model], cache, Learning(calibrate=True))
    assert later.temperatures == fit.temperatures
    plain = fit_classifiers(LABELS, ["{}"], [model], cache)
    others = Images([""] * 500, lambda _, at: drawn(TEXT, 1, scale, 500, 9)[0][at])
    hot, cold = (classify_images(others, each.classifiers, Rule(), top=1) for each in (later, plain))
    assert np.array_equal(hot.classes, cold.classes)
    assert np.array_equal(hot.probabilities, cold.probabilities) == (fit.temperatures[0] == 1)
    with pytest.raises(ClipkitError, match="no temperature is kept"):
        fit_classifiers(LABELS, ["a {}"], [model], cache, Learning(calibrate=True))


def test_the_command_keeps_a_temperature_and_changes_no_label(run, photos, model_dir, tmp_path):
    plain, _ = ask(run, photos, model_dir)
    usual = plain[0]["label"]
    for number, row in enumerate(plain):  # a model that is right about two of three
        name = usual if number % 3 else next(name for name in COLOUR_NAMES if name != usual)
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(photos / "photos" / row["path"], tmp_path / name / f"{number}.png")
    rows, result = ask(run, photos, model_dir, "--examples", tmp_path, "--method", "zero-shot", "--calibrate")
    later, told = ask(run, photos, model_dir, "--calibrate")
    temperature = re.search(r"temperature ([\d.e+-]+) ", result.err)
    assert temperature
    assert f"temperature {temperature[1]} " in told.err
    assert [row["label"] for row in later] == [row["label"] for row in plain] == [row["label"] for row in rows]
    assert [row["probability"] for row in later] == [row["probability"] for row in rows]
    assert later != plain
    own, _ = ask(run, photos, model_dir, "--temperature", temperature[1])
    assert [row["probability"] for row in own] == pytest.approx([row["probability"] for row in later], rel=1e-2)


@pytest.mark.parametrize("method", LEARNERS)
def test_calibration_changes_no_order(method):
    images, truth = drawn(TEXT, 2.0, 10.0, 60, 3)
    examples = examples_of(images, truth)
    others = Images([""] * 300, lambda _, at: drawn(TEXT, 2.0, 10.0, 300, 4)[0][at])
    decided = []
    for calibrate in (False, True):
        learning = Learning(method, calibrate=calibrate)
        fit = fit_classifiers(LABELS, ["{}"], [Fake(10.0, TEXT)], Cache(None), learning, examples)
        decided.append(classify_images(others, fit.classifiers, Rule(), top=4))
    assert np.array_equal(decided[0].classes, decided[1].classes)
    assert not np.array_equal(decided[0].probabilities, decided[1].probabilities)


def test_examples_that_are_all_right_give_no_temperature():
    fit = fit_classifiers(LABELS, ["{}"], [Fake(10.0, TEXT)], Cache(None), Learning("zero-shot", calibrate=True),
                          examples_of(TEXT, np.arange(4)))  # fmt: skip
    assert fit.temperatures == [1.0]


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_wanted_precision_is_kept_on_others(calibrate):
    """In at least 95 % of sets of examples; 3 of 60 is expected to be missed at most, 9 is beyond chance (0.3 %)."""
    wanted, missed, covered = 0.85, 0, []
    for seed in range(60):
        images, truth = drawn(TEXT, 1.0, 12.0, 300, seed)
        fit = fit_classifiers(LABELS, ["{}"], [Fake(12.0, TEXT)], Cache(None), Learning("zero-shot", calibrate),
                              examples_of(images, truth))  # fmt: skip
        found = wanted_threshold(fit, [], wanted)
        others, own = drawn(TEXT, 1.0, 12.0, 4000, 1000 + seed)
        decided = classify_images(Images([""] * 4000, lambda _, at, o=others: o[at]), fit.classifiers,
                                  Rule(found.probability), top=1)  # fmt: skip
        sure = decided.statuses == 0
        covered.append(sure.mean())
        missed += (decided.classes[sure, 0] == own[sure]).mean() < wanted
        assert found.precision >= wanted
    assert missed < 9
    assert np.mean(covered) > 0.2  # it is no empty promise


def test_a_threshold_passes_what_it_says_and_no_background():
    labels = LabelSet((*(Label(name) for name in NAMES[:3]), Label(NAMES[3], background=True)))
    images, truth = drawn(TEXT, 1.0, 12.0, 800, 0)
    fit = fit_classifiers(labels, ["{}"], [Fake(12.0, TEXT)], Cache(None), Learning("zero-shot"),
                          examples_of(images, truth))  # fmt: skip
    found = wanted_threshold(fit, labels.background, 0.8)
    decided = classify_images(Images([""] * 800, lambda _, at: images[at]), fit.classifiers,
                              Rule(found.probability, background=labels.background), top=1)  # fmt: skip
    sure = decided.statuses == 0
    assert sure.mean() == pytest.approx(found.coverage)
    assert (decided.classes[sure, 0] == truth[sure]).mean() == pytest.approx(found.precision)


def test_shapes_never_shown_are_told_from_known_ones(run, model_dir, tmp_path):
    """Abstention by the probability: what no example shows is less sure. Chance is 0.5, and 0.95 of unknowns pass."""
    rng = np.random.default_rng(0)
    known = [("red", "circle"), ("green", "square"), ("blue", "ring")]
    unknown = [("yellow", "star"), ("purple", "heart"), ("brown", "cross")]
    for folder, pairs, count in (("examples", known, 24), ("photos", known, 30), ("unknown", unknown, 30)):
        for pair in pairs:
            (tmp_path / folder / " ".join(pair)).mkdir(parents=True)
            for number in range(count):
                draw(random_scene(rng, [pair]), rng, 32).save(tmp_path / folder / " ".join(pair) / f"{number}.png")
    scores = []
    for folder in ("photos", "unknown"):
        call = ["classify", tmp_path / folder, "--labels", ",".join(map(" ".join, known)), "--model", model_dir]
        out = run(*call, "--examples", tmp_path / "examples", "--calibrate", "--format", "jsonl").out
        rows = [json.loads(line) for line in out.splitlines()]
        scores.append(np.array([row["probability"] for row in rows]))
    assert auroc(*scores) > 0.65  # 0.81 was met
    assert fpr_at_tpr(*scores) < 0.92  # and 0.81


@pytest.mark.parametrize("method", ["linear", "tip-adapter", "prototypes"])
def test_classes_never_shown_are_told_from_known_ones(method):
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        means = 2 * rng.normal(size=(6, 12))
        text = unit(means[:4] + 2 * rng.normal(size=(4, 12)))
        images = [unit(np.repeat(means[some], each, 0) + rng.normal(size=(len(some) * each, 12)))
                  for some, each in ((range(4), 10), (range(4), 100), (range(4, 6), 200))]  # fmt: skip
        fit = fit_classifiers(LABELS, ["{}"], [Fake(10.0, text)], Cache(None), Learning(method, calibrate=True),
                              examples_of(images[0], np.repeat(np.arange(4), 10)))  # fmt: skip
        decided = [classify_images(Images([""] * 400, lambda _, at, own=own: own[at]), fit.classifiers, Rule(), top=1)
                   for own in images[1:]]  # fmt: skip
        scores = [each.probabilities[:, 0] for each in decided]
        found.append((auroc(*scores), fpr_at_tpr(*scores)))
    aurocs, passed = np.array(found).T
    assert aurocs.min() > 0.6
    assert aurocs.mean() > 0.75
    assert passed.mean() < 0.75


def test_prompts_are_judged_one_by_one(run, refused, photos, model_dir, tmp_path):
    prompts = ["{}", "a drawing of a {}.", "{} things"]
    _, result = ask(run, photos, model_dir, "--prompts", "|".join(prompts), "--ablate-prompts")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["template"] for row in rows] == prompts

    def accuracy(*some):
        return right(ask(run, photos, model_dir, "--prompts", "|".join(some))[0])

    for row in rows:
        others = [prompt for prompt in prompts if prompt != row["template"]]
        assert row["alone"] == pytest.approx(accuracy(row["template"]))
        assert row["without"] == pytest.approx(accuracy(*others))
        assert row["adds"] == pytest.approx(accuracy(*prompts) - accuracy(*others))
        assert row["images"] == 24
    single = json.loads(ask(run, photos, model_dir, "--prompts", "a {}", "--ablate-prompts")[1].out)
    assert (single["without"], single["adds"]) == (None, None)
    call = ["--labels", "cat,dog", "--model", model_dir, "--ablate-prompts"]
    assert "images of known labels" in refused("classify", photos / "photos", *call)


def test_the_page_shows_what_the_examples_tell(run, photos, model_dir, tmp_path):
    page = tmp_path / "page.html"
    _, result = ask(run, photos, model_dir, "--examples", photos / "examples", "--calibrate", "--report", page)
    assert result.status == 0
    text = page.read_text()
    for shown in ("What the examples tell", "by the names alone", "calibration error", "reliability diagram", "linear"):
        assert shown in text
    assert Path(page).stat().st_size < 2e6
