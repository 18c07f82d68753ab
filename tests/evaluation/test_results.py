"""Results of evaluations: taken from the last time only where nothing changed, and told in the field's forms."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clipkit.core import UnreadSample
from clipkit.data.sources import FolderSource, Sample
from clipkit.data.sources.files import Files
from clipkit.evaluation import Evaluation, Result, SharedWork, TaskOptions, open_task
from clipkit.evaluation import results as room
from clipkit.evaluation.results import as_clip_benchmark
from clipkit.evaluation.tables import markdown, side_by_side
from clipkit.evaluation.tasks import evaluate
from clipkit.models import DualEncoder, LazyModel
from clipkit.storage import Cache
from tests.conftest import make_pictures, tiny_model
from tests.evaluation.test_benchmark_data import CLASSES, PROMPTS, write
from tests.paths import ROOT
from tests.samples import distinct


@pytest.fixture
def towers(monkeypatch):
    """Counts what goes through both towers."""
    calls = {"image": 0, "text": 0}
    for side, name in (("image", "encode_image"), ("text", "encode_text")):
        whole = getattr(DualEncoder, name)

        def counted(self, rows, side=side, whole=whole):
            calls[side] += distinct(rows)
            return whole(self, rows)

        monkeypatch.setattr(DualEncoder, name, counted)
    return calls


@pytest.fixture
def classes(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "classes" / ("cat", "dog", "red_bird")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "classes"


def test_a_second_run_computes_nothing_until_something_changes(run, towers, classes, model_dir, monkeypatch):
    call = ["evaluate", "zeroshot", classes, "--model", model_dir, "--format", "json"]
    first = run(*call)
    assert first.status == 0
    towers.update(image=0, text=0)
    assert run(*call) == first
    assert towers == {"image": 0, "text": 0}
    monkeypatch.setattr(room, "known_or_new", None)  # not how the next ones come about
    other = run(*call, "--templates", "photo")
    assert (towers["image"], towers["text"]) == (0, 3)
    assert json.loads(other.out)["images"] == 12
    Image.new("RGB", (24, 24), "red").save(classes / "cat" / "new.png")
    assert json.loads(run(*call).out)["images"] == 13
    assert towers["image"] == 1


def test_another_version_of_the_code_computes_anew(run, classes, model_dir, monkeypatch):
    call = ["evaluate", "zeroshot", classes, "--model", model_dir, "--format", "json"]
    wanted = json.loads(run(*call).out)
    room.code_version.cache_clear()
    told = {"figures": {"zeroshot_acc@1": 7.0}, "chance": {"zeroshot_acc@1": 0.5}, "counts": {}, "left_out": []}
    monkeypatch.setattr("clipkit.evaluation.tasks.evaluate_zeroshot", lambda *args, **how: Evaluation(**told))
    assert json.loads(run(*call).out) == wanted
    monkeypatch.setattr(room, "code_version", lambda: "another")
    assert json.loads(run(*call).out)["zeroshot_acc@1"] == 7.0


def test_a_changed_byte_anywhere_in_the_package_is_another_version(tmp_path, monkeypatch):
    package = tmp_path / "clipkit"
    shutil.copytree(ROOT / "clipkit", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(room, "__file__", str(package / "evaluation" / "results.py"))

    def version():
        room.code_version.cache_clear()
        return room.code_version()

    try:
        versions = [version()]
        for name in ("metrics/roc.py", "evaluation/probe/data.py", "training/loss/__init__.py", "cli.py"):
            (package / name).write_bytes((package / name).read_bytes() + b"#")
            versions.append(version())
        assert len(set(versions)) == 5
        monkeypatch.undo()
        assert version() == versions[0]
    finally:
        room.code_version.cache_clear()


def test_models_side_by_side(run, captioned, model_dir, tmp_path):
    tiny_model(seed=4).save(tmp_path / "other")
    alone = [
        json.loads(run("evaluate", "retrieval", captioned, "--model", which, "--format", "json").out)
        for which in (model_dir, tmp_path / "other")
    ]
    call = ["evaluate", "retrieval", captioned, "--model", model_dir, "--model", tmp_path / "other"]
    rows = json.loads(run(*call, "--format", "json", "--out", tmp_path / "r.json").out)
    assert len(rows) == 10
    for row in rows:
        assert row[str(model_dir)] == alone[0][row["figure"]]
        assert row[str(tmp_path / "other")] == alone[1][row["figure"]]
        assert row["chance"] == alone[0][f"chance_{row['figure']}"]
    written = json.loads((tmp_path / "r.json").read_text())
    assert [each["task"] for each in written] == ["zeroshot_retrieval"] * 2
    assert written[1]["metrics"]["image_retrieval_recall@5"] == alone[1]["image_retrieval_recall@5"]
    assert run(*call, "--out", tmp_path / "r.md").status == 0
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("| dataset | figure |")
    assert f"{alone[1]['image_retrieval_recall@1']:.4f}" in lines[2]


def test_results_in_the_names_of_clip_benchmark():
    found = Evaluation({"zeroshot_acc@1": 0.5, "zeroshot_mean_per_class_recall": 0.25}, {"zeroshot_acc@1": 0.1}, {}, [])
    told = as_clip_benchmark(Result("a|b", "zeroshot", "run/", "f" * 32, found))
    assert told["metrics"] == {"acc1": 0.5, "mean_per_class_recall": 0.25}
    assert set(told) == {"dataset", "model", "pretrained", "task", "metrics", "language", "clipkit"}
    assert side_by_side([Result("a", "zeroshot", "x", "f", found)])[0] == {
        "dataset": "a",
        "figure": "zeroshot_acc@1",
        "x": 0.5,
        "chance": 0.1,
    }
    assert "| a\\|b | zeroshot_mean_per_class_recall | 0.2500 |  |" in markdown([Result("a|b", "z", "x", "f", found)])


def test_a_dataset_in_clip_benchmarks_layout(run, refused, model_dir, tmp_path):
    members = [{"cls": str(number % 3).encode()} for number in range(7)]
    folder = write(tmp_path / "d", members, classnames=CLASSES, zeroshot_classification_templates=PROMPTS)
    call = ["evaluate", "zeroshot", folder, "--model", model_dir, "--format", "json"]
    found = json.loads(run(*call).out)
    assert (found["images"], found["classes"]) == (7, 3)
    own = json.loads(run(*call, "--templates", "a photo of a {}.|a bad photo of a {}.").out)
    assert own == found  # the same prompts
    assert "is a dataset for zeroshot" in refused("evaluate", "retrieval", folder, "--model", model_dir)
    captions = [{"txt": f"one {n}\nanother {n}".encode()} for n in range(5)]
    folder = write(tmp_path / "r", captions, dataset_type="retrieval")
    found = json.loads(run("evaluate", "retrieval", folder, "--model", model_dir, "--format", "json").out)
    assert (found["images"], found["captions"]) == (5, 10)
    assert "is a dataset for retrieval" in refused("evaluate", "zeroshot", folder, "--model", model_dir)
    assert "no split 'val'" in refused("evaluate", "retrieval", folder, "--model", model_dir, "--split", "val")


def test_names_of_results(refused, model_dir, tmp_path):
    make_pictures(tmp_path, 3)
    call = ["evaluate", "retrieval", tmp_path / "list.tsv", "--model", model_dir]
    assert "ends in .json, .md or .html" in refused(*call, "--out", tmp_path / "r.txt")


class Kept(Cache):
    """Counts the results that are kept."""

    results = 0

    def keep_fact(self, key, value):
        self.results += "figures" in value if isinstance(value, dict) else 0
        super().keep_fact(key, value)


def test_what_could_not_be_read_is_measured_once_it_can_be(classes, model, own_cache, monkeypatch):
    cache, lazy, whole = Kept(own_cache), LazyModel.of(model), Sample.read
    (classes / "cat" / "broken.png").write_bytes(b"no image")

    def measured():
        return evaluate(open_task("zeroshot", str(classes)), SharedWork(lazy, cache=cache))

    def hangs(sample):
        if sample.key == "dog/1.png":
            raise UnreadSample("has not answered for 20 s")
        return whole(sample)

    monkeypatch.setattr(Sample, "read", hangs)
    first = measured()
    assert (first.counts["images"], len(first.left_out), cache.results) == (11, 2, 0)
    assert [line["key"] for line in first.left_out if line.get("unread")] == ["dog/1.png"]
    monkeypatch.setattr(Sample, "read", whole)
    again = measured()
    assert (again.counts["images"], len(again.left_out), cache.results) == (12, 1, 1)
    assert measured() == again  # an image that is none is no reason to measure again
    assert cache.results == 1


def test_a_folder_that_cannot_be_read_is_looked_into_again(classes, model, own_cache, monkeypatch):
    cache, lazy, whole = Kept(own_cache), LazyModel.of(model), FolderSource._walk

    def refused(self, hidden):
        self.problems.append({"key": "shut", "reason": "the folder cannot be read", "unread": True})
        return whole(self, hidden)

    for walk, results, tasks in ((refused, 0, ["zeroshot", "probe"]), (whole, 2, ["zeroshot", "probe"])):
        monkeypatch.setattr(FolderSource, "_walk", walk)
        for task in tasks:
            asked = {"test_share": 0.5} if task == "probe" else {}
            left_out = evaluate(
                open_task(task, str(classes), TaskOptions.of(**asked)), SharedWork(lazy, cache=cache)
            ).left_out
            assert bool(left_out) == (walk is refused)
        assert cache.results == results


def test_what_a_server_does_not_tell_apart_is_measured_again(classes, model, own_cache, monkeypatch):
    cache, lazy, whole = Kept(own_cache), LazyModel.of(model), Files._about
    for about, results in ((lambda self, i: (0, ""), 0), (whole, 1)):
        monkeypatch.setattr(Files, "_about", about)
        task = open_task("zeroshot", str(classes))
        task.sources[0].remote = True
        assert evaluate(task, SharedWork(lazy, cache=cache)).counts["images"] == 12
        assert cache.results == results
