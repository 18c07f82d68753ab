"""Retrieval metrics against brute force, scikit-learn and CLIP_benchmark's definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from clipkit.metrics import (
    confusion_matrix,
    retrieval_chance,
    retrieval_recall,
    zeroshot_accuracy,
    zeroshot_chance,
)


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


@pytest.mark.parametrize(("images", "captions"), [(7, 1), (10, 3), (33, 5)])
def test_a_collapsed_model_scores_exactly_chance(images, captions):
    image_of_text = np.repeat(np.arange(images), captions)
    image = np.tile(unit(np.random.default_rng(0), 1, 37), (images, 1))
    figures = retrieval_recall(image, image[image_of_text], image_of_text, [1, 5, 10])
    assert figures == pytest.approx(retrieval_chance(images, image_of_text, [1, 5, 10]), abs=1e-12)


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


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_collapsed_classifier_scores_exactly_chance(classes):
    labels = np.array([0, 0, 0, 1, classes - 1])
    image = np.tile(unit(np.random.default_rng(0), 1, 37), (5, 1))
    figures = zeroshot_accuracy(image, np.tile(image[:1], (classes, 1)), labels)
    assert figures == pytest.approx(zeroshot_chance(classes), abs=1e-12)


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
