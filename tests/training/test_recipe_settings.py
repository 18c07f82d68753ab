"""Every setting of a recipe does what it says, through the whole command."""

import json
import resource
import subprocess
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from clipkit.embedding import Embeddings
from clipkit.models import checkpoints, load_model
from tests.conftest import with_settings
from tests.kills import command
from tests.training.test_train import ENVIRONMENT, TRAIN, metrics, weights


@pytest.fixture
def train(run, recipe, shards, tmp_path):
    """Train with some settings; gives the run's folder and what was said."""

    def call(*pairs, name="run", status=0):
        flags = with_settings(f"data.train={shards}", *pairs)
        result = run("train", recipe, *flags, "--out", tmp_path / name)
        assert result.status == status, result.err
        return tmp_path / name, result.err

    return call


def changed(run_folder, before):
    now = weights(run_folder)
    return {name for name, tensor in load_file(before).items() if not torch.equal(tensor, now[name])}


def test_the_average_is_what_is_published_and_evaluated(train, run, captioned):
    settings = ["optim.ema=0.5", f"validation.retrieval={captioned}", "checkpoint.keep=9", "optim.lr=1e-2"]
    out, _ = train(*settings)
    folder = checkpoints(out)[-1]
    trained = load_file(folder / "weights.safetensors")
    average = load_file(folder / "model" / "model.safetensors")
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, average[name])
    assert any(not torch.equal(average[name], trained[f"backbone.{name}"]) for name in average)
    figures = json.loads(run("evaluate", "retrieval", captioned, "--model", out, "--format", "json").out)
    logged = metrics(out)[-1]
    assert logged["val_text_retrieval_recall@5"] == figures["text_retrieval_recall@5"]


def test_the_best_checkpoint_stays_and_is_called_by_name(train, run, captioned):
    name = "text_retrieval_recall@5"
    settings = [f"validation.retrieval={captioned}", "validation.every_steps=1", f"validation.best={name}"]
    out, _ = train(*settings, "checkpoint.keep=1", "steps=8", "optim.lr=0.02")
    scores = {line["step"]: line[f"val_{name}"] for line in metrics(out) if f"val_{name}" in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert [folder.name for folder in checkpoints(out)] == sorted({f"step-{best:06d}", "step-000008"})
    figures = json.loads(run("evaluate", "retrieval", captioned, "--model", f"{out}@best", "--format", "json").out)
    assert figures[name] == scores[best]


def test_zeroshot_while_training_is_what_evaluate_says(train, run, pictures, tmp_path):
    for number, picture in enumerate(sorted((pictures.parent / "images").iterdir())):
        place = tmp_path / "classes" / ("red heart" if number % 2 else "blue star") / picture.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture.read_bytes())
    out, _ = train(f"validation.zeroshot={tmp_path / 'classes'}", "steps=2")
    figures = json.loads(run("evaluate", "zeroshot", tmp_path / "classes", "--model", out, "--format", "json").out)
    logged = {k.removeprefix("val_"): v for k, v in metrics(out)[-1].items() if k.startswith("val_")}
    assert logged
    assert {name: figures[name] for name in logged} == logged


def test_a_teacher_teaches(train, run, shards, embeddings, tmp_path):
    """The student ends nearer to the teacher's similarities than without it."""
    teacher = tmp_path / "teacher"
    trained, _ = train("steps=15", "optim.lr=3e-3", name="trained")
    assert run("embed", shards, "--model", trained, "--out", teacher, "--precision", "fp32").status == 0
    distances = {}
    for name, pairs in {"alone": [], "taught": [f"loss.distill={{teacher: {teacher}, weight: 5, scale: 20}}"]}.items():
        out, _ = train("steps=15", "seed=5", "optim.lr=1e-3", *pairs, name=name)

        assert (
            run("embed", shards, "--model", out, "--out", tmp_path / f"{name}-emb", "--precision", "fp32").status == 0
        )
        similarities = []
        for folder in (teacher, tmp_path / f"{name}-emb"):
            found = Embeddings.open(folder)
            image, text = (torch.as_tensor(found.vectors(side)[:]).float() for side in ("image", "text"))
            similarities.append((20 * image @ text.T).softmax(-1))
        distances[name] = float((similarities[0] - similarities[1]).abs().sum(-1).mean())
    assert distances["taught"] < 0.9 * distances["alone"]


def test_a_teacher_that_does_not_know_the_samples_is_refused(
    refused, recipe, shards, captioned, model_dir, run, tmp_path
):
    run("embed", captioned, "--model", model_dir, "--out", tmp_path / "emb")
    settings = ["--set", f"data.train={shards}", "--set", f"loss.distill.teacher={tmp_path / 'emb'}"]
    assert "has no embedding of sample" in refused("train", recipe, *settings, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_locked_image_tower_stays_bit_equal(train, model_dir):
    out, _ = train(f"model={model_dir}", "towers.image.lock=true", "precision=bf16")
    moved = changed(out, model_dir / "model.safetensors")
    assert not any(name.startswith("visual.") and name != "visual.proj" for name in moved)
    assert {"visual.proj", "text_projection", "logit_scale"} <= moved


def test_layer_decay_moves_lower_layers_less(train, model_dir):
    out, _ = train(f"model={model_dir}", "towers.image.layer_decay=0.01", "steps=2")
    before, now = load_file(model_dir / "model.safetensors"), weights(out)
    moved = {name: (now[name] - tensor).abs().max() for name, tensor in before.items()}
    assert moved["visual.conv1.weight"] < 0.05 * moved["visual.proj"]
    assert moved["transformer.resblocks.0.mlp.c_fc.weight"] > 0.5 * moved["visual.proj"]


SAME = {
    "plain loss": ["loss.form=plain"],
    "ring": ["loss.exchange=ring"],
    "in pieces": ["micro_batch=5"],
    "computed again": ["towers.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("pairs", SAME.values(), ids=SAME)
def test_another_way_to_compute_the_same(train, trained, pairs):
    out, _ = train(*pairs)
    for ours, theirs in zip(metrics(out), metrics(trained), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


OTHER = {
    "label smoothing": ["loss.label_smoothing=0.3"],
    "muon": ["optim.kind=muon"],
    "patch dropout": ["towers.patch_dropout=0.5"],
    "smaller first": ["phases=[{until: 0.5, image_size: 16, context_length: 5}]"],
    "autocast": ["precision=amp_bf16"],
}


@pytest.mark.parametrize("pairs", OTHER.values(), ids=OTHER)
def test_another_training(train, trained, pairs):
    out, _ = train(*pairs)
    lines = metrics(out)
    assert [line["loss"] for line in lines] != [line["loss"] for line in metrics(trained)]
    assert all(line["loss"] < 10 for line in lines)
    assert load_model(out).embed_dim


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [[], ["micro_batch=8"]], ids=["whole", "in pieces"])
def test_compiled_it_is_the_same_training(recipe, shards, trained, tmp_path, pairs):
    """In a process of its own: the shapes that tests check in every signature cannot be traced."""
    out = tmp_path / "run"
    flags = with_settings(f"data.train={shards}", "compile=true", *pairs)
    call = [*TRAIN, str(recipe), *flags, "--out", str(out)]
    done = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(out), metrics(trained), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_tensorboard_gets_the_figures(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = train("log.trackers=[tensorboard]")
    events = EventAccumulator(str(out / "clipkit"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in logged] == pytest.approx([line["loss"] for line in metrics(out)])


def test_a_tracker_that_is_not_installed_is_named(refused, recipe, shards, tmp_path):
    settings = ["--set", f"data.train={shards}", "--set", "log.trackers=[wandb]"]
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    assert "pip install wandb" in refused("train", recipe, *settings, "--out", tmp_path / "run")


def test_by_minutes_too(train):
    out, _ = train("checkpoint.every_steps=null", "checkpoint.every_minutes=1e-9", "checkpoint.keep=99")
    assert [folder.name for folder in checkpoints(out)] == [f"step-{step:06d}" for step in range(1, 7)]


def small_files():
    """From here on this process may write no file of more than a MiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(run, recipe, shards, tmp_path):
    """With a real limit on file sizes, set when the first checkpoint stands."""
    call = ["train", recipe, "--set", f"data.train={shards}", "--out", tmp_path / "run", "--resume", "--set"]
    assert run(*call, "steps=2").status == 0
    full = command(*call, "steps=4", said=tmp_path / "said", first=small_files)
    full.join()
    said = (tmp_path / "said").read_text()
    assert full.exitcode == 2, said
    assert "step-000002 is there, and the run goes on" in said
    assert "Traceback" not in said
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000002"]
    assert run(*call, "steps=4").status == 0
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]


def test_settings_that_do_not_go_together(refused, recipe, shards, tmp_path):
    for pair, word in {
        "loss.exchange=ring": "needs form=tiled",
        "towers.image.unlocked_layers=2": "lock=true",
        "phases=[{until: 0.5}, {until: 0.2}]": "in the order",
        "phases=[{until: 0.5, image_size: 17}]": "multiple",
        "validation.best=recall": "validation.best=recall is no figure",
    }.items():
        pairs = [pair, "loss.form=plain"] if "ring" in pair else [pair]
        flags = with_settings(f"data.train={shards}", *pairs)
        assert word in refused("train", recipe, *flags, "--out", tmp_path / "run"), pair
