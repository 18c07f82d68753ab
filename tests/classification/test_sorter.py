"""Classified images in folders by their labels, and back, by the command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.classification import Rule
from clipkit.classification.classified import Classified
from clipkit.classification.decisions import decide
from clipkit.classification.images import Images
from clipkit.classification.labels import as_label_set
from clipkit.classification.sort import Sorter
from clipkit.classification.sort.journal import Journal
from clipkit.classification.sort.plan import Step
from clipkit.classification.sort.transfer import carry_out, undo
from clipkit.data.sources import open_source
from tests.conftest import make_pictures
from tests.sorts import tree

LABELS = "cat,dog,a/b,Cat"


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for number in range(12):
        path = folder / ("", "x", "x/y")[number % 3] / f"{number // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8) // (1 + number)).save(path)
    (folder / "bad.png").write_text("no image")
    (folder / "1.txt").write_text("a caption")
    return folder


def rows_of(result):
    return [json.loads(line) for line in result.out.splitlines()]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*") if not path.name.startswith("."))


def call(source, model, *more):
    return ["classify", source, "--labels", LABELS, "--model", model, "--format", "jsonl", *more]


@pytest.mark.parametrize("how", ["copy", "link", "move"])
def test_a_dry_run_says_what_is_done_then(run, photos, model_dir, tmp_path, how):
    out, before = tmp_path / "out", tree(tmp_path)
    sort = call(photos, model_dir, "--sort-into", out, "--how", how)
    dry = run(*sort)
    assert tree(tmp_path) == before
    assert dry.status == 1  # of the one that is unreadable
    assert f"would {how} 12 files" in dry.err
    assert "nothing was touched; --yes does it" in dry.err
    assert len([line for line in dry.err.splitlines() if " -> " in line]) == 10
    done = run(*sort, "--yes")
    assert rows_of(done) == rows_of(dry)
    placed = {row["to"]: row for row in rows_of(done) if row["to"]}
    assert sorted(placed) == files(out)
    for name, row in placed.items():
        assert name.partition("/")[0] == {"cat": "cat", "dog": "dog", "a/b": "a_b", "Cat": "Cat-2"}[row["label"]]
        if how != "link":
            assert ("file", (out / name).read_bytes()) == before[f"photos/{row['path']}"][:2]
        else:
            assert os.path.realpath(out / name) == str(photos / row["path"])
    (unreadable,) = [row for row in rows_of(done) if row["to"] is None]
    assert (unreadable["path"], unreadable["status"]) == ("bad.png", "unreadable")
    assert (photos / "bad.png").is_file()
    assert (photos / "1.txt").is_file()
    again = run(*sort, "--yes")
    assert again.status == 1
    assert "12 are there from before" in again.err
    back = run("classify", "--undo", out)
    assert (back.status, back.out) == (0, "")
    assert "took back 12 files" in back.err
    assert tree(tmp_path) == before


def test_the_unsure_and_the_background_have_folders_of_their_own(run, photos, model_dir, tmp_path):
    words = "a,b,c,d,e,f"
    likely = rows_of(run("classify", photos, "--labels", words, "--model", model_dir, "--format", "jsonl"))[0]["label"]
    ask = [
        "classify",
        photos,
        "--labels",
        ",".join(word for word in words.split(",") if word != likely),
        "--model",
        model_dir,
        "--format",
        "jsonl",
    ]
    rows = rows_of(run(*ask, "--background", likely, "--sort-into", tmp_path / "out", "--yes"))
    assert "background" in {row["status"] for row in rows}
    for row in rows:
        if row["label"]:
            assert row["to"].partition("/")[0] == ("background" if row["status"] == "background" else row["label"])
    unsure = rows_of(run(*call(photos, model_dir, "--threshold", 1, "--sort-into", tmp_path / "all", "--yes")))
    assert {row["to"].partition("/")[0] for row in unsure if row["label"]} == {"unsure"}


def test_several_labels_put_it_into_several_folders(run, refused, photos, model_dir, tmp_path):
    before, out = tree(photos), tmp_path / "out"
    several = ["--multi-label", "--background", "nothing", "--threshold", "0.1", "--sort-into", out, "--yes"]
    assert "cannot be moved into several folders" in refused(*call(photos, model_dir, *several, "--how", "move"))
    rows = rows_of(run(*call(photos, model_dir, *several)))
    named = {"cat": "cat", "dog": "dog", "a/b": "a_b", "Cat": "Cat-2"}
    for row in rows:
        wanted = [named[label] for label in row["labels"]]
        if row["status"] == "background":
            wanted = ["background"]
        assert [name.partition("/")[0] for name in row["to"]] == wanted
    assert max(len(row["to"]) for row in rows) > 1
    assert sorted(name for row in rows for name in row["to"]) == files(out)
    run("classify", "--undo", out)
    assert tree(photos) == before


def test_into_the_source_itself_and_below_it(run, photos, model_dir):
    before = tree(photos)
    for out, how in ((photos, "move"), (photos / "sorted", "copy"), (photos / "sorted", "link")):
        sort = call(photos, model_dir, "--sort-into", out, "--how", how, "--yes")
        first = run(*sort)
        assert len([row for row in rows_of(first) if row["to"]]) == 12
        there = tree(photos)
        second = rows_of(run(*sort))  # what was sorted is no part of the source
        assert len(second) == (1 if how == "move" else 13)
        assert tree(photos) == there
        assert run("classify", "--undo", out).status == 0
        assert tree(photos) == before


def test_lists_and_vectors_are_sorted_where_there_are_files(
    run, refused, embeddings, pictures, shards, model_dir, tmp_path
):
    listed = make_pictures(tmp_path / "set", 6)
    before, out = tree(tmp_path / "set"), tmp_path / "out"
    sort = ["--sort-into", out, "--yes", "--how", "move"]
    assert len([row for row in rows_of(run(*call(listed, model_dir, *sort))) if row["to"]]) == 6
    again = run(*call(listed, model_dir, *sort))
    assert (again.status, again.out) == (0, "")
    assert "nothing was left to do" in again.err
    assert run("classify", "--undo", out).status == 0
    assert tree(tmp_path / "set") == before
    vectors = ["classify", embeddings, "--labels", LABELS, "--sort-into", out, "--yes"]
    assert "say where the files are: --image-root DIR" in refused(*vectors)
    assert "is a URL" in refused(*vectors, "--image-root", "https://x/y")
    assert run(*vectors, "--image-root", pictures.parent, "--how", "link").status == 0
    assert len(files(out)) == 48
    assert run("classify", "--undo", out).status == 0
    assert "are in shards, and only files on the disk can be sorted" in refused(*call(shards, model_dir, *sort))
    (tmp_path / "urls.csv").write_text("path\nmemory://x/a.png\n")
    assert "at URLs (memory://x/a.png)" in refused(*call(tmp_path / "urls.csv", model_dir, *sort))
    assert not out.exists()


def test_wrong_ways_to_ask(refused, photos, model_dir, tmp_path):
    sort = call(photos, model_dir, "--sort-into")
    assert "make it, and out is made in it" in refused(*sort, tmp_path / "none" / "out")
    assert "is a file; name a folder" in refused(*sort, photos / "bad.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unsure").write_text("")
    assert "unsure is a file" in refused(*sort, tmp_path / "out")
    assert "--how and --yes are of --sort-into" in refused(*call(photos, model_dir, "--yes"))
    assert "--undo DIR takes back" in refused(*call(photos, model_dir, "--undo", tmp_path))
    assert "holds no sort that could be undone" in refused("classify", "--undo", photos)
    assert "no such folder" in refused("classify", "--undo", tmp_path / "none")
    assert "name the images to classify" in refused("classify")
    assert "name the labels: --labels" in refused("classify", photos)
    assert "name the model" in refused("classify", photos, "--labels", "a,b")


def test_what_cannot_be_taken_back_is_named(run, photos, model_dir, tmp_path):
    out = tmp_path / "out"
    rows = rows_of(run(*call(photos, model_dir, "--sort-into", out, "--yes", "--how", "move")))
    one = next(row for row in rows if row["to"])
    (out / one["to"]).write_text("changed")
    for _ in range(2):
        result = run("classify", "--undo", out, "--format", "jsonl")
        assert result.status == 1
        (left,) = rows_of(result)
        assert (left["path"], left["target"]) == (str(photos / one["path"]), one["to"])
        assert "changed since" in left["reason"]
        assert "1 files were not touched" in result.err
    assert files(out) == [one["to"]]


@pytest.mark.parametrize("fmt", ["jsonl", "csv", "human"])
def test_names_that_are_not_unicode_are_told_all_the_same(run, model_dir, tmp_path, fmt):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (9, 9)).save(photos / "a.png")
    (photos / "a.png").rename(photos / os.fsdecode(b"\xff.png"))
    before = tree(photos)
    result = run(*call(photos, model_dir, "--sort-into", out, "--yes", "--how", "move"), "--format", fmt)
    assert result.status == 0
    assert "/\\udcff.png" in (json.loads(result.out)["to"] if fmt == "jsonl" else result.out)
    (name,) = files(out)
    (out / name).write_text("changed")
    left = run("classify", "--undo", out, "--format", fmt)
    assert left.status == 1
    assert "\\udcff.png" in left.out
    (out / name).unlink()
    assert tree(photos) != before


def test_that_nothing_is_left_is_said_of_nothing_else(run, refused, photos, model_dir, tmp_path):
    """What was moved out of a source is no reason to take a mistyped pattern, or a source that is away, for one that is
    done."""
    (photos / "bad.png").unlink()
    (photos / "1.txt").unlink()
    sort = call(photos, model_dir, "--sort-into", tmp_path / "out", "--yes", "--how", "move")
    run(*sort)
    for more in ((), ("--include", "*.png")):
        again = run(*sort, *more)
        assert (again.status, again.out) == (0, "")
        assert "nothing was left to do" in again.err
    assert "no file in" in refused(*sort, "--include", "*.pngg")
    photos.rename(tmp_path / "away")
    assert "nothing was left" not in refused(*sort)


def test_what_was_taken_back_meanwhile_is_not_said_to_be_moved(photos, tmp_path):
    out, path = tmp_path / "out", photos / "0.png"
    with Journal.open(out, create=True) as journal:
        carry_out(journal, [Step(str(path), "cat/0.png")], "move")
    sorter = Sorter(out, "move", yes=True)
    assert sorter.before == 1
    undo(out)
    images = Images(["0.png"], lambda *_: np.zeros((1, 2)), rows=[0], source=open_source(photos))
    decisions = decide(np.array([[0.1, 0.9]]), None, Rule())
    (found,) = sorter.sort(Classified(images, as_label_set(["cat", "dog"]), decisions))
    assert found.to == ["dog/0.png"]
    assert files(out) == ["dog/0.png"]


def test_undo_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom clipkit.cli import main\n"
        f"try:\n    main(['classify', '--undo', {str(tmp_path)!r}])\n"
        "except SystemExit as stop:\n    assert stop.code == 2\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "faiss", "open_clip", "webdataset"}


def there(folder):
    return sum(len(names) for above, _, names in os.walk(folder) if Path(above) != folder)


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_and_is_undone(run, model_dir, tmp_path, own_cache):
    """Real processes, killed by the clock while they sort and while they undo."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    rng = np.random.default_rng(0)
    photos.mkdir()
    for number in range(300):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(photos / f"{number}.png")
    before, chance = tree(tmp_path), random.Random(0)
    assert run(*call(photos, model_dir)).status == 0  # embeds: from here on a run takes a second
    clipkit = [sys.executable, "-m", "clipkit"]
    kills = 0
    for turn in range(6):
        sort = call(photos, model_dir, "--sort-into", out, "--yes", "--how", ("move", "copy", "link")[turn % 3])
        for command in (sort, ["classify", "--undo", out]):
            process = subprocess.Popen(
                [*clipkit, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            undoing, limit = command[1] == "--undo", time.monotonic() + 60
            while process.poll() is None and time.monotonic() < limit:
                count = there(out)
                if 0 < count < 300 or (undoing and count == 0):
                    time.sleep(chance.random() * 0.1)
                    process.send_signal(signal.SIGKILL)
                    break
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            if not undoing and turn % 2:
                assert run(*sort).status == 0  # goes on
                assert len(files(out)) == 300
        if out.exists():
            assert run("classify", "--undo", out).status == 0
        assert tree(tmp_path) == before
    assert kills > 4
