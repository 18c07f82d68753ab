"""A disk that is full and a kill at any moment lose no checkpoint that was whole."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr

import pytest
import torch

from clipkit.core import ClipkitError
from clipkit.models import checkpoints
from clipkit.training import Saver, checkpoint, newest_usable
from clipkit.training.checkpoint_files import checkpoint_flaw
from tests.kills import apart
from tests.training.test_checkpoint import Training, names, save


def begin(run):
    """A run with a checkpoint at step 1, one step further."""
    torch.set_num_threads(1)
    training = Training().train(1)
    saver = Saver(run, training.model, keep=1)
    saver.save(training.snapshot())
    saver.wait(final=True)
    return training.train(1), saver


def _on_a_full_disk(run):
    """A real refusal: the kernel allows this process no file above 50 kB for a while."""
    said, errors = {}, io.StringIO()
    with redirect_stderr(errors):
        training, saver = begin(run)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        saver.save(training.snapshot())
        saver.wait()
        said["there"] = sorted(path.name for path in (run / "checkpoints").iterdir())
        with pytest.raises(ClipkitError) as stop:
            saver.wait(final=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saver.save(training.train(1).snapshot())
        saver.wait(final=True)
    said["warned"], said["final"] = errors.getvalue(), str(stop.value)
    (run / "said.json").write_text(json.dumps(said))


def test_a_disk_that_takes_no_more_is_a_warning_and_the_next_save_works(tmp_path):
    assert apart(_on_a_full_disk, tmp_path) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    failed = f"the checkpoint of step 2 in {tmp_path} cannot be written (File too large)"
    assert said == {
        "there": ["step-000001"],
        "warned": f"warning: {failed}; step-000001 is there, and the run goes on\n",
        "final": f"{failed}; make room and go on with --resume",
    }
    assert newest_usable(tmp_path).name == "step-000003"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_too_little_room_is_said_before_the_disk_is_filled(tmp_path, monkeypatch, capsys):
    training = Training().train(1)
    saver = Saver(tmp_path, training.model, keep=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1_000))
    monkeypatch.setattr(checkpoint, "_write_files", None)
    saver.save(training.snapshot())
    saver.wait()
    line = capsys.readouterr().err
    assert "cannot be written (it takes 0.0" in line
    assert "GB and the disk has 1e-06 GB left); no checkpoint is there, and the run goes on" in line
    assert list((tmp_path / "checkpoints").iterdir()) == []


# What is about to be called when the kill comes, and which steps stand there then.
MOMENTS = {
    "clipkit.training.checkpoint:_write_files": ["step-000001"],
    "clipkit.training.checkpoint:save_file": ["step-000001"],  # the model is written, the optimizer is not
    "clipkit.training.checkpoint:seal": ["step-000001"],
    "clipkit.training.checkpoint_files:write_json": ["step-000001"],
    "clipkit.training.checkpoint:publish": ["step-000001"],
    "clipkit.training.checkpoint:prune": ["step-000001", "step-000002"],
    "clipkit.training.checkpoint_files:remove_folder": ["step-000001", "step-000002"],
    "shutil:rmtree": ["step-000001", "step-000002"],
}


def _killed_at(moment, training, run):
    module, _, name = moment.partition(":")
    setattr(sys.modules[module], name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    saver = Saver(run, training.model, keep=1)
    saver.save(training.snapshot())
    saver.wait()


def _killed_at_each_moment(folder):
    training, _ = begin(folder / "run")
    for moment in MOMENTS:
        run = folder / moment
        shutil.copytree(folder / "run", run)
        process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(moment, training, run))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL


def test_killed_while_it_writes_it_leaves_whole_checkpoints_only(tmp_path):
    assert apart(_killed_at_each_moment, tmp_path) == 0
    training = Training()
    for moment, left in MOMENTS.items():
        run = tmp_path / moment
        assert names(run) == left, moment
        assert newest_usable(run).name == left[-1]
        save(training.load(checkpoints(run)[-1]).train(1), run)
        assert [path.name for path in (run / "checkpoints").glob(".*")] == []


def _without_end(run):
    training, saver = begin(run)
    (run / "begun").touch()
    while True:
        saver.save(training.train(1).snapshot())


def _killed_at_any_time(run):
    process = multiprocessing.get_context("fork").Process(target=_without_end, args=(run,))
    process.start()
    while not (run / "begun").exists():
        time.sleep(0.001)
    time.sleep(0.2)
    process.kill()
    process.join()


def test_killed_at_any_time_it_leaves_whole_checkpoints_only(tmp_path):
    assert apart(_killed_at_any_time, tmp_path) == 0
    assert checkpoints(tmp_path)
    for folder in checkpoints(tmp_path):
        assert checkpoint_flaw(folder) is None
