"""`clipkit train --plan`: what a run takes, and what would not fit, before anything is spent."""

import json

import pytest

from tests.conftest import tiny_model, with_settings


def plan(run, recipe, shards, out, *settings):
    flags = with_settings(f"data.train={shards}", *settings)
    return run("train", recipe, *flags, "--out", out, "--plan", "--format", "json")


def test_the_figures_are_those_of_the_run(run, recipe, shards, tmp_path):
    result = plan(run, recipe, shards, tmp_path / "run", "optim.ema=0.9", "validation.best=null")
    assert result.status == 0
    figures = json.loads(result.out)
    parameters = sum(p.numel() for p in tiny_model().parameters())
    assert figures["parameters"] == figures["trained_parameters"] == parameters
    assert (figures["steps"], figures["samples"]) == (6, 96)
    assert figures["weights_gib"] * 2**30 == pytest.approx(4 * parameters, rel=0.01)
    assert figures["average_gib"] * 2**30 == pytest.approx(4 * parameters, rel=0.01)
    assert figures["optimizer_gib"] * 2**30 == pytest.approx(8 * parameters, rel=0.01)
    assert figures["hours"] * 3600 == pytest.approx(6 * figures["seconds_per_step"])
    assert figures["peak_memory_gib"] < figures["memory_gib"]
    assert figures["problems"] == []
    assert not (tmp_path / "run").exists()
    # The estimate of a checkpoint is what one takes.
    flags = ["--set", f"data.train={shards}", "--set", "optim.ema=0.9"]
    assert run("train", recipe, *flags, "--out", tmp_path / "run").status == 0
    folder = tmp_path / "run" / "checkpoints" / "step-000006"
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert figures["checkpoint_gib"] * 2**30 == pytest.approx(written, rel=0.01)


def test_each_phase_is_timed_and_a_locked_tower_is_not_counted(run, recipe, shards, tmp_path):
    settings = ["steps=40", "phases=[{until: 0.5, image_size: 16}]", "towers.image.lock=true"]
    figures = json.loads(plan(run, recipe, shards, tmp_path / "run", *settings).out)
    assert figures["steps"] == 40
    assert figures["trained_parameters"] < figures["parameters"]


def test_a_disk_that_will_not_hold_the_checkpoints_is_named(run, recipe, shards, tmp_path):
    result = plan(run, recipe, shards, tmp_path / "run", "checkpoint.keep=100000000")
    assert result.status == 1
    problems = json.loads(result.out)["problems"]
    assert len(problems) == 1
    assert "GiB free" in problems[0]
    assert "set checkpoint.keep" in problems[0]
