"""Training end to end on the CPU: it learns, resumes bit-equal, refuses what it must, and two ranks are one."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clipkit.images import Preprocess
from clipkit.models import load_model
from clipkit.training import Pace, checkpoint, learning_rate
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.loss import info_nce
from clipkit.training.optim import parameter_groups
from tests.conftest import tiny_model, with_settings
from tests.kills import command
from tests.paths import ROOT

TRAIN = [sys.executable, "-m", "clipkit", "train"]
# Sums are cut by threads: a run in a process of its own is bit-equal to one in this process with as many of them.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def metrics(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def weights(run_folder):
    return load_file(run_folder / "model" / "model.safetensors")


def begin(call, out, **options):
    """Start a training of its own and wait until its first checkpoint stands; gives the process."""
    process = subprocess.Popen(call, **{"env": ENVIRONMENT, **options})
    until_a_checkpoint_stands(out, lambda: process.poll() is None)
    return process


def until_a_checkpoint_stands(out, is_alive):
    """Wait for the first one of a training that goes on meanwhile."""
    deadline = time.time() + 120
    while not checkpoint.checkpoints(out):
        assert is_alive()
        assert time.time() < deadline
        time.sleep(0.01)


def assert_equal_runs(a, b):
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    untimed = [
        [
            {k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait", "memory_gib")}
            for line in metrics(run_folder)
        ]
        for run_folder in (a, b)
    ]
    assert untimed[0] == untimed[1]


def test_a_run_folder_holds_what_it_says(trained, shards):
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["kind"] == "run"
    assert manifest["counts"] == {"steps": 6, "samples": 96, "left_out": 0}
    assert load_model(trained).fingerprint() == manifest["model"]["fingerprint"]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["optim"]["lr"] == 0.001
    assert config["data"]["train"] == str(shards)
    lines = metrics(trained)
    assert [line["step"] for line in lines] == list(range(1, 7))
    wanted = {
        "step",
        "samples",
        "loss",
        "lr",
        "grad_norm",
        "logit_scale",
        "samples_per_second",
        "data_wait",
        "left_out",
        "skipped",
        "memory_gib",
    }
    assert all(set(line) == wanted for line in lines)
    assert [p.name for p in checkpoint.checkpoints(trained)] == ["step-000004", "step-000006"]
    assert load_model(f"{trained}@step-000006").fingerprint() == manifest["model"]["fingerprint"]


def test_the_loop_is_the_loop_written_plainly(trained, shards):
    """The slow twin: the same steps by hand give the same weights."""
    torch.manual_seed(0)
    from accelerate.utils import set_seed

    set_seed(0)
    from clipkit.models import create_model
    from clipkit.training import load_config

    config = load_config(trained / "config.yaml")
    model = create_model(config.model).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), 0.1), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    data = open_train_data(config.data, 0)
    batches = Batches(data, Preprocess(size=32), model.tokenizer, config.data, 0)
    loader = train_batches(batches, first_step=0, steps=6, batch_size=16)
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=6, peak=1e-3, warmup=2)
        image, text, scale, _ = model(batch["pixels"], model.trim(batch["tokens"]))
        loss = info_nce(image, text, scale, image_ids=batch["image_ids"], text_ids=batch["text_ids"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.item() == pytest.approx(metrics(trained)[step]["loss"], rel=1e-6)
    for name, tensor in weights(trained).items():
        # The bias of attention's keys has no gradient but rounding, which Adam makes as large as any.
        if not name.endswith("in_proj_bias"):
            assert torch.allclose(tensor, model.backbone.state_dict()[name], atol=1e-6), name


def test_it_learns(run, recipe, shards, tmp_path):
    settings = [
        "--set",
        f"data.train={shards}",
        "--set",
        "steps=60",
        "--set",
        "optim.lr=3e-3",
        "--set",
        "data.workers=1",
    ]
    assert run("train", recipe, *settings, "--out", tmp_path / "run").status == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


RESUMED = {
    "plain": ["data.workers=0"],
    "everything": [
        "model.vision_cfg.patch_dropout=0.4",
        "data.workers=1",
        "optim.ema=0.9",
        "micro_batch=5",
        "precision=bf16",
        "phases=[{until: 0.6, image_size: 16, context_length: 6}]",
    ],
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_stopped_and_resumed_twice_it_ends_bit_equal(run, recipe, shards, tmp_path, monkeypatch, settings):
    flags = with_settings(f"data.train={shards}", *settings)
    whole = tmp_path / "undisturbed"
    assert run("train", recipe, *flags, "--out", whole).status == 0
    out = tmp_path / "run"
    used = Pace.used

    def signal_at(number):
        # As a queue would send it, in the middle of a step that is no step of a checkpoint.
        seen = iter(range(1, 99))

        def count(pace, samples):
            if next(seen) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            used(pace, samples)

        monkeypatch.setattr(Pace, "used", count)

    for steps, number in ((2, 2), (4, 1)):
        signal_at(number)
        stopped = run("train", recipe, *flags, "--out", out, "--resume")
        assert stopped.status == 75
        assert f"saved at step {steps + 1}" in stopped.err
        assert not (out / "manifest.json").exists()
    monkeypatch.setattr(Pace, "used", used)
    assert run("train", recipe, *flags, "--out", out, "--resume").status == 0
    assert_equal_runs(out, whole)
    assert_equal_checkpoints(out, whole)
    again = run("train", recipe, *flags, "--out", out, "--resume")
    assert again.status == 0
    assert "trained to step 6 already" in again.err


def assert_equal_checkpoints(a, b):
    """The last checkpoints: weights, optimizer, average, random generators."""
    ours, theirs = (sorted((folder / "checkpoints" / "step-000006").rglob("*.safetensors")) for folder in (a, b))
    assert [p.name for p in ours] == [p.name for p in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name, tensor in load_file(mine).items():
            assert torch.equal(tensor, load_file(other)[name]), (mine.name, name)


@pytest.mark.parametrize("moment", ["writing", pytest.param("written", marks=pytest.mark.slow), "between"])
def test_killed_from_outside_twice_it_resumes_bit_equal(recipe, shards, trained, tmp_path, moment):
    """While a checkpoint is being written, when one has just been published, and anywhere."""
    out = tmp_path / "run"
    call = ["train", recipe, "--set", f"data.train={shards}", "--out", out, "--resume"]
    threads = torch.get_num_threads()  # sums are cut by them
    for life in range(2):
        process = command(*call, threads=threads)
        before = len(checkpoint.checkpoints(out))
        deadline = time.time() + 120
        while process.is_alive() and time.time() < deadline:
            if moment == "writing" and any((out / "checkpoints").glob(".step-*/*/*")):
                break
            if moment != "writing" and len(checkpoint.checkpoints(out)) > before:
                time.sleep(0.03 * (life + 1) if moment == "between" else 0)
                break
            time.sleep(0.001)
        process.kill()
        process.join()
    process = command(*call, threads=threads)
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(out, trained)
    assert_equal_checkpoints(out, trained)


def test_the_length_may_grow_and_nothing_else_may_change(run, refused, recipe, shards, tmp_path):
    out = tmp_path / "run"
    call = ["train", recipe, "--set", f"data.train={shards}", "--out", out]
    assert run(*call, "--set", "steps=2").status == 0
    assert "already holds a run; add --resume" in refused(*call)
    line = refused(*call, "--resume", "--set", "optim.lr=1", "--set", "seed=4")
    assert "other settings: optim.lr, seed" in line
    assert run(*call, "--resume", "--set", "steps=4", "--set", "log.every_steps=2").status == 0
    assert [line["step"] for line in metrics(out)] == [1, 2, 4]
    assert json.loads((out / "manifest.json").read_text())["counts"]["steps"] == 4
    assert run(*call, "--overwrite", "--set", "steps=1").status == 0
    assert [line["step"] for line in metrics(out)] == [1]


def test_other_samples_in_the_old_place_are_noticed(run, refused, recipe, pictures, shards, tmp_path):
    from clipkit.data import pack
    from clipkit.data.sources import open_source

    shutil.copytree(shards, tmp_path / "s")
    call = ["train", recipe, "--out", tmp_path / "run", "--resume", "--set"]
    assert run(*call, f"data.train={tmp_path / 's'}", "--set", "steps=2").status == 0
    shutil.move(tmp_path / "s", tmp_path / "moved")
    assert run(*call, f"data.train={tmp_path / 'moved'}", "--set", "steps=3").status == 0
    (tmp_path / "fewer.tsv").write_text("".join(pictures.read_text().splitlines(keepends=True)[:20]))
    pack(open_source(tmp_path / "fewer.tsv", image_root=pictures.parent), tmp_path / "s")
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert "holds other samples than" in refused(*call, f"data.train={tmp_path / 's'}", "--set", "steps=4")
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_two_trainings_do_not_share_a_folder(refused, recipe, shards, trained):
    from clipkit.storage import hold

    lock = hold(trained, "trains in")
    line = refused("train", recipe, "--set", f"data.train={shards}", "--out", trained, "--resume", "--set", "steps=9")
    assert "another process trains in" in line
    lock.release()


def test_a_run_that_blows_up_goes_back_and_in_the_end_stops_with_a_good_checkpoint(run, recipe, shards, tmp_path):
    out = tmp_path / "run"
    settings = [f"data.train={shards}", "steps=200", "optim.lr=1e30", "checkpoint.every_steps=1", "guard.patience=2"]
    flags = with_settings(*settings)
    result = run("train", recipe, *flags, "--out", out)
    assert result.status == 2
    assert "lower optim.lr" in result.err
    assert "Traceback" not in result.err
    for folder in checkpoint.checkpoints(out):
        assert all(torch.isfinite(t).all() for t in load_file(folder / "model" / "model.safetensors").values())
    named = [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]
    assert all(line["samples"] and set(line["samples"][0]) == {"shard", "key"} for line in named)
    assert all(math.isfinite(line.get("loss", 0)) for line in metrics(out))


def test_a_recipe_in_the_run_folder_is_not_overwritten(refused, recipe, shards, tmp_path):
    own = tmp_path / "exp" / "config.yaml"
    own.parent.mkdir()
    own.write_text(recipe.read_text())
    assert "holds no run" in refused("train", own, "--set", f"data.train={shards}", "--out", tmp_path / "exp")
    assert own.read_text() == recipe.read_text()


def test_a_new_run_from_anothers_weights(run, recipe, shards, trained, tmp_path):
    call = ["train", recipe, "--set", f"data.train={shards}", "--set", "steps=1", "--set", "optim.lr=1e-12"]
    assert run(*call, "--init-from", trained, "--out", tmp_path / "run").status == 0
    for name, tensor in weights(trained).items():
        assert torch.allclose(tensor, weights(tmp_path / "run")[name], atol=1e-6), name


def test_validation_while_training_is_what_evaluate_says(run, recipe, shards, captioned, tmp_path):
    out = tmp_path / "run"
    settings = [f"data.train={shards}", f"validation.retrieval={captioned}", "steps=2", "validation.every_steps=1"]
    flags = with_settings(*settings)
    assert run("train", recipe, *flags, "--out", out).status == 0
    logged = [line for line in metrics(out) if "val_image_retrieval_recall@1" in line]
    assert [line["step"] for line in logged] == [1, 2]
    figures = json.loads(run("evaluate", "retrieval", captioned, "--model", out, "--format", "json").out)
    for name, value in logged[-1].items():
        if name.startswith("val_"):
            assert figures[name.removeprefix("val_")] == value


def test_unusable_samples_go_to_the_ledger_and_the_status_is_1(run, recipe, tmp_path):
    from clipkit.data.shards import write_shard

    pictures = [(f"k{i}", {"png": (b"" if i == 3 else _png(i)), "txt": b"a caption"}) for i in range(20)]
    write_shard(tmp_path / "s" / "0.tar", pictures)
    result = run(
        "train", recipe, "--set", f"data.train={tmp_path / 's'}", "--set", "steps=3", "--out", tmp_path / "run"
    )
    assert result.status == 1
    assert re.search(r"\d unusable samples were replaced", result.err)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert {line["key"] for line in ledger} == {"k3"}
    assert metrics(tmp_path / "run")[-1]["left_out"] == len(ledger)


def _png(value):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (value, 200, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_sigmoid_loss_needs_and_trains_a_bias(run, refused, recipe, shards, tmp_path):
    call = ["train", recipe, "--set", f"data.train={shards}", "--set", "loss.kind=sigmoid", "--out", tmp_path / "run"]
    assert "needs a bias" in refused(*call)
    assert run(*call, "--resume", "--set", "model.init_logit_bias=-10").status == 0
    assert load_model(tmp_path / "run").logit_bias is not None


def test_bf16_trains(run, recipe, shards, tmp_path):
    call = ["train", recipe, "--set", f"data.train={shards}", "--set", "precision=bf16", "--set", "steps=2"]
    assert run(*call, "--out", tmp_path / "run").status == 0
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_a_cut_checkpoint_is_refused_by_name_and_the_one_before_is_taken(run, recipe, shards, trained, tmp_path):
    call = ["train", recipe, "--set", f"data.train={shards}", "--out", tmp_path / "run", "--resume", "--set"]
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    path = tmp_path / "run" / "checkpoints" / "step-000006" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    result = run(*call, "log.every_steps=1")
    assert result.status == 0
    assert "step-000006" in result.err
    assert "optimizer.safetensors" in result.err
    assert_equal_runs(tmp_path / "run", trained)


def two_ranks(recipe, shards, out, *settings):
    flags = with_settings(*settings)
    call = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29511",
        "-m",
        "clipkit",
        "train",
        str(recipe),
        "--set",
        f"data.train={shards}",
        *flags,
        "--out",
        str(out),
        "--resume",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow  # under torchrun; tests/test_ranks.py has the same from one command
def test_two_ranks_train_the_model_that_one_does(recipe, shards, trained, tmp_path):
    out = tmp_path / "run"
    first = two_ranks(recipe, shards, out, "steps=4")
    assert first.returncode == 0, first.stderr[-2000:]
    assert sorted(p.name for p in (out / "checkpoints/step-000004").glob("rng-*")) == [
        "rng-00.safetensors",
        "rng-01.safetensors",
    ]
    # The other half with the length of the whole, so that the schedules differ: start anew for the comparison.
    whole = two_ranks(recipe, shards, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    for name, tensor in weights(trained).items():
        assert torch.allclose(tensor, weights(tmp_path / "whole")[name], atol=2e-5), name
    for ours, theirs in zip(metrics(trained), metrics(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_parameter_groups_spare_what_must_not_decay():
    model = tiny_model(init_logit_bias=-10.0)
    decayed, spared = parameter_groups(model.named_parameters(), 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert {"backbone.logit_scale", "backbone.logit_bias", "backbone.positional_embedding"} <= spared_names
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert "backbone.token_embedding.weight" not in spared_names
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_learning_rate_warms_up_and_follows_half_a_cosine():
    rates = [learning_rate(s, steps=100, peak=2.0, warmup=10, floor=0.5) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.25)
    assert rates == [*rates[:10], *sorted(rates[10:], reverse=True)]
    assert 0.5 < rates[-1] < 0.51
    short = [learning_rate(s, steps=10, peak=1.0, warmup=2000) for s in range(10)]
    assert short[2] == 1.0


def test_the_job_runs_as_a_plain_script(recipe, shards, tmp_path):
    script = ROOT / "train" / "train.py"
    done = subprocess.run(
        [sys.executable, script, recipe, "--set", "steps=0", "--set", f"data.train={shards}", "--out", tmp_path / "r"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train: error: steps:")
