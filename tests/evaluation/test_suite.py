"""Suites: many data and models, a failure among them, results as JSON, Markdown and a page of its own."""

import json
import os
import subprocess
import sys
import threading

import pytest
import yaml

from clipkit.core import ClipkitError
from clipkit.evaluation import SharedWork, load_suite, run_suite, tasks
from clipkit.evaluation.results import as_clip_benchmark
from clipkit.models import LazyModel
from tests.conftest import make_pictures, tiny_model
from tests.core.test_html_report import assert_refers_to_nothing_outside
from tests.evaluation.test_benchmark_data import CLASSES, npy, write
from tests.evaluation.test_evaluation import on_ranks
from tests.samples import photo


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data for each task, small."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(10):
        (folder / "classes" / ("cat", "dog", "sea_lion")[number % 3]).mkdir(parents=True, exist_ok=True)
        photo(number, 40, 32).save(folder / "classes" / ("cat", "dog", "sea_lion")[number % 3] / f"{number}.png")
    make_pictures(folder, 9, captions=2)
    rows = [f"images/{n:03d}.png\ta red heart {n}\ta blue star {n}" for n in range(9)]
    (folder / "choice.tsv").write_text("\n".join(["image\tcaption\tnegative", *rows]) + "\n")
    members = [{"npy": npy([n % 2, n % 3 == 0, 1])} for n in range(7)]
    write(folder / "several", members, classnames=CLASSES, dataset_type="multilabel")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "m"
    tiny_model(seed=4).save(folder)
    return folder


def suite_of(path, data, models, *more):
    datasets = [
        {"task": "retrieval", "source": str(data / "list.tsv"), "name": "pictures", "ks": [1, 5]},
        {"task": "zeroshot", "source": str(data / "classes"), "templates": "photo", "ks": [1]},
        {"task": "choice", "source": str(data / "choice.tsv")},
        {"task": "zeroshot", "source": str(data / "several")},
        *more,
    ]
    path.write_text(yaml.safe_dump({"models": [str(model) for model in models], "datasets": datasets}))
    return path


def test_a_suite_says_what_each_evaluation_says_and_goes_on_where_one_fails(run, data, other, model_dir, tmp_path):
    gone = {"task": "retrieval", "source": str(tmp_path / "gone.tsv"), "name": "gone"}
    path = suite_of(tmp_path / "s.yaml", data, [model_dir, other], gone)
    result = run("evaluate", "suite", path, "--format", "json", "--out", tmp_path / "r.json")
    assert result.status == 1
    assert "not measured: retrieval on gone: no such source" in result.err
    rows = {(row["dataset"], row["figure"]): row for row in json.loads(result.out)}
    calls = {
        "pictures": ["retrieval", data / "list.tsv", "-k", 1, "-k", 5],
        str(data / "classes"): ["zeroshot", data / "classes", "-k", 1, "--templates", "photo"],
        str(data / "choice.tsv"): ["choice", data / "choice.tsv"],
        str(data / "several"): ["zeroshot", data / "several"],
    }
    for name, call in calls.items():
        alone = json.loads(run("evaluate", *call, "--model", other, "--format", "json").out)
        own = {figure: row[str(other)] for (dataset, figure), row in rows.items() if dataset == name}
        assert own
        assert own == {figure: alone[figure] for figure in own}
    written = json.loads((tmp_path / "r.json").read_text())
    assert [each["dataset"] for each in written] == [name for name in calls for _ in range(2)]
    assert {each["task"] for each in written} == {
        "zeroshot_retrieval",
        "zeroshot_classification",
        "image_caption_selection",
    }
    # Beside itself nothing is worse; the file holds two models, so one is named.
    one = [each for each in written if each["model"] == str(other)]
    (tmp_path / "base.json").write_text(json.dumps(one))
    alone = run("evaluate", "suite", path, "--model", other, "--baseline", tmp_path / "base.json", "--format", "json")
    assert alone.status == 1  # what fails still fails
    assert "regression" not in alone.err
    assert all(row[f"{other}_baseline_difference"] == 0 for row in json.loads(alone.out))
    assert run("evaluate", "suite", path, "--baseline", tmp_path / "r.json").status == 2


def test_pages_hold_all_they_show(run, data, other, model_dir, tmp_path):
    path = suite_of(tmp_path / "s.yaml", data, [model_dir, other])
    call = ["evaluate", "suite", path, "--out"]
    assert run(*call, tmp_path / "r.html").status == 0
    page = (tmp_path / "r.html").read_text()
    assert_refers_to_nothing_outside(page)
    assert page.count("data:image/png;base64,") == 5  # four tasks, and median ranks apart
    for text in ("pictures: retrieval", "choice_acc", "takes for what most often", "sea lion", "chance"):
        assert text in page, text
    assert run(*call, tmp_path / "r.md").status == 0
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert lines[0].startswith("| dataset | figure |")
    assert len({line.count("|") for line in lines}) == 1
    assert run("evaluate", "choice", data / "choice.tsv", "--model", other, "--out", tmp_path / "c.html").status == 0
    assert_refers_to_nothing_outside((tmp_path / "c.html").read_text())


def test_interrupted_it_goes_on(run, data, model_dir, tmp_path, monkeypatch):
    path = suite_of(tmp_path / "s.yaml", data, [model_dir])
    done, whole = [], tasks.evaluate_choice

    def stop(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "evaluate_choice", stop)
    assert run("evaluate", "suite", path).status == 130
    monkeypatch.setattr(tasks, "evaluate_choice", whole)
    for name in ("evaluate_retrieval", "evaluate_zeroshot", "evaluate_choice"):
        work = getattr(tasks, name)
        monkeypatch.setattr(tasks, name, lambda *args, _n=name, _w=work, **how: done.append(_n) or _w(*args, **how))
    assert run("evaluate", "suite", path).status == 0
    assert done == ["evaluate_choice", "evaluate_zeroshot"]


def test_what_is_wrong_with_a_suite(run, refused, data, model_dir, tmp_path):
    def said(text, *more):
        (tmp_path / "s.yaml").write_text(text)
        return refused("evaluate", "suite", tmp_path / "s.yaml", *more)

    good = f"datasets: [{{task: choice, source: {data / 'choice.tsv'}}}]\n"
    assert "unknown key modles (did you mean 'models'?)" in said(f"modles: [a]\n{good}")
    assert "unknown key datasets.0.sorce (did you mean" in said("datasets: [{task: choice, sorce: x}]")
    assert "did you mean 'retrieval'" in said("datasets: [{task: retreival, source: x}]")
    assert "a list has a length of at least 1" in said("datasets: [{task: retrieval, source: x, ks: [0]}]")
    assert "names no models; add models" in said(good)
    packed = tmp_path / "packed"
    assert run("pack", data / "list.tsv", "--out", packed).status == 0
    assert "names no models" in said(f"datasets: [{{task: retrieval, source: {packed}}}]")  # it has a manifest, too
    assert "is no suite" in said("[1]")
    assert "cannot read the suite" in refused("evaluate", "suite", tmp_path / "none.yaml")
    assert "a suite says so for each of its datasets" in said(good, "--model", model_dir, "-k", 1)
    twice = f"{good}  - {{task: choice, source: {data / 'choice.tsv'}}}\n"
    twice = twice.replace("datasets: [", "datasets:\n  - ").replace("}]", "}")
    assert "give them a name each" in said(twice, "--model", model_dir)
    (tmp_path / "s.yaml").write_text(f"models: [{model_dir}]\ndatasets: [{{task: choice, source: nothing.tsv}}]")
    failed = run("evaluate", "suite", tmp_path / "s.yaml")
    assert failed.status == 2
    assert "nothing of the suite could be measured; the first: choice on nothing.tsv: " in failed.err


def told(results):
    return json.dumps([as_clip_benchmark(result) for result in results])


def test_ranks_and_threads_change_no_byte(data, model, model_dir, tmp_path):
    """As the processes below, with ranks that are threads of one, in a moment."""
    suite = load_suite(suite_of(tmp_path / "s.yaml", data, [model_dir]))
    wanted = None
    for threads in (0, 1, 2):
        for world_size in (1, 2, 3):

            def call(threads=threads, **among):
                how = {"batch_size": 4, "threads": threads, **among}
                lazy = LazyModel.of(model)

                def measure(task, _):
                    return "m", "f", tasks.evaluate(task, SharedWork(lazy, **how))

                return told(run_suite(suite, measure)[0])

            found = set(on_ranks(world_size, call))
            wanted = wanted or found
            assert found == wanted
            assert len(wanted) == 1


HERE = threading.local()


def on_two(suite, model_of):
    """Results and failures on each of two ranks, as JSON and lines, or the error; each with a model of its own."""

    def call(rank, **among):
        HERE.rank = rank
        how = {"batch_size": 4, "rank": rank, **among}

        def measure(task, model):
            return tasks.evaluate_model(task, str(model_of(rank)), SharedWork(None, **how))

        results, failures = run_suite(suite, measure, gather=among["gather"])
        return told(results), failures

    return on_ranks(2, call)


def test_ranks_keep_step_where_one_cannot_open_the_data(data, model_dir, tmp_path, monkeypatch):
    suite = load_suite(suite_of(tmp_path / "s.yaml", data, [model_dir]))
    whole = tasks.open_task

    def opened(name, *args, **asked):
        if name == "zeroshot" and HERE.rank == 1:
            raise ClipkitError("no such source here")
        return whole(name, *args, **asked)

    monkeypatch.setattr("clipkit.evaluation.suite.open_task", opened)
    (results, failures), second = on_two(suite, lambda rank: model_dir)
    assert second == (results, failures)
    assert [each["task"] for each in json.loads(results)] == ["zeroshot_retrieval", "image_caption_selection"]
    assert len(failures) == 2
    assert all(line.endswith("no such source here") for line in failures)


@pytest.mark.parametrize("reason", ["gone", "different models under the name"])
def test_ranks_with_different_models_measure_nothing(data, other, model_dir, tmp_path, reason):
    suite = load_suite(suite_of(tmp_path / "s.yaml", data, [model_dir]))
    bad = other if reason.startswith("different") else tmp_path / "gone"
    found = on_two(suite, lambda rank: bad if rank else model_dir)
    assert all(isinstance(error, ClipkitError) for error in found)
    assert all("nothing of the suite could be measured; the first: " in str(error) for error in found)
    assert all(reason in str(error) for error in found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_processes_and_threads_change_no_byte(data, model_dir, tmp_path):
    """All tasks in one suite: 1 and 2 processes, with 0, 1 and 2 threads that decode, each from nothing."""
    path = suite_of(tmp_path / "s.yaml", data, [model_dir])
    about = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    written = {}
    for threads in ("0", "1", "2"):
        for processes, launcher in ((1, ["-m"]), (2, torchrun)):
            out = tmp_path / f"{processes}-{threads}.json"
            call = ["clipkit", "evaluate", "suite", str(path), "--batch-size", "4", "--threads", threads, "--no-cache"]
            done = subprocess.run(
                [sys.executable, *launcher, *call, "--out", str(out)],
                capture_output=True,
                text=True,
                env=about,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            written[processes, threads] = (out.read_bytes(), done.stdout)
    assert len(set(written.values())) == 1
    assert len(json.loads(written[1, "0"][0])) == 4
