"""Two ranks are one: copied over them (DDP) or divided (FSDP2), they train the model that one process does."""

import functools
import hashlib
import json
import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from clipkit.training import Learner
from clipkit.training.batches import Batches
from tests.conftest import with_settings
from tests.distributed import run_together
from tests.training.test_train import metrics, weights


def train(recipe, shards, out, *pairs, processes=2):
    call = ["train", recipe, *with_settings(f"data.train={shards}", *pairs), "--out", out, "--resume"]
    done = run_together(*call, processes=processes)
    assert [status for _, status in done] == [0] * processes, done


TWENTY = ("steps=20", "optim.lr=1e-4", "optim.ema=0.9", "checkpoint.every_steps=10")


@pytest.fixture(scope="module")
def alone(recipe, shards, tmp_path_factory):
    """Twenty steps in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(recipe, shards, out, *TWENTY, processes=1)
    return out


def assert_same_training(a, b):
    # The bias of attention's keys has no gradient but rounding, which Adam makes as large as any.
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not name.endswith("in_proj_bias"):
            assert torch.allclose(tensor, theirs[name], atol=3e-5), name
    for mine, other in zip(metrics(a), metrics(b), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("rank", [None, "1"])
def test_a_single_gpu_is_the_own_one_of_each_that_was_launched(recipe, monkeypatch, tmp_path, rank):
    """A process that nobody launched must not look as if somebody had: accelerate would wait for the others."""
    from clipkit.training import distributed, load_config

    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", None)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    joined_as = []

    def joining(*args, **kwargs):
        joined_as.append(os.environ.get("LOCAL_RANK"))
        return Accelerator(*args, **kwargs)

    monkeypatch.setattr(distributed, "Accelerator", joining)
    distributed.Distributed(load_config(recipe, ["data.train=x"]), tmp_path)
    assert joined_as == [None if rank is None else "0"]
    assert os.environ.get("LOCAL_RANK") == rank  # as it was


@pytest.mark.parametrize(
    "pairs",
    [
        ("sharding=none",),
        ("sharding=full",),
        pytest.param(("sharding=full", "micro_batch=3"), marks=pytest.mark.slow),
        pytest.param(("loss.exchange=ring",), marks=pytest.mark.slow),
    ],
    ids=["copied", "divided", "divided, in pieces", "ring"],
)
def test_after_twenty_steps_two_ranks_are_where_one_is(recipe, shards, alone, tmp_path, pairs):
    train(recipe, shards, tmp_path / "run", *TWENTY, *pairs)
    assert_same_training(tmp_path / "run", alone)


def test_divided_weights_go_on_undivided_and_back(recipe, shards, alone, tmp_path):
    """The first half on two ranks with everything divided, the other on one: one sequence, one optimizer."""
    from clipkit.models import checkpoints

    out = tmp_path / "run"
    train(recipe, shards, out, *TWENTY, "sharding=full", "checkpoint.keep=9")
    whole = weights(out)
    for folder in checkpoints(out):
        if folder.name == "step-000020":
            shutil.rmtree(folder)
    (out / "manifest.json").unlink()
    train(recipe, shards, out, *TWENTY, "checkpoint.keep=9", processes=1)
    assert_same_training(out, alone)
    for name, tensor in whole.items():
        if not name.endswith("in_proj_bias"):
            assert torch.allclose(tensor, weights(out)[name], atol=3e-5), name


def test_bf16_copied_with_a_bias_that_the_loss_leaves_alone(recipe, shards, trained, tmp_path):
    """Gradients are bf16 and averaged in fp32, and none comes for the bias: InfoNCE has no use for it."""
    train(recipe, shards, tmp_path / "run", "precision=bf16", "model.init_logit_bias=-10")
    assert weights(tmp_path / "run")["logit_bias"].item() == -10
    for mine, other in zip(metrics(tmp_path / "run"), metrics(trained), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)


@pytest.mark.slow
def test_bf16_divided(recipe, shards, tmp_path):
    train(recipe, shards, tmp_path / "run", "sharding=full", "precision=bf16", "optim.kind=muon")
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    assert metrics(tmp_path / "run")[-1]["loss"] < metrics(tmp_path / "run")[0]["loss"]


def poison(folder, at):
    """In this process: the third sample of the second rank is no number at these calls; weights are noted each time."""
    rank = int(os.environ["RANK"])
    calls = [0]
    on_device, gradient = Batches.on_device, Learner.gradient

    def poisoned(self, batch, device):
        pixels = on_device(self, batch, device)
        calls[0] += 1
        if rank == 1 and calls[0] in at:
            pixels = pixels.float()
            pixels[2] = torch.nan
        return pixels

    def watched(self, *args):
        digest = hashlib.sha256()
        for _, tensor in self.weights.named_parameters():
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        with (folder / f"{rank}.txt").open("a") as handle:
            handle.write(digest.hexdigest() + "\n")
        return gradient(self, *args)

    Batches.on_device, Learner.gradient = poisoned, watched


def poisoned(recipe, shards, tmp_path, at, *pairs):
    call = ["train", recipe, "--out", tmp_path / "run", *with_settings(f"data.train={shards}", *pairs)]
    return run_together(*call, processes=2, first=functools.partial(poison, tmp_path, at))


def test_nan_on_one_rank_leaves_both_as_they_were_and_names_the_sample(recipe, shards, tmp_path):
    results = poisoned(recipe, shards, tmp_path, {3})
    assert [status for _, status in results] == [0, 0], results
    seen = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(2)]
    assert seen[0] == seen[1]  # the ranks hold the same weights before every step
    assert len(seen[0]) == 6
    assert seen[0][2] == seen[0][3]  # the third step was not taken
    assert len(set(seen[0])) == 5  # the others were
    named = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rank"], line["position"]) for line in named] == [(3, 1, 32)]
    assert named[0]["samples"] == [expected(shards, 32 + 8 + 2)]
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert "loss" not in lines[2]


def expected(shards, position):
    from clipkit.training.batches import open_train_data
    from clipkit.training.settings import DataConfig

    data = open_train_data(DataConfig(train=str(shards)), 0)
    shard, key = data.name(data.first([position])[0])
    return {"shard": shard, "key": key}


def test_repeated_it_goes_back_to_the_checkpoint_and_on_with_other_samples(recipe, shards, tmp_path):
    pairs = ("guard.patience=2", "checkpoint.every_steps=2", "steps=8")
    results = poisoned(recipe, shards, tmp_path, {4, 5}, *pairs)
    assert [status for _, status in results] == [0, 0], results
    assert "back to step-000002, and on with other samples" in results[0][0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
    seen = (tmp_path / "0.txt").read_text().split()
    # Steps 1, 2, 3, the bad 4 and 5, then 3 to 8 anew from where step 3 began.
    assert len(seen) == 5 + 6
    assert seen[2] == seen[5]
    assert seen[3] == seen[4] != seen[6]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000008" / "state.json").read_text())["state"]
    assert (state["jumped"], state["skipped"], state["rollbacks"]) == (3, 2, 1)
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")
