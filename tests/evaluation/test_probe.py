"""Probes on data as users have it: how it is divided, what is left out, what the command prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.classification import SweepOptions, choose_strength, fit_linear
from clipkit.core import ClipkitError
from clipkit.data.sources import Selected, Source, open_source, sample_id
from clipkit.evaluation import SharedWork
from clipkit.evaluation.options import ListColumns, ProbeOptions
from clipkit.evaluation.probe import evaluate_probe, open_probe, probe_rows
from clipkit.evaluation.probe.data import is_of_test
from clipkit.evaluation.probe.fusion import fit_head
from clipkit.models import LazyModel
from tests.evaluation.test_evaluation import make_classes, on_ranks
from tests.paths import ROOT
from tests.samples import encoded, photo, tar_of

DATA = ROOT.parent / "shared" / "data" / "emoji"
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
SHAPES = ("heart", "zebra crossing")
ASKED = {"label_column": "kind", "text_column": "words", "group_column": "thing"}


def flags(**asked) -> list[str]:
    return [part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def make_kinds(folder: Path, things: int = 40, seed: int = 0) -> Path:
    """A list of two drawings each of things: the drawing shows a colour, the words a shape, the kind is both."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = ["path\tcaption\tkind\twords\tthing"]
    for thing in range(things):
        colour, shape = list(COLOURS)[thing % 2], SHAPES[thing // 2 % 2]
        for number in range(2):
            noise = rng.integers(-25, 25, (24, 24, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            name = f"images/{thing:03d}{'ab'[number]}.png"
            Image.fromarray(pixels).save(folder / name)
            words = "" if thing % 10 == 9 and number else shape
            lines.append(f"{name}\ta drawing\t{colour} {shape}\t{words}\tthing {thing}")
    (folder / "kinds.tsv").write_text("\n".join(lines) + "\n")
    return folder / "kinds.tsv"


def beside(listed: Path) -> ListColumns:
    """A list elsewhere of the same pictures."""
    return ListColumns(image_root=str(listed.parent))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    return make_kinds(tmp_path_factory.mktemp("kinds"))


def test_the_command_finds_that_only_both_know_all(run, kinds, model_dir, tmp_path):
    call = ["evaluate", "probe", kinds, "--model", model_dir, *flags(**ASKED, test_share=0.5)]
    result = run(*call, "--format", "json", "--out", tmp_path / "o.json")
    assert result.status == 0, result
    found = json.loads(result.out)
    assert found["classes"] == 4
    assert found["images"] + found["training_images"] == 80
    assert found["images_without_text"] > 0
    assert found["linear_probe_acc@1"] < 0.75
    assert found["text_linear_probe_acc@1"] < 0.75
    for probe in ("early_fusion", "late_mean_fusion", "late_weighted_fusion", "attention_fusion"):
        assert found[f"{probe}_acc@1"] >= 0.85, probe
        assert found[f"{probe}_gain_low"] > 0
        assert found[f"{probe}_gain"] == pytest.approx(
            found[f"{probe}_acc@1"] - max(found["linear_probe_acc@1"], found["text_linear_probe_acc@1"])
        )
        assert found[f"{probe}_image_only_acc@1"] == found["linear_probe_acc@1"]
        assert found[f"{probe}_text_only_acc@1"] == found["text_linear_probe_acc@1"]
        assert found[f"{probe}_acc@1_low"] <= found[f"{probe}_acc@1"] <= found[f"{probe}_acc@1_high"]
    assert found["early_fusion_acc@5"] == found["chance_early_fusion_acc@5"] == 1
    assert 0.25 <= found["chance_linear_probe_acc@1"] < 0.4
    assert found["chance_linear_probe_mean_per_class_recall"] == 0.25
    assert "are the test" in result.err
    assert "acc@5 counts all of them" not in result.err, "which nobody asked for by name"
    (written,) = json.loads((tmp_path / "o.json").read_text())
    assert written["task"] == "linear_probe"
    assert written["metrics"]["lp_acc1"] == found["linear_probe_acc@1"]
    again = run(*call, "--format", "json")
    assert again.out == result.out
    table = run(*call)
    assert "late weighted fusion" in table.out
    assert "image+text" in table.out
    rows = [json.loads(line) for line in run(*call, "--format", "jsonl").out.splitlines()]
    assert len(rows) == 2 + 4 * 3
    by = {(row["probe"], row["inputs"]): row for row in rows}
    assert by["early fusion", "image+text"]["acc@1"] == found["early_fusion_acc@1"]
    assert by["linear", "image"]["low"] == found["linear_probe_acc@1_low"]
    assert by["attention fusion", "image+text"]["gain_high"] == found["attention_fusion_gain_high"]
    other = run(*call, "--model", model_dir, "--out", tmp_path / "o.md", "--format", "json", "--seed", 1)
    assert {row["figure"] for row in json.loads(other.out)} >= {"early_fusion_acc@1", "early_fusion_gain"}
    assert "| early_fusion_acc@1 |" in (tmp_path / "o.md").read_text().replace(str(kinds), "").replace("|  |", "|")


def test_a_linear_probe_is_the_fit_on_the_embeddings(kinds, model):
    task = open_probe(str(kinds), ProbeOptions(label_column="kind", group_column="thing"))
    lazy = LazyModel.of(model)
    found = evaluate_probe(SharedWork(lazy), task, (1, 2))
    train, test = (SharedWork(lazy).images(part.source).vectors for part in task)
    strength = choose_strength(train, task.train.labels, 4, SweepOptions(folds=3), groups=task.train.groups).strength
    logits = fit_linear(train, task.train.labels, 4, strength=strength).logits(test)
    order = np.argsort(-logits, axis=1)
    right = order[:, 0] == task.test.labels
    assert found.figures["linear_probe_acc@1"] == pytest.approx(right.mean())
    assert found.figures["linear_probe_acc@2"] == pytest.approx(
        (order[:, :2] == task.test.labels[:, None]).any(1).mean()
    )
    recalls = [right[task.test.labels == label].mean() for label in np.unique(task.test.labels)]
    assert found.figures["linear_probe_mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    largest = np.bincount(task.test.labels).max() / len(task.test.labels)
    assert found.chance["linear_probe_acc@1"] >= largest - 1e-12
    assert not [name for name in found.figures if "fusion" in name]
    assert [row["probe"] for row in probe_rows(found)] == ["linear"]


def test_the_same_on_any_number_of_ranks(kinds, model):
    task = open_probe(str(kinds), ProbeOptions(**ASKED))

    def evaluate(**among):
        return evaluate_probe(SharedWork(LazyModel.of(model), batch_size=7, **among), task, intervals=True)

    alone = evaluate()
    assert on_ranks(2, evaluate) == [alone] * 2


def test_one_source_is_divided_by_group_and_stays_divided(kinds, tmp_path):
    task = open_probe(str(kinds), ProbeOptions(**ASKED, test_share=0.4))
    train, test = ({part.source.key(i)[7:10] for i in range(len(part.labels))} for part in task)
    assert not train & test
    assert len(train | test) == 40
    for thing in range(40):
        name = f"{thing:03d}"
        assert (name in test) == is_of_test(f"thing {thing}", 0.4) == (sample_id(f"thing {thing}") / 2**63 < 0.4)
    assert set(task.train.groups) | set(task.test.groups) == set(range(40))
    assert not set(task.train.groups) & set(task.test.groups)
    half = tmp_path / "half.tsv"
    half.write_text("\n".join(kinds.read_text().splitlines()[:41]) + "\n")
    fewer = open_probe(str(half), ProbeOptions(**ASKED, test_share=0.4), columns=beside(kinds))
    left = {part.source.key(i)[7:10] for part in [fewer.test] for i in range(len(part.labels))}
    assert left == {name for name in test if int(name) < 20}, "whatever else the list holds"
    single = open_probe(str(kinds), ProbeOptions(label_column="kind"))
    assert {part.source.key(i) for part in [single.test] for i in range(len(part.labels))} == {
        name for name in open_source(kinds)._names if is_of_test(name, 0.25)
    }


def test_training_samples_that_the_test_has_are_left_out(tmp_path, capsys):
    train, test = make_classes(tmp_path / "train", 20), tmp_path / "test"
    for number, name in enumerate(("red_heart", "blue_star")):
        (test / name).mkdir(parents=True)
        photo(100 + number).save(test / name / "own.png")
    task = open_probe(str(test), ProbeOptions(train=str(train)))
    assert (len(task.train.labels), len(task.test.labels), task.shared) == (20, 2, 0)
    assert task.classes == ["blue star", "green ring", "grey square", "red heart"]
    assert capsys.readouterr().err == ""
    twin = next((train / "red_heart").iterdir())
    (test / "red_heart" / "renamed.png").write_bytes(twin.read_bytes())
    task = open_probe(str(test), ProbeOptions(train=str(train)))
    assert (len(task.train.labels), task.shared) == (19, 1)
    assert f"red_heart/{twin.name}" not in [task.train.source.key(i) for i in range(19)]
    assert "1 training samples are left out: the test has their image" in capsys.readouterr().err
    with pytest.raises(ClipkitError, match="has no class at all"):
        open_probe(str(train), ProbeOptions(train=str(train)))


def test_groups_of_the_test_are_left_out_of_another_source_too(kinds, tmp_path):
    few = tmp_path / "few.tsv"
    lines = kinds.read_text().splitlines()
    few.write_text("\n".join([lines[0], *lines[1:20:2]]) + "\n")  # one drawing each of the first ten things
    task = open_probe(str(few), ProbeOptions(train=str(kinds), **ASKED), columns=beside(kinds))
    assert (len(task.test.labels), len(task.train.labels), task.shared) == (10, 60, 20)
    alone = open_probe(str(few), ProbeOptions(train=str(kinds), label_column="kind"), columns=beside(kinds))
    assert (len(alone.train.labels), alone.shared) == (70, 10), "by the bytes alone"


def test_few_shots_by_seed(kinds, capsys):
    def keys(**asked):
        task = open_probe(str(kinds), ProbeOptions(**ASKED, **asked))
        return task, [task.train.source.key(i) for i in range(len(task.train.labels))]

    task, first = keys(shots=3)
    assert np.bincount(task.train.labels).tolist() == [3, 3, 3, 3]
    assert keys(shots=3)[1] == first == sorted(first)
    assert keys(shots=3, seed=1)[1] != first
    assert len(task.test.labels) == len(keys()[0].test.labels)
    capsys.readouterr()
    assert len(keys(shots=1000)[1]) == len(keys()[1])
    assert "4 classes have fewer than 1000 training samples, such as 'blue heart'" in capsys.readouterr().err


def test_one_shot_on_folders(run, tmp_path, model_dir):
    folder = make_classes(tmp_path / "c", 24, ("cat", "dog"))
    name = next(f"dog/{n}.png" for n in range(100, 200) if is_of_test(f"dog/{n}.png", 0.25))
    (folder / name).write_bytes(b"no image")
    result = run("evaluate", "probe", folder, "--model", model_dir, "--shots", 1, "--format", "json", "-k", 1)
    assert result.status == 1
    assert f"1 could not be used; the first: {name}: not an image" in result.err
    found = json.loads(result.out)
    assert (found["training_images"], found["left_out"]) == (2, 1)
    assert "linear_probe_acc@5" not in found


def test_datasets_in_clip_benchmarks_layout(run, refused, tmp_path, model_dir):
    folder = tmp_path / "wds"
    for split, count in (("train", 9), ("test", 6)):
        members = {}
        for number in range(count):
            key = f"{split}{number:03d}"
            members[f"{key}.png"] = encoded(photo(number + 50 * (split == "test")), "PNG")
            members[f"{key}.cls"] = str(number % 3).encode()
        tar_of(folder / split / "0.tar", members)
    (folder / "classnames.txt").write_text("zebra\nape\ncat\n")
    found = json.loads(run("evaluate", "probe", folder, "--model", model_dir, "--format", "json").out)
    assert (found["classes"], found["training_images"], found["images"]) == (3, 9, 6)
    assert open_probe(str(folder)).classes == ["zebra", "ape", "cat"], "in their own order"
    divided = open_probe(str(folder), ProbeOptions(test_share=0.5), split="train")
    assert len(divided.train.labels) + len(divided.test.labels) == 9
    assert "has no split 'val'" in refused("evaluate", "probe", folder, "--model", model_dir, "--train-split", "val")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    assert "one class per image" in refused("evaluate", "probe", folder, "--model", model_dir)


def test_what_cannot_be_probed_is_told_in_a_line(refused, kinds, model_dir, tmp_path):
    call = ["evaluate", "probe", kinds, "--model", model_dir]
    assert "name the column of its labels: --label-column" in refused(*call)
    assert "says nothing under 'kin' (did you mean 'kind'?)" in refused(*call, "--label-column", "kin")
    assert "says nothing under 'word'" in refused(*call, "--label-column", "kind", "--text-column", "word")
    assert "name the model" in refused("evaluate", "probe", kinds, "--label-column", "kind")
    assert "ends in .json, .md or .html" in refused(*call, "--out", tmp_path / "o.txt")
    assert "divides one source" in refused(*call, "--train", kinds, "--test-share", 0.5)
    one = tmp_path / "one.tsv"
    one.write_text("path\tcaption\tkind\n" + "".join(f"images/{n:03d}a.png\tx\tred\n" for n in range(12)))
    assert "has only 'red'" in refused(
        "evaluate", "probe", one, "--model", model_dir, "--label-column", "kind", "--image-root", kinds.parent
    )
    with pytest.raises(ClipkitError, match="leaves nothing to train on"):
        open_probe(str(kinds), ProbeOptions(label_column="kind", test_share=1.0))


def test_columns_under_names_that_clipkit_uses_itself(kinds, tmp_path):
    """With the captions elsewhere, `caption` is a column as any other; usual names of captions are the captions."""
    captions_elsewhere = ListColumns(caption_column="words")
    text = open_probe(str(kinds), ProbeOptions(label_column="kind", text_column="caption"))
    assert set(text.train.texts) == {("a drawing",)}
    other = open_probe(str(kinds), ProbeOptions(label_column="kind", text_column="caption"), columns=captions_elsewhere)
    assert set(other.train.texts) == {("a drawing",)}
    words = open_probe(str(kinds), ProbeOptions(label_column="kind", text_column="words"), columns=captions_elsewhere)
    assert set(words.train.texts) == {("heart",), ("zebra crossing",), ()}


def test_rows_of_a_source_are_a_source(kinds):
    source = open_source(kinds)
    some = Selected(source, [5, 2, 9])
    assert isinstance(some, Source)
    assert len(some) == 3
    for place, row in enumerate((5, 2, 9)):
        assert some.key(place) == source.key(row)
        assert some.stamp(place) == source.stamp(row)
        assert some.size(place) == source.size(row) == len(some[place].read())
        assert some.without_image(place).key == source.key(row)
    assert some.identity() != Selected(source, [2, 5, 9]).identity()


def test_a_part_of_many_samples_chooses_the_strength(monkeypatch):
    from clipkit.evaluation.probe import fusion

    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    features = np.eye(3)[labels] + rng.normal(size=(200, 3))
    monkeypatch.setattr(fusion, "JUDGES", 50)
    monkeypatch.setattr(fusion, "PER_CLASS", 10)
    head = fit_head(features, labels, 3)
    assert len(head.judged) == 50
    assert head.fitted == 200
    assert np.array_equal(head.linear.weights, fit_linear(features, labels, 3, strength=head.strength).weights)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data ({DATA}) is not here")
def test_an_emojis_group_by_its_drawing_and_its_keywords(run, model_dir):
    """Even by towers that have learned nothing; no emoji is in both parts, as vendors draw the same ones."""
    asked = flags(label_column="group", text_column="keywords", group_column="caption")
    result = run("evaluate", "probe", DATA / "emoji.tsv", "--model", model_dir, *asked, "--format", "json")
    assert result.status == 1, "eight of them have no group"
    found = json.loads(result.out)
    assert found["left_out"] == 8
    assert found["images"] + found["training_images"] + found["shared"] == 5374
    best = max(found["linear_probe_acc@1"], found["text_linear_probe_acc@1"])
    for probe in ("linear_probe", "text_linear_probe"):
        assert found[f"{probe}_acc@1_low"] > found[f"chance_{probe}_acc@1"]
    assert found["early_fusion_acc@1"] > best + 0.02
    for probe in ("early_fusion", "late_mean_fusion", "late_weighted_fusion", "attention_fusion"):
        assert found[f"{probe}_image_only_acc@1"] == found["linear_probe_acc@1"]
        assert found[f"{probe}_text_only_acc@1"] == found["text_linear_probe_acc@1"]
