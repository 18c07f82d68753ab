"""What is installed is whole: an installed clipkit goes the whole way where no checkout is to be seen."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from clipkit.cli import FOLDERS, jobs, recipes

ROOT = Path(__file__).parent.parent
PACKAGED = ("clipkit", *FOLDERS)

# The installed command, in one process: torch and its like take seconds to import.
WALK = """
import contextlib, io, json, sys
from clipkit.cli import main

for words in json.load(sys.stdin):
    status, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
print(json.dumps({n: m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "clipkit"}))
"""


def files_below(folder: Path) -> dict[str, int]:
    """Each file with the time of its last change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def pip(*args: object) -> None:
    """pip without a package index, with the setuptools that is here."""
    words = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir", *args]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a clone holds, so that none of its files is of an earlier build, with a sub-package more."""
    folder = tmp_path_factory.mktemp("checkout") / "clipkit"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    for name in (*PACKAGED, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    deep = folder / "clipkit" / "deep" / "deeper"
    deep.mkdir(parents=True)
    (deep.parent / "__init__.py").write_text('"""Not there yet."""\n')
    (deep / "__init__.py").write_text('"""Nor is this."""\n')
    (deep / "__init__.pyi").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(checkout):
    """The wheel that a checkout gives."""
    out = checkout.parent / "direct"
    pip("wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", out, checkout)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_what_the_checkout_holds_and_nothing_else(checkout, wheel):
    every = zipfile.ZipFile(wheel).namelist()
    names = {name for name in every if ".dist-info/" not in name}
    there = {f"{name}/{path}" for name in PACKAGED for path in files_below(checkout / name)}
    expected = {name if name.startswith("clipkit/") else f"clipkit/{name}" for name in there}
    assert (expected - names, names - expected) == (set(), set())
    for path in [*jobs().values(), *recipes().values()]:
        assert f"clipkit/{path.parent.name}/{path.name}" in names
    assert {"clipkit/py.typed", "clipkit/deep/deeper/__init__.py", "clipkit/deep/deeper/__init__.pyi"} < names
    assert sum(name.endswith(".dist-info/licenses/LICENSE") for name in every) == 1


def test_a_source_distribution_gives_the_same_wheel(checkout, wheel, tmp_path):
    code = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_sdist(sys.argv[1])"
    made = subprocess.run([sys.executable, "-P", "-c", code, tmp_path], cwd=checkout, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    pip("wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, unpacked)
    again = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    first = zipfile.ZipFile(wheel)
    assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in first.infolist()}


@pytest.fixture
def installed(wheel, tmp_path):
    """An environment that holds the wheel and, from the one that runs the tests, all but its clipkit."""
    home = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip("--python", python, "install", "--no-index", "--no-deps", "--no-compile", wheel)
    (site,) = home.glob("lib/python*/site-packages")
    # Folders that a .pth names are searched, but a .pth in them, such as that of an editable install, is not read.
    others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return home


def test_an_installed_clipkit_goes_the_whole_way(installed, pictures, recipe, tmp_path):
    (package,) = installed.glob("lib/python*/site-packages/clipkit")
    before = files_below(package)
    for path in [*package.rglob("*"), package]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    away = tmp_path / "away"
    for number, path in enumerate(sorted((pictures.parent / "images").iterdir())[:8]):
        for folder in ("photos", f"animals/{'cat' if number % 2 else 'dog'}"):
            (away / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, away / folder)
    (away / "more").mkdir()
    shutil.copy(pictures.parent / "images" / "020.png", away / "more")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1"}
    here = {"cwd": away, "env": environment, "capture_output": True, "text": True}

    command = subprocess.run([installed / "bin" / "clipkit"], **here)
    assert (command.returncode, command.stderr) == (0, "")
    for verb in (*jobs(), "recipes"):
        assert f"\n  {verb} " in command.stdout

    model, labels, short = ["--model", "run"], ["--labels", "cat,dog"], ["--set", "steps=2"]
    sketch = ["--set", "batch_size=16", "--set", "data.workers=0", "--pictures", "64"]
    walk = [
        (["recipes"], "siglip_b16"),
        (["train", "tiny", "--set", "data.train=shards", "--show-config"], "kind: muon"),
        (["pack", pictures, "--out", "shards", "--workers", "1"], "shards: 48 samples with 48 captions"),
        (["check", "shards"], "images that could be read"),
        (["train", recipe, "--set", "data.train=shards", *short, "--out", "run"], "run: step 2, loss "),
        (["embed", "photos", *model, "--out", "emb"], "emb: 8 images and 0 captions"),
        (["build", "emb", "--out", "index"], "index: 8 image vectors of dimension 32"),
        (["search", "index", "a red heart", "-k", "3"], "│ 3    │"),
        (["classify", "photos", *labels, *model], "│ 007.png │"),
        (["classify", "index", *labels], "│ 007.png │"),
        (["evaluate", "retrieval", pictures, *model], "text_retrieval_recall@10"),
        (["evaluate", "zeroshot", "animals", *model], "8 images, 2 classes"),
        (["explain", "photos/000.png", "a red heart", *model, "--out", "heat.png"], "heat.png: gradient-weighted"),
        (["embed", "more", *model, "--out", "emb2"], "emb2: 1 images"),
        (["update", "index", "emb2"], "index: 1 added, 0 replaced"),
        (["search", "index", "--image", "more/020.png", "-k", "1"], "│ 1    │ 1.0000 │ 020.png"),
        (["demo", *short, *sketch, "--out", "demo"], "Report, with pictures: demo/report/index.html"),
    ]
    words = json.dumps([[str(word) for word in line] for line, _ in walk])
    done = subprocess.run([installed / "bin" / "python", "-P", "-c", WALK], input=words, **here)
    assert done.returncode == 0, done.stderr
    *told, modules = map(json.loads, done.stdout.splitlines())
    for (line, piece), (status, out, err) in zip(walk, told, strict=True):
        assert status == 0, (line, out, err)
        assert piece in out + err, (line, out, err)
    assert (away / "demo/report/index.html").is_file()
    assert set(modules) >= {"clipkit", "clipkit.search", "clipkit.models.loading"}
    assert all(Path(file).is_relative_to(package) for file in modules.values()), modules
    assert files_below(package) == before
