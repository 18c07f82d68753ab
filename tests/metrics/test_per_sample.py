"""What is kept of each sample: intervals and differences against the bootstrap over samples really repeated."""

import json

import numpy as np
import pytest

from clipkit.core import ClipkitError
from clipkit.evaluation import Evaluation, Result, changes_of_all, differences_from_first, matches
from clipkit.evaluation.baseline import changes, matching
from clipkit.evaluation.measuring import Further, measure_classes, measure_labels, measure_retrieval
from clipkit.metrics import (
    PerSample,
    bootstrap,
    choice_per_sample,
    differences,
    intervals_of,
    lower_is_better,
    mean_average_precision,
    mean_of,
    packed,
    paired_bootstrap,
    rank_pairs,
    retrieval_per_sample,
    retrieval_ranks,
    unpacked,
    wilson_interval,
)
from clipkit.metrics.average_precision import mean_average_precision_of
from clipkit.metrics.intervals import bootstrap_all
from clipkit.metrics.ranking import median_rank_of


def unit(rng, rows, dim=8):
    found = rng.normal(size=(rows, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def retrieval(seed, images=23, noise=0.8, of="x"):
    rng = np.random.default_rng(9)
    image = unit(rng, images)
    # Some images have no caption, others several, in no order.
    image_of_text = np.random.default_rng(1).permutation(np.repeat(np.arange(2, images), np.arange(2, images) % 3 + 1))
    text = image[image_of_text] + noise * np.random.default_rng(seed).normal(size=(len(image_of_text), 8))
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    return retrieval_ranks(image, text, image_of_text)


def test_intervals_of_retrieval_are_over_images_with_all_their_captions():
    ranks = retrieval(0)
    found = intervals_of(PerSample.of_retrieval(ranks, [1, 5], "x"))
    values = retrieval_per_sample(ranks, [1, 5])
    for name, of_name in values.items():
        groups = ranks.image_of_text if name.startswith("image_") else None
        if name.startswith("text_retrieval_recall"):  # a share of independent images
            assert found[name] == wilson_interval(of_name.sum(), len(of_name))
            continue
        assert found[name] == pytest.approx(bootstrap(mean_of(of_name), len(of_name), groups=groups)), name
    median = bootstrap(median_rank_of(ranks.by_text), len(ranks.image_of_text), groups=ranks.image_of_text)
    assert found["image_retrieval_median_rank"] == median
    assert len(found) == 8


def test_differences_are_on_the_same_draws():
    one, two = (PerSample.of_retrieval(retrieval(seed, noise=noise), [1], "x") for seed, noise in ((0, 0.2), (1, 1.5)))
    found = differences(one, two)
    values = [retrieval_per_sample(retrieval(seed, noise=noise), [1]) for seed, noise in ((0, 0.2), (1, 1.5))]
    groups = one.arrays["image_of_text"]
    for name in ("image_retrieval_recall@1", "image_retrieval_mrr"):
        first, second = (mean_of(each[name]) for each in values)
        assert found[name] == pytest.approx(paired_bootstrap(first, second, len(groups), groups=groups))
    assert found["image_retrieval_mrr"].low > 0  # so much noise is worse
    assert all(interval == (0, 0, 0) for interval in differences(one, one).values())
    other = PerSample.of_retrieval(retrieval(0), [1], "of other data")
    assert differences(one, other) is None


def test_shares_have_wilsons_interval_and_classes_the_bootstraps():
    rng = np.random.default_rng(0)
    image, vectors, labels = unit(rng, 40), unit(rng, 5), rng.integers(5, size=40)
    found = measure_classes(image, vectors, labels, [1, 2], list("abcde"), Further("x", True))
    right = (image @ vectors.T).argmax(axis=1) == labels
    assert found.intervals["zeroshot_acc@1"] == list(wilson_interval(int(right.sum()), 40)[1:])
    assert set(found.intervals) == set(found.figures)
    said = (image @ vectors.T).argmax(axis=1)
    wanted = {(a, b): int(((labels == a) & (said == b)).sum()) for a in range(5) for b in range(5) if a != b}
    told = {("abcde".index(row["shown"]), "abcde".index(row["said"])): row["images"] for row in found.confused}
    assert told == {pair: count for pair, count in wanted.items() if count}
    assert found.compat["acc1"] == pytest.approx(found.figures["zeroshot_acc@1"])


def test_what_is_kept_comes_back_from_json():
    rng = np.random.default_rng(0)
    ranks, _ = rank_pairs(unit(rng, 30), unit(rng, 400), rng.integers(400, size=30))
    values = choice_per_sample(rng.integers(3, size=(30, 2)) / 4)
    for samples in (
        PerSample.of_retrieval(retrieval(0), [1, 10], "a"),
        PerSample.of_classes(ranks, rng.integers(400, size=30), [1], "b"),
        PerSample.of_labels(rng.random((30, 3)).astype(np.float32), rng.random((30, 3)) < 0.5, "c"),
        PerSample.of_values({"choice_acc": values}, "d"),
    ):
        told = packed(samples)
        assert told == packed(samples)
        back = unpacked(json.loads(json.dumps(told)))
        assert intervals_of(back) == intervals_of(samples)
        assert set(differences(back, samples).values()) == {(0, 0, 0)}
    with pytest.raises(ClipkitError, match="cannot be read"):
        unpacked({**told, "form": "other"})
    with pytest.raises(ClipkitError, match="evaluate it again"):
        unpacked({**told, "arrays": {"x": {"dtype": "<f8", "shape": [9], "data": "AAAA"}}})


def test_mean_average_precision_is_drawn_by_images():
    rng = np.random.default_rng(0)
    image, vectors, labels = unit(rng, 25), unit(rng, 4), rng.random((25, 4)) < 0.4
    found = measure_labels(image, vectors, labels, Further("x"))
    name = "zeroshot_mean_average_precision"
    draws = []
    drawing = np.random.default_rng(0)
    for _ in range(1000):
        rows = drawing.integers(25, size=25)
        draws.append(mean_average_precision((image @ vectors.T)[rows], labels[rows]))
    low, high = np.quantile(draws, [0.025, 0.975]) + found.figures[name] - np.mean(draws)
    assert found.intervals[name] == pytest.approx([low, high], abs=2e-3)  # a repeated image ties with itself there


def test_the_interval_of_mean_average_precision_holds_it():
    """An image that is drawn twice ties with itself, which lifts the precision of nearly every draw."""
    rng = np.random.default_rng(0)
    labels = rng.random((20, 100)).argsort(axis=0) < 1
    scores = [rng.random((20, 100)).astype(np.float32) for _ in range(2)]
    of = [PerSample.of_labels(each, labels, "x") for each in scores]
    plain = bootstrap(mean_average_precision_of(scores[0], labels), 20)
    assert plain.value < plain.low
    (found,) = intervals_of(of[0]).values()
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(plain.high - plain.low)
    (apart,) = differences(*of).values()
    assert apart.low < apart.value < apart.high
    statistics = [mean_average_precision_of(each, labels) for each in scores]
    assert apart == paired_bootstrap(*statistics, 20, centred=True)
    assert differences(of[0], of[0]) == {"zeroshot_mean_average_precision": (0, 0, 0)}
    # Shifted, it still is of shares.
    labels = np.eye(9, dtype=bool)
    for scores in (labels, ~labels):
        (found,) = intervals_of(PerSample.of_labels(scores.astype(np.float32), labels, "x")).values()
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_what_an_index_serves_of_the_exact_has_an_interval_and_its_chance():
    ranks = retrieval(0, images=60)
    exact = retrieval_per_sample(ranks, [5])
    rng = np.random.default_rng(0)
    served = [
        {
            f"served_{side}_retrieval_recall@5": (rng.random(len(exact[f"{side}_retrieval_recall@5"])) < 0.9)
            * exact[f"{side}_retrieval_recall@5"].round().astype(np.uint8)
            for side in ("image", "text")
        }
        for _ in range(2)
    ]
    of = [PerSample.of_retrieval(ranks, [5], "x", each) for each in served]
    found, apart = intervals_of(of[0]), differences(*of)
    captions = np.unique(ranks.image_of_text, return_inverse=True)[1]
    drawing, draws = np.random.default_rng(0), []
    units = captions.max() + 1
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(captions == unit) for unit in drawing.integers(units, size=units)])
        whole = exact["image_retrieval_recall@5"][rows]
        draws.append((served[0]["served_image_retrieval_recall@5"][rows] * whole).sum() / whole.sum())
    wanted = np.quantile(draws, [0.025, 0.975])
    assert found["image_retrieval_served_share@5"][1:] == pytest.approx(tuple(wanted))
    for name in ("image_retrieval_served_share@5", "text_retrieval_served_share@5"):
        assert found[name].low < found[name].value < found[name].high
        assert apart[name].low <= 0 <= apart[name].high
        now, base = (result({name: intervals_of(each)[name].value}, packed(each)) for each in of)
        change = changes(now, base) + changes(base, now)
        assert not any(each.worse for each in change)  # one of the two is the smaller one, by chance
        assert all(each.paired for each in change)
    nothing = PerSample.of_retrieval(ranks, [1], "x", {"served_text_retrieval_recall@1": np.zeros(units, np.uint8)})
    assert intervals_of(nothing)["text_retrieval_served_share@1"] == (0, 0, 0)


def test_all_at_once_is_each_alone():
    rng = np.random.default_rng(0)
    statistics = {"a": mean_of(rng.random(30)), "b": mean_of(rng.random(30))}
    assert bootstrap_all(statistics, 30) == {name: bootstrap(each, 30) for name, each in statistics.items()}
    assert np.isnan(bootstrap_all({"a": mean_of(np.ones(1))}, 1)["a"].low)
    with pytest.raises(ClipkitError, match="draws make no interval"):
        bootstrap_all(statistics, 30, draws=0)


def result(figures, samples=None, intervals=None):
    found = Evaluation(figures, {}, {}, [], intervals or {}, samples)
    return Result("d", "retrieval", "m", "f", found)


def test_a_regression_is_more_than_chance_and_tolerance():
    values = np.random.default_rng(0).random(200) < 0.6
    good, bad = (
        packed(PerSample.of_values({"choice_acc": v * 1.0}, "x")) for v in (values, values & (np.arange(200) % 9 > 0))
    )
    means = [values.mean(), (values & (np.arange(200) % 9 > 0)).mean()]
    base, now = result({"choice_acc": means[0]}, good), result({"choice_acc": means[1]}, bad)
    (change,) = changes(now, base)
    assert change.worse
    assert change.paired
    assert change.difference.high < 0
    assert "paired" in change.line()
    assert not changes(now, base, tolerance=0.2)[0].worse
    assert not changes(base, now)[0].worse  # better is none
    # Without samples the figure's own interval has to lie below.
    for high, worse in ((0.55, True), (0.65, False)):
        one = result({"choice_acc": 0.5}, None, {"choice_acc": [0.45, high]})
        assert changes(one, result({"choice_acc": 0.6}))[0].worse is worse
    assert changes(result({"x": 0.5}), result({"x": 0.6}))[0].worse
    assert not changes(result({"x": 0.5}), result({"x": 0.6}), tolerance=0.11)[0].worse
    # Of ranks the larger one is worse, and the tolerance is a share.
    name = "image_retrieval_median_rank"
    assert lower_is_better(name)
    ranked = result({name: 30.0}, None, {name: [25, 35]})
    assert changes(ranked, result({name: 20.0}))[0].worse
    assert not changes(ranked, result({name: 20.0}), tolerance=0.3)[0].worse
    assert not changes(ranked, result({name: 28.0}))[0].worse


def test_nothing_more_is_worked_out_than_is_wanted():
    rng = np.random.default_rng(0)
    found = measure_retrieval(unit(rng, 5), unit(rng, 5), np.arange(5), [1])
    assert (found.intervals, found.samples, found.compat) == ({}, None, {})


def named(name, model="m", task="retrieval", samples=None, value=0.5):
    return Result(name, task, model, model, Evaluation({"choice_acc": value}, {}, {}, [], {}, samples))


def test_a_baseline_of_one_dataset_is_not_that_of_another():
    held = [named("a.tsv")]
    assert matching("retrieval", "renamed.tsv", held, alone=True) is held[0]
    assert matching("retrieval", "hard.tsv", held) is None
    assert matching("choice", "a.tsv", held, alone=True) is None
    found = matches([("retrieval", "a.tsv"), ("retrieval", "hard.tsv")], held)
    assert found == {("retrieval", "a.tsv"): held[0]}
    now = [named("a.tsv", value=0.5), named("hard.tsv", value=0.1)]
    assert [(each.dataset, each.worse) for each in changes_of_all(now, found)] == [("a.tsv", False)]
    # With several models to one dataset it is another matter: all are held against the same.
    assert len(changes_of_all([named("b.tsv"), named("b.tsv", "n")], matches([("retrieval", "b.tsv")], held)))
    with pytest.raises(ClipkitError, match=r"several results of retrieval on a.tsv \(m, n\)"):
        matches([("retrieval", "a.tsv")], [*held, named("a.tsv", "n")])
    with pytest.raises(ClipkitError, match="has no choice on c to compare with; it holds retrieval on a.tsv"):
        matches([("choice", "c"), ("choice", "d")], held)


def test_a_change_is_paired_only_where_the_pairs_tell_something():
    alone = packed(PerSample.of_values({"choice_acc": np.ones(1)}, "x"))
    (change,) = changes(named("a", samples=alone, value=1.0), named("a", samples=alone, value=1.0))
    assert not change.paired  # one sample has no interval
    assert "not paired" in change.line()


def test_differences_are_from_one_model_throughout():
    def of(name, model, *values):
        return named(name, model, samples=packed(PerSample.of_values({"choice_acc": np.array(values)}, name)))

    results = [of("a", "one", 0.0, 1.0), of("a", "two", 1.0, 1.0), of("b", "two", 1.0, 0.0), of("b", "three", 1.0, 1.0)]
    assert list(differences_from_first(results)) == [("a", "retrieval", "two")]
    results.insert(2, of("b", "one", 0.0, 0.0))
    assert len(differences_from_first(results)) == 3
