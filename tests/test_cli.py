"""The command: quick help, one-line errors, documented verbs, a README whose every command runs."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from clipkit.cli import jobs, recipes
from tests.conftest import TINY_VIT, make_pictures

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "faiss", "open_clip", "webdataset", "torchvision", "accelerate", "pyarrow", "numpy"}


@pytest.mark.parametrize("call", [["--help"], [], ["recipes"], *[[verb, "--help"] for verb in jobs()]])
def test_help_imports_nothing_heavy(call):
    code = (
        "import sys\nfrom clipkit.cli import main\n"
        f"try:\n    main({call!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert not loaded & HEAVY


def test_module_and_command_are_one():
    module = subprocess.run([sys.executable, "-m", "clipkit", "--help"], capture_output=True, text=True, check=True)
    command = subprocess.run(
        [Path(sys.executable).parent / "clipkit", "--help"], capture_output=True, text=True, check=True
    )
    assert module.stdout == command.stdout
    for verb in jobs():
        assert re.search(rf"^  {verb} ", module.stdout, re.MULTILINE)


def test_every_verb_is_documented():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb, path in jobs().items():
        assert f"clipkit {verb}" in readme, verb
        done = subprocess.run(
            [sys.executable, "-m", "clipkit", verb, "--help"], capture_output=True, text=True, check=True
        )
        options = re.findall(r"^  (?:-\w, )?(--[\w-]+|-\w)", done.stdout, re.MULTILINE)
        assert "--debug" in options
        for line in re.findall(r"^  (?:-\w, )?--[\w-]+.*(?:\n {10,}.*)*", done.stdout, re.MULTILINE):
            assert re.search(r"\s{2,}\S", line.lstrip()), f"{path.name}: no help for {line}"


def readme_commands() -> list[str]:
    """The lines of the README's shell blocks, without those that make sets up."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_readme_command_runs(run, tmp_path, monkeypatch):
    """In order, in one folder, on data named as there. Training is cut to two steps, mostly of a small model."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path, 30)
    (tmp_path / "list.tsv").rename(tmp_path / "captions.tsv")
    (tmp_path / "images").rename(tmp_path / "photos")
    text = (tmp_path / "captions.tsv").read_text().replace("images/", "photos/")
    (tmp_path / "captions.tsv").write_text(text)
    (tmp_path / "captions.tsv").with_name("heldout.tsv").write_text(text)
    header, *rows = text.splitlines()
    kinds = [f"{row}\t{'ab'[number % 2]}" for number, row in enumerate(rows)]
    (tmp_path / "labelled.tsv").write_text("\n".join([f"{header}\tkind", *kinds]) + "\n")
    for kind, name in enumerate(("cat", "sea_lion")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for number in range(kind, 12, 2):
            (tmp_path / "animals" / name / f"{number}.png").write_bytes(
                (tmp_path / "photos" / f"{number:03d}.png").read_bytes()
            )
    (tmp_path / "suite.yaml").write_text(
        "models: [run/]\ndatasets: [{task: retrieval, source: heldout.tsv}, {task: zeroshot, source: animals/}]\n"
    )
    (tmp_path / "photos" / "heart.jpg").write_bytes((tmp_path / "photos" / "000.png").read_bytes())
    (tmp_path / "labels.yaml").write_text("labels: {cat: {aliases: [kitten]}, dog: }\nbackground: [a blank page]\n")
    short = ["--set", "steps=2", "--set", "batch_size=8", "--set", "data.workers=0"]
    small = [*short, "--set", f"model={json.dumps(TINY_VIT)}"]
    ran = []
    for line in readme_commands():
        words = shlex.split(line)
        if words[0] in ("make", "git", "cd") or words[:2] == ["clipkit", "demo"]:
            continue  # what continuous integration and the person run, and what tests/test_demo.py runs
        assert words[0] == "clipkit", line
        # run/ is of the recipe as it is; no other run is used for more than figures.
        more = {"train": short if "run/" in words else small}.get(words[1], [])
        result = run(*words[1:], *more)
        assert result.status == 0, (line, result)
        ran.append(words[1])
    assert set(ran) >= {*jobs(), "recipes"} - {"demo"}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(compile(block, "README.md", "exec"), {})
    assert "image_path" in shown.getvalue()
    assert "'status': 'ok'" in shown.getvalue()


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in readme_commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


def test_recipes_are_listed_shown_and_copied(run, refused, tmp_path):
    listed = run("recipes").out
    assert all(name in listed for name in recipes())
    assert run("recipes", "tiny").out == recipes()["tiny"].read_text()
    assert run("recipes", "tiny", tmp_path / "own.yaml").status == 0
    assert (tmp_path / "own.yaml").read_text() == recipes()["tiny"].read_text()
    assert "exists" in refused("recipes", "tiny", tmp_path / "own.yaml")
    assert "did you mean 'tiny'" in refused("recipes", "tinny")


def test_settings_are_shown_without_running(run, tmp_path):
    shown = run("train", "tiny", "--set", "optim.lr=5e-4", "--out", tmp_path / "r", "--show-config")
    assert "lr: 0.0005" in shown.out
    assert not (tmp_path / "r").exists()


def test_a_traceback_comes_with_debug_only(run, refused, tmp_path):
    call = ["embed", tmp_path / "none", "--model", "x", "--out", tmp_path / "o"]
    refused(*call)
    result = run(*call, "--debug")
    assert result.status == 2
    assert "Traceback" in result.err


def test_a_defect_of_ours_is_one_line_and_status_2(refused, monkeypatch, pictures, tmp_path):
    import clipkit.data

    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(clipkit.data, "pack", broken)
    line = refused("pack", pictures, "--out", tmp_path / "o")
    assert line == "clipkit pack: error: RuntimeError: two lines (--debug shows the traceback)\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])  # the reader is missed at the end, or at the first row
def test_a_reader_that_leaves_early_is_no_error(model_dir, pictures, unbuffered):
    call = [sys.executable, "-m", "clipkit", "classify", pictures, "--labels", "a,b", "--model", model_dir]
    theirs, ours = os.pipe()
    os.close(theirs)
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    told = {"stdout": ours, "stderr": subprocess.PIPE, "text": True, "env": environ}
    done = subprocess.run([*call, "--format", "jsonl"], **told, check=False)
    os.close(ours)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.fixture
def bad(tmp_path):
    """A place full of mistakes."""
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nocaption.tsv").write_text("path\twords\ngood.png\ta cat\n")
    (tmp_path / "missing.tsv").write_text("path\tcaption\nnone.png\ta cat\n")
    (tmp_path / "onemissing.tsv").write_text("path\tcaption\nnone.png\ta cat\ngood.png\ta dog\ntext.jpg\ta text\n")
    (tmp_path / "onlytext.tsv").write_text("path\tcaption\ntext.jpg\ta text\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    return tmp_path


def test_a_list_without_the_caption_column_names_the_columns_it_has(refused, bad, model_dir):
    line = refused("pack", bad / "nocaption.tsv", "--out", bad / "o")
    assert "no caption column; its columns are path, words; name it with --caption-column" in line
    assert "no caption column" in refused("evaluate", "retrieval", bad / "nocaption.tsv", "--model", model_dir)
    assert not (bad / "o").exists()


def test_an_image_path_that_does_not_exist(run, refused, bad, model_dir):
    assert "none.png: cannot be read: No such file" in refused("pack", bad / "missing.tsv", "--out", bad / "a")
    assert "none.png: cannot be read" in refused("embed", bad / "missing.tsv", "--model", model_dir, "--out", bad / "b")
    assert "none.png" in refused("evaluate", "retrieval", bad / "missing.tsv", "--model", model_dir)
    result = run("pack", bad / "onemissing.tsv", "--out", bad / "c")
    assert result.status == 1
    assert "2 left out" in result.err
    ledger = [json.loads(line) for line in (bad / "c" / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in ledger] == ["none.png", "text.jpg"]


def test_a_text_file_named_jpg(refused, bad, model_dir):
    assert "text.jpg: not an image" in refused("pack", bad / "onlytext.tsv", "--out", bad / "o")
    assert "text.jpg: not an image" in refused("embed", bad / "onlytext.tsv", "--model", model_dir, "--out", bad / "p")


def test_an_empty_folder(refused, bad, model_dir):
    for call in (["pack", bad / "empty"], ["embed", bad / "empty", "--model", model_dir]):
        assert "no images in" in refused(*call, "--out", bad / "o")
    assert "no images in" in refused("classify", bad / "empty", "--labels", "a", "--model", model_dir)
    assert "no shards" in refused("train", "tiny", "--set", f"data.train={bad / 'empty'}", "--out", bad / "o")


def test_unknown_recipe_key_verb_and_option(refused, bad):
    out = ["--out", bad / "o"]
    assert "no recipe 'tinny' (did you mean 'tiny'?)" in refused("train", "tinny", *out)
    assert "unknown key optim.lrr (did you mean 'optim.lr'?)" in refused("train", "tiny", "--set", "optim.lrr=1", *out)
    assert "names no training data; add --set data.train" in refused("train", "tiny", *out)
    assert "no verb 'serach' (did you mean 'search'?)" in refused("serach")
    assert "No such option" in refused("search", "x", "y", "--fromat", "json")
    assert "Missing" in refused("pack", "x")


def test_an_output_folder_that_holds_something_else(run, refused, bad, shards, embeddings, index, model_dir, recipe):
    good = ["embed", bad / "good.png", "--model", model_dir]
    assert "is no source" in refused(*good, "--out", bad / "o")
    folder = ["embed", bad, "--model", model_dir]
    assert "already holds finished shards; name another output folder, or add --overwrite" in refused(
        *folder, "--out", shards
    )
    assert "already holds finished embeddings" in refused("pack", bad / "onemissing.tsv", "--out", embeddings)
    assert "which is read to make it" in refused("build", embeddings, "--out", embeddings, "--overwrite")
    assert "holds no clipkit artifact" in refused(*folder, "--out", bad / "thesis")
    assert "holds no clipkit artifact" in refused(*folder, "--out", bad / "thesis", "--overwrite")
    train = ["train", recipe, "--set", f"data.train={shards}", "--out"]
    assert "holds index; name another" in refused(*train, index)
    assert "holds index; name another" in refused(*train, index, "--overwrite")
    assert "holds no run" in refused(*train, bad / "thesis", "--resume")
    assert (bad / "thesis" / "chapter.txt").read_text() == "words"
    assert "is a file" in refused(*folder, "--out", bad / "text.jpg")


def test_the_wrong_artifact_for_a_verb(refused, shards, embeddings, tmp_path):
    assert "holds shards, but embeddings is needed" in refused("build", shards, "--out", tmp_path / "o")
    assert "holds embeddings, but index is needed" in refused("search", embeddings, "x")
    line = refused("classify", embeddings, "--labels", "a", "--model", shards)
    assert "is no model: it holds shards" in line
    assert "no device 'warp'" in refused("classify", embeddings, "--labels", "a", "--model", "x", "--device", "warp")
