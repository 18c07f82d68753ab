"""Retrieval metrics against brute force, scikit-learn and CLIP_benchmark's definitions."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    label_ranking_average_precision_score,
    top_k_accuracy_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion

from clipkit.metrics import (
    clamped,
    class_mean_of,
    confusion_matrix,
    guessed_retrieval,
    retrieval_figures,
    retrieval_per_sample,
    retrieval_ranks,
    zeroshot_chance,
)
from clipkit.metrics.accuracy import zeroshot_accuracy, zeroshot_per_sample
from clipkit.metrics.retrieval import retrieval_recall


def unit(rng, n, dim=6):
    rows = rng.normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute(image, text, image_of_text, k):
    """Both recalls from sorted lists, for untied scores: the definitions read aloud."""
    scores = text.astype(np.float32) @ image.T.astype(np.float32)
    by_text = [image_of_text[t] in np.argsort(-scores[t])[:k] for t in range(len(text))]
    by_image = [
        any(image_of_text[t] == i for t in np.argsort(-scores[:, i])[:k])
        for i in range(len(image))
        if i in image_of_text
    ]
    return np.mean(by_text), np.mean(by_image)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_recall_is_what_sorting_says(images, captions, seed, k):
    rng = np.random.default_rng(seed)
    image_of_text = rng.integers(images, size=images * captions)
    image, text = unit(rng, images), unit(rng, len(image_of_text))
    figures = retrieval_recall(image, text, image_of_text, [k])
    wanted = brute(image, text, image_of_text, k)
    assert figures[f"image_retrieval_recall@{k}"] == pytest.approx(wanted[0])
    assert figures[f"text_retrieval_recall@{k}"] == pytest.approx(wanted[1])


def test_recall_is_scikit_learns_top_k_accuracy():
    rng = np.random.default_rng(3)
    image, text = unit(rng, 50), unit(rng, 50)
    figures = retrieval_recall(image, text, np.arange(50), [1, 5])
    for k in (1, 5):
        theirs = top_k_accuracy_score(np.arange(50), text @ image.T, k=k, labels=np.arange(50))
        assert figures[f"image_retrieval_recall@{k}"] == pytest.approx(theirs)


def test_recall_is_clip_benchmarks():
    """CLIP_benchmark counts, per image, the positives among its top k, and takes "more than none"."""
    rng = np.random.default_rng(4)
    image_of_text = np.repeat(np.arange(20), 5)
    image, text = unit(rng, 20), unit(rng, 100)
    scores = text @ image.T
    positive = image_of_text[:, None] == np.arange(20)
    for k in (1, 5, 10):
        top_texts = np.argsort(-scores, axis=0)[:k]
        text_recall = np.take_along_axis(positive, top_texts, axis=0).sum(axis=0) > 0
        top_images = np.argsort(-scores, axis=1)[:, :k]
        image_recall = np.take_along_axis(positive, top_images, axis=1).sum(axis=1) > 0
        figures = retrieval_recall(image, text, image_of_text, [k])
        assert figures[f"text_retrieval_recall@{k}"] == pytest.approx(text_recall.mean())
        assert figures[f"image_retrieval_recall@{k}"] == pytest.approx(image_recall.mean())


def retrieval_chance(images, image_of_text, ks=(1, 5, 10)):
    """What guessing scores under the names of `retrieval_recall`."""
    figures = retrieval_figures(guessed_retrieval(images, image_of_text), ks)
    return {name: value for name, value in figures.items() if "recall@" in name}


@pytest.mark.parametrize(("images", "captions"), [(7, 1), (10, 3), (33, 5), (49, 2)])
def test_a_collapsed_model_scores_exactly_chance(images, captions):
    image_of_text = np.repeat(np.arange(images), captions)[: images * captions - captions // 2]
    image = np.tile(unit(np.random.default_rng(0), 1, 37), (images, 1))
    assert retrieval_recall(image, image[image_of_text], image_of_text) == retrieval_chance(images, image_of_text)
    ranks = retrieval_ranks(image, image[image_of_text], image_of_text)
    figures = retrieval_figures(ranks)
    assert figures == retrieval_figures(guessed_retrieval(images, image_of_text))
    assert figures["image_retrieval_recall@1"] == 1 / images
    assert figures["image_retrieval_median_rank"] == (images + 1) / 2
    if captions == 1:
        assert figures["text_retrieval_mrr"] == pytest.approx(np.mean(1 / np.arange(1, images + 1)))


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_ranks_are_what_sorting_says(images, captions, seed):
    rng = np.random.default_rng(seed)
    image_of_text = rng.integers(images, size=images * captions)
    image, text = unit(rng, images), unit(rng, len(image_of_text))
    figures = retrieval_figures(retrieval_ranks(image, text, image_of_text))
    scores = text @ image.T
    assume(all(np.diff(np.sort(scores, axis=axis), axis=axis).min(initial=1) > 2e-6 for axis in (0, 1)))  # no ties
    order = np.argsort(-scores, axis=1)
    by_text = 1 + (order == image_of_text[:, None]).argmax(axis=1)
    by_image = [
        1 + min(np.flatnonzero(image_of_text[np.argsort(-scores[:, i])] == i)) for i in np.unique(image_of_text)
    ]
    for side, places in (("image", by_text), ("text", np.array(by_image))):
        assert figures[f"{side}_retrieval_median_rank"] == np.median(places)
        assert figures[f"{side}_retrieval_mrr"] == pytest.approx(np.mean(1 / places))
    # With one relevant item per query it is the mean reciprocal rank.
    theirs = label_ranking_average_precision_score(image_of_text[:, None] == np.arange(images), scores)
    assert figures["image_retrieval_mrr"] == pytest.approx(theirs)


def test_figures_are_the_means_of_what_each_sample_gives():
    rng = np.random.default_rng(5)
    image_of_text = np.array([0, 0, 2, 3, 3, 3, 5])
    image, text = np.eye(4, dtype=np.float32)[rng.integers(4, size=6)], unit(rng, 7, 4)
    ranks = retrieval_ranks(image, text, image_of_text)
    figures, values = retrieval_figures(ranks, [1, 3]), retrieval_per_sample(ranks, [1, 3])
    assert set(figures) - set(values) == {"image_retrieval_median_rank", "text_retrieval_median_rank"}
    assert {name: len(of_queries) for name, of_queries in values.items()} == {
        **dict.fromkeys(["image_retrieval_recall@1", "image_retrieval_recall@3", "image_retrieval_mrr"], 7),
        **dict.fromkeys(["text_retrieval_recall@1", "text_retrieval_recall@3", "text_retrieval_mrr"], 4),
    }
    for name, of_queries in values.items():
        assert figures[name] == pytest.approx(of_queries.mean())
        assert ((of_queries >= 0) & (of_queries <= 1)).all()
    assert {name: figures[name] for name in retrieval_chance(6, image_of_text, [1, 3])} == retrieval_recall(
        image, text, image_of_text, [1, 3]
    )


def test_lists_longer_than_the_set_are_told():
    assert clamped((1, 5, 10), 5) == [10]
    assert clamped((1, 5), 5) == []


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_the_mean_over_random_orders(seed):
    rng = np.random.default_rng(seed)
    image_of_text = np.repeat(np.arange(6), 2)
    image = np.eye(3, dtype=np.float32)[rng.integers(3, size=6)]
    text = np.eye(3, dtype=np.float32)[rng.integers(3, size=12)]
    figures = retrieval_recall(image, text, image_of_text, [2])
    sampled = [
        brute_with_noise(image, text, image_of_text, 2, np.random.default_rng([seed, trial])) for trial in range(3000)
    ]
    mean = np.mean(sampled, axis=0)
    assert figures["image_retrieval_recall@2"] == pytest.approx(mean[0], abs=0.03)
    assert figures["text_retrieval_recall@2"] == pytest.approx(mean[1], abs=0.03)


def brute_with_noise(image, text, image_of_text, k, rng):
    scores = text @ image.T + rng.uniform(0, 1e-3, (len(text), len(image)))
    by_text = np.take_along_axis(image_of_text[:, None] == np.arange(len(image)), np.argsort(-scores, 1)[:, :k], 1)
    by_image = np.take_along_axis(image_of_text[:, None] == np.arange(len(image)), np.argsort(-scores, 0)[:k], 0)
    return by_text.any(1).mean(), by_image.any(0).mean()


def test_images_without_captions_are_items_but_no_queries():
    image = np.eye(4, dtype=np.float32)
    figures = retrieval_recall(image, image[:2], np.array([0, 1]), [1])
    assert figures == {"image_retrieval_recall@1": 1.0, "text_retrieval_recall@1": 1.0}


def test_small_and_empty_sets():
    image = np.eye(2, dtype=np.float32)
    assert retrieval_recall(image, image[:0], np.zeros(0, int)) == {}
    assert set(retrieval_recall(image[:1], image[:1], np.array([0]), [1, 10]).values()) == {1.0}
    assert set(retrieval_figures(retrieval_ranks(image[:1], image[:1], np.array([0]))).values()) == {1.0}
    for nothing in (retrieval_ranks(image, image[:0], np.zeros(0, int)), guessed_retrieval(2, np.zeros(0, int))):
        assert retrieval_figures(nothing) == {}
    assert retrieval_chance(2, np.zeros(0, int)) == {}


def test_confusion_matrix_is_scikit_learns():
    rng = np.random.default_rng(0)
    true, said = rng.integers(5, size=(2, 100))
    assert np.array_equal(confusion_matrix(true, said, 5), sklearn_confusion(true, said, labels=range(5)))


@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_zeroshot_accuracy_is_scikit_learns(classes, images, seed):
    rng = np.random.default_rng(seed)
    image, vectors = unit(rng, images), unit(rng, classes)
    labels = rng.integers(classes, size=images)
    scores = image @ vectors.T
    figures = zeroshot_accuracy(image, vectors, labels, ks=(1, 3, 5))
    assert figures["zeroshot_acc@1"] == pytest.approx(accuracy_score(labels, scores.argmax(axis=1)))
    for k in (3, 5):
        wanted = 1.0  # where scikit-learn only warns
        if k < classes > 2:
            wanted = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(classes))
        assert figures[f"zeroshot_acc@{k}"] == pytest.approx(wanted)
    seen = np.isin(scores.argmax(axis=1), labels)
    said = np.where(seen, scores.argmax(axis=1), -1)  # it warns of classes that are said and not there, too
    wanted = np.mean([np.mean(said[labels == label] == label) for label in np.unique(labels)])
    assert figures["zeroshot_mean_per_class_recall"] == pytest.approx(wanted)
    if seen.all() and len(np.unique(labels)) > 1:
        assert balanced_accuracy_score(labels, said) == pytest.approx(wanted)


@pytest.mark.parametrize("classes", [2, 3, 10, 49])
def test_a_collapsed_classifier_scores_exactly_chance(classes):
    labels = np.array([0, 0, 0, 1, classes - 1])
    image = np.tile(unit(np.random.default_rng(0), 1, 37), (5, 1))
    assert zeroshot_accuracy(image, np.tile(image[:1], (classes, 1)), labels) == zeroshot_chance(classes)


def test_zeroshot_accuracy_is_the_mean_of_what_each_image_gives():
    rng = np.random.default_rng(0)
    image, vectors, labels = unit(rng, 40), unit(rng, 6), rng.integers(5, size=40)
    figures, values = zeroshot_accuracy(image, vectors, labels), zeroshot_per_sample(image, vectors, labels)
    for name, of_images in values.items():
        assert figures[name] == pytest.approx(of_images.mean())
    per_class = class_mean_of(values["zeroshot_acc@1"], labels)(np.ones((1, 40), np.int64))[0]
    assert figures["zeroshot_mean_per_class_recall"] == pytest.approx(per_class)
    assert set(zeroshot_accuracy(image, vectors, labels, ks=(5,))) == {
        "zeroshot_acc@5",
        "zeroshot_mean_per_class_recall",
    }


def test_a_tie_counts_as_its_share():
    image = np.eye(3, dtype=np.float32)[:1]
    classes = np.stack([image[0], image[0], np.eye(3, dtype=np.float32)[2]])
    figures = zeroshot_accuracy(image, classes, np.array([1]), ks=(1, 2, 9))
    assert figures == {
        "zeroshot_acc@1": 0.5,
        "zeroshot_acc@2": 1.0,
        "zeroshot_acc@9": 1.0,
        "zeroshot_mean_per_class_recall": 0.5,
    }
    assert zeroshot_chance(3, (1, 2, 9)) == {
        "zeroshot_acc@1": 1 / 3,
        "zeroshot_acc@2": 2 / 3,
        "zeroshot_acc@9": 1.0,
        "zeroshot_mean_per_class_recall": 1 / 3,
    }
    assert zeroshot_accuracy(image[:0], classes, np.zeros(0, int)) == {}
