"""Other programs' definitions against what those programs say.

The figures of CLIP_benchmark were written by tests/bench/clip_benchmark_figures.py, which runs its own functions.
"""

import json

import numpy as np
import pytest

from clipkit.core import ClipkitError
from clipkit.metrics import (
    choice_per_sample,
    choice_scores,
    clip_benchmark_choice,
    clip_benchmark_classification,
    clip_benchmark_mean_average_precision,
    clip_benchmark_retrieval,
    mean_average_precision,
    rank_pairs,
    retrieval_ranks,
    winoground_per_sample,
)
from clipkit.metrics.accuracy import zeroshot_accuracy
from clipkit.metrics.retrieval import retrieval_recall
from tests.paths import ROOT

FIGURES = json.loads((ROOT / "tests" / "clip_benchmark_figures.json").read_text())
UNTIED = "random"


def unit(rows, dim=7):
    found = np.array(rows, np.float32).reshape(-1, dim)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def of_cases(task):
    return pytest.mark.parametrize(
        "case", FIGURES[task], ids=lambda c: f"{c['kind']}-{len(c.get('image', c.get('scores')))}"
    )


def between(ranks, k):
    """The share of queries whose relevant item is among the first k if ties go against it, and if they go for it."""
    worst, best = ranks.better + ranks.tied - ranks.relevant_tied, ranks.better
    return (worst < k).mean() - 1e-6, (best < k).mean() + 1e-6


@of_cases("retrieval")
def test_retrieval_is_clip_benchmarks(case):
    image, text = unit(case["image"]), unit(case["text"])
    image_of_text = np.repeat(np.arange(len(image)), case["captions"])
    given_ = image, text, image_of_text, case["ks"]
    if isinstance(case["figures"], str):
        assert not len(text)
        with pytest.raises(ClipkitError, match="no recall at 10 for 0 images and 0 captions"):
            clip_benchmark_retrieval(*given_)
        assert retrieval_recall(*given_) == {}
        return
    found, ours = clip_benchmark_retrieval(*given_), retrieval_recall(*given_)
    assert found.keys() == ours.keys() == case["figures"].keys()
    ranks = retrieval_ranks(*given_[:3])
    for side, of_side in (("image", ranks.by_text), ("text", ranks.by_image)):
        for k in case["ks"]:
            name = f"{side}_retrieval_recall@{k}"
            low, high = between(of_side, k)
            assert all(low <= figures[name] <= high for figures in (found, ours, case["figures"]))
    if case["kind"] == UNTIED:
        assert found == pytest.approx(case["figures"], abs=1e-6)
        assert ours == pytest.approx(case["figures"], abs=1e-6)


@of_cases("classification")
def test_classification_is_clip_benchmarks(case):
    image, classes, labels = unit(case["image"]), unit(case["classes"]), np.array(case["labels"], np.int64)
    if isinstance(case["figures"], str):
        assert not len(image)
        with pytest.raises(ClipkitError, match="no accuracy of no images"):
            clip_benchmark_classification(image, classes, labels)
        return
    found, ours = clip_benchmark_classification(image, classes, labels), zeroshot_accuracy(image, classes, labels)
    theirs = {name: np.nan if value is None else value for name, value in case["figures"].items()}
    assert np.isnan(theirs["acc5"]) == (len(classes) < 5)
    # It takes its classes by argmax, which is the first, but its accuracy from topk, which is any.
    assert found["mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"])
    ranks, _ = rank_pairs(image, classes, labels)
    for name, k in (("acc1", 1), ("acc5", 5)):
        low, high = between(ranks, k)
        for value in (found[name], theirs[name]):
            assert np.isnan(value) or low <= value <= high
    if case["kind"] == UNTIED:
        assert found == pytest.approx(theirs, nan_ok=True)
        assert ours["zeroshot_acc@1"] == pytest.approx(theirs["acc1"])
        assert ours["zeroshot_acc@5"] == pytest.approx(theirs["acc5"] if len(classes) >= 5 else 1)
        assert ours["zeroshot_mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"])


@of_cases("precision")
def test_mean_average_precision_is_clip_benchmarks(case):
    shape = -1, case["classes"]
    scores, labels = np.array(case["scores"], float).reshape(shape), np.array(case["labels"], bool).reshape(shape)
    found, theirs = clip_benchmark_mean_average_precision(scores, labels), case["figures"]["mean_average_precision"]
    # Positives are put last, or first, among equal scores.
    worst, best = (clip_benchmark_mean_average_precision(scores + sign * 0.1 * labels, labels) for sign in (-1, 1))
    assert worst - 1e-6 <= theirs <= best + 1e-6
    assert worst <= found <= best
    if case["kind"] == UNTIED:
        assert found == pytest.approx(theirs, abs=1e-6)
        held = labels.any(axis=0)
        ours = mean_average_precision(scores, labels)
        assert np.nan_to_num(ours) * held.mean() == pytest.approx(theirs, abs=1e-6)  # the others count as 0
    else:
        assert worst < mean_average_precision(scores, labels) < best


@of_cases("choice")
def test_choices_are_clip_benchmarks(case):
    image, text = unit(case["image"]), unit(case["text"])
    image, text = image.reshape(-1, case["images"], 7), text.reshape(-1, 2, 7)
    found = clip_benchmark_choice(image, text)
    theirs = {name: np.nan if value is None else value for name, value in case["figures"].items()}
    assert found == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    if case["kind"] != UNTIED or not len(image):
        return
    scores = choice_scores(image, text)
    if case["images"] == 1:
        assert choice_per_sample(scores[:, 0]).mean() == pytest.approx(theirs["text_acc"])
    else:
        ours = [values.mean() for values in winoground_per_sample(scores).values()]
        assert ours == pytest.approx([theirs[name] for name in ("text_acc", "image_acc", "acc")])


def test_images_without_captions_are_queries_that_fail():
    image = np.eye(4, dtype=np.float32)
    found = clip_benchmark_retrieval(image, image[:2], np.array([0, 1]), [1])
    assert found == {"image_retrieval_recall@1": 1.0, "text_retrieval_recall@1": 0.5}
    assert retrieval_recall(image, image[:2], np.array([0, 1]), [1])["text_retrieval_recall@1"] == 1
    with pytest.raises(ClipkitError, match="no recall at 3 for 4 images and 2 captions"):
        clip_benchmark_retrieval(image, image[:2], np.array([0, 1]), [1, 3])


def test_average_precision_of_nothing():
    assert np.isnan(clip_benchmark_mean_average_precision(np.zeros((2, 0)), np.zeros((2, 0), bool)))
