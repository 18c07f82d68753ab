"""What may happen to a training run on its way: steps that cannot be taken, errors in between, signals to a group."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import clipkit.training
from clipkit.core import ClipkitError
from clipkit.models import checkpoints
from clipkit.training import Learner
from clipkit.training.batches import Batches
from tests.conftest import with_settings
from tests.kills import command
from tests.training.test_train import metrics, until_a_checkpoint_stands, weights


@pytest.fixture
def poison(monkeypatch):
    """Makes the second image of the batches of some calls, counted from 1, not a number."""
    on_device = Batches.on_device

    def at(*calls):
        seen = iter(range(1, 999))

        def poisoned(self, batch, device):
            pixels = on_device(self, batch, device)
            if next(seen) in calls:
                pixels = pixels.float()
                pixels[1] = torch.nan
            return pixels

        monkeypatch.setattr(Batches, "on_device", poisoned)

    return at


RESNET = "model.vision_cfg={layers: [1, 1, 1, 1], width: 8, image_size: 32}"


def test_a_step_that_is_skipped_leaves_running_statistics_as_they_were(run, recipe, shards, tmp_path, poison):
    poison(3)
    settings = with_settings(f"data.train={shards}", RESNET, "steps=3", "checkpoint={every_steps: 1, keep: 3}")
    assert run("train", recipe, *settings, "--out", tmp_path / "run").status == 0
    published = [folder / "model" / "model.safetensors" for folder in checkpoints(tmp_path / "run")[1:]]
    before, after = map(load_file, published)
    assert any("running_var" in name for name in before)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_on_a_stream_that_is_not_read_backwards_it_goes_back_all_the_same(run, recipe, shards, tmp_path, poison):
    poison(4, 5)
    tars = sorted(shards.glob("*.tar"))
    pipe = "pipe:cat " + " ".join(str(tar) for tar in tars)
    settings = with_settings(f"data.train={pipe}", "steps=8", "guard.patience=2", "checkpoint.every_steps=2")
    result = run("train", recipe, *settings, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert "back to step-000002, and on with other samples" in result.err
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
    assert all("loss" in line for line in metrics(tmp_path / "run"))


def test_validation_that_fails_on_the_way_loses_no_checkpoint(
    run, recipe, shards, captioned, trained, tmp_path, monkeypatch
):
    validate = clipkit.training.validate
    calls = iter(range(1, 99))

    def fails(*args):
        if next(calls) == 5:
            raise ClipkitError("the list of captions is gone")
        return validate(*args)

    out = tmp_path / "run"
    settings = with_settings(f"data.train={shards}", f"validation.retrieval={captioned}", "validation.every_steps=1")
    call = ["train", recipe, *settings, "--out", out, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(clipkit.training, "validate", fails)
        result = run(*call)
    assert result.status == 2
    assert "the list of captions is gone" in result.err
    assert [folder.name for folder in checkpoints(out)] == ["step-000002", "step-000004"]
    assert run(*call).status == 0
    for name, tensor in weights(trained).items():
        assert torch.equal(tensor, weights(out)[name]), name


def test_a_plan_says_what_does_not_fit(run, recipe, shards, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Learner, "gradient", full)
    call = [
        "train",
        recipe,
        *with_settings(f"data.train={shards}"),
        "--out",
        tmp_path / "run",
        "--plan",
        "--format",
        "json",
    ]
    result = run(*call)
    assert result.status == 1
    figures = json.loads(result.out)
    assert len(figures["problems"]) == 1
    assert "a batch of 16 does not fit into the memory of cpu; set micro_batch" in figures["problems"][0]
    assert "hours" not in figures


def test_an_old_run_is_not_removed_for_one_that_cannot_begin(refused, recipe, shards, monkeypatch, trained):
    monkeypatch.setenv("WORLD_SIZE", "3")
    before = sorted(path.name for path in trained.rglob("*"))
    refused("train", recipe, *with_settings(f"data.train={shards}"), "--out", trained, "--overwrite")
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_other_weights_come_before_the_towers_of_the_recipe(run, recipe, shards, model_dir, trained, tmp_path):
    """A recipe that takes its towers from a model does not take them again over what it is to start from."""
    settings = with_settings(f"data.train={shards}", f"towers.image.init={model_dir}", "steps=1", "optim.lr=1e-12")
    assert run("train", recipe, *settings, "--init-from", trained, "--out", tmp_path / "run").status == 0
    for name, tensor in weights(trained).items():
        assert torch.allclose(tensor, weights(tmp_path / "run")[name], atol=1e-6), name


def test_a_signal_to_the_whole_group_spares_the_loader_processes(recipe, shards, tmp_path):
    """As Slurm and a terminal send it: to every process of the job."""
    out = tmp_path / "run"
    settings = with_settings(f"data.train={shards}", "data.workers=1", "steps=5000")
    process = command("train", recipe, *settings, "--out", out, said=tmp_path / "said", first=os.setsid)
    until_a_checkpoint_stands(out, process.is_alive)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 75, said
    assert "loader process" not in said
    assert checkpoints(out)
