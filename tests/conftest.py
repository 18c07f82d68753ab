"""Pictures, models and runs that the tests make for themselves; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network must fail at once
# Threads of one pool wait for each other by spinning: beside another worker one thread each is the quickest. It is
# said before torch, numpy and FAISS are loaded, and to every process that a test starts. Who says OMP_NUM_THREADS has
# so many: results must hold for any number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked while testing and cost nothing otherwise.
HOOKED = [
    "clipkit.training.loss",
    "clipkit.metrics.retrieval",
    "clipkit.metrics.clip_benchmark",
    "clipkit.metrics.ranking",
    "clipkit.metrics.average_precision",
    "clipkit.metrics.choice",
    "clipkit.metrics.intervals",
    "clipkit.metrics.calibration",
    "clipkit.classification.logistic",
    "clipkit.classification.few_shot",
    "clipkit.evaluation.probe.fusion",
    "clipkit.evaluation.probe.attention",
    "clipkit.classification.prompts",
    "clipkit.classification.decisions",
    "clipkit.models.explain.relevance",
    "clipkit.models.dual_encoder",
    "clipkit.metrics.accuracy",
    "clipkit.metrics.selective",
    "clipkit.metrics.roc",
    "clipkit.models.probability",
    "clipkit.classification.prompt_ablation",
]
hook = install_import_hook(HOOKED, "beartype.beartype")

import csv
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pytest
import torch

from clipkit.cli import main
from clipkit.data import COLOURS, SHAPES, caption, draw, random_scene
from clipkit.models import DualEncoder, ModelConfig, create_model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

TINY_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 1},
}


class Result(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for each test, so that none finds what another one kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLIPKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the clipkit command in this process."""

    def call(*args: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        return Result(int(stop.value.code or 0), out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that must fail with status 2 and one line; returns the line."""

    def call(*args: object) -> str:
        result = run(*args)
        assert result.status == 2, result
        assert result.err.count("\n") == 1, result.err
        assert "Traceback" not in result.err
        assert result.out == ""
        return result.err

    return call


def with_settings(*settings: str) -> list[str]:
    """The flags of the command that change these settings, each as ``key=value``."""
    return [part for setting in settings for part in ("--set", setting)]


def make_pictures(folder: Path, count: int, *, captions: int = 1, seed: int = 0, side: int = 40) -> Path:
    """A folder of pictures and ``list.tsv`` with `captions` rows for each; returns the list."""
    rng = np.random.default_rng(seed)
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    (folder / "images").mkdir(parents=True)
    with (folder / "list.tsv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["path", "caption", "number"])
        for number in range(count):
            scene = random_scene(rng, pairs)
            name = f"images/{number:03d}.png"
            draw(scene, rng, side).save(folder / name)
            for _ in range(captions):
                writer.writerow([name, caption(scene, rng), number])
    return folder / "list.tsv"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 48 pictures with a caption each."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), 48)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 12 pictures with three captions each."""
    return make_pictures(tmp_path_factory.mktemp("captioned"), 12, captions=3, seed=1)


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 48 pictures in four shards."""
    from clipkit.data import PackOptions, pack
    from clipkit.data.sources import open_source

    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(open_source(pictures), folder, PackOptions(shard_samples=13))
    return folder


def tiny_model(seed: int = 0, **changes: Any) -> DualEncoder:
    """A pair of transformers of 1.6 M parameters, random by seed."""
    torch.manual_seed(seed)
    return create_model(ModelConfig.model_validate({**TINY_VIT, **changes})).eval()


@pytest.fixture(scope="session")
def model() -> DualEncoder:
    return tiny_model()


@pytest.fixture(scope="session")
def model_dir(model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains the tiny model in a moment."""
    import yaml

    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    settings = {
        "model": TINY_VIT,
        "data": {"workers": 0, "augment": {"shift": 0.1}},
        "batch_size": 16,
        "steps": 6,
        "precision": "fp32",
        "optim": {"lr": "1e-3", "warmup_steps": 2},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1},
    }
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def embeddings(pictures: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 48 pictures and captions, embedded."""
    from clipkit.data.sources import open_source
    from clipkit.embedding import EmbedOptions, embed
    from clipkit.models import load_model, model_reference

    folder = tmp_path_factory.mktemp("embedded") / "emb"
    towers = load_model(model_dir)
    reference = model_reference(towers, model_dir, folder)
    options = EmbedOptions(precision="fp32", part_size=20)
    embed(open_source(pictures), towers, folder, options, model_reference=reference)
    return folder


@pytest.fixture(scope="session")
def index(embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over the embeddings, made by the command."""
    from clipkit.cli import run_job

    folder = tmp_path_factory.mktemp("indexed") / "index"
    assert run_job("build", [str(embeddings), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(recipe, shards, tmp_path_factory):
    """An undisturbed run of 6 steps."""
    from clipkit.cli import run_job

    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_job("train", [str(recipe), "--set", f"data.train={shards}", "--out", str(out)]) == 0
    return out


@pytest.fixture
def memory(tmp_path):
    """A folder in fsspec's memory, named for the test; gives its URL and a function that copies a folder there."""
    files = fsspec.filesystem("memory")
    root = f"/{tmp_path.parent.name}-{tmp_path.name}"

    def put(folder, name=""):
        for path in folder.rglob("*"):
            if path.is_file():
                files.pipe("/".join(filter(None, [root, name, str(path.relative_to(folder))])), path.read_bytes())

    yield f"memory:/{root}", put
    files.rm(root, recursive=True)
