"""Several processes from one command: they are one run, and what happens to one of them is told by the status."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from clipkit.models import checkpoints
from tests.conftest import with_settings
from tests.distributed import run_together
from tests.paths import ROOT
from tests.training.test_train import TRAIN, assert_equal_runs, begin

SLURM = ROOT / "train" / "slurm.sbatch"


def call(recipe, shards, out, *settings):
    flags = with_settings(f"data.train={shards}", *settings)
    return [*TRAIN, str(recipe), *flags, "--out", str(out), "--resume", "--processes", "2"]


ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def test_two_processes_stopped_by_a_signal_say_75_and_go_on_bit_equal(recipe, shards, tmp_path):
    """The launcher starts new interpreters; the runs that its own is held against are of forked processes."""

    def together(folder):
        settings = with_settings(f"data.train={shards}")
        done = run_together("train", recipe, *settings, "--out", folder, "--resume", processes=2)
        assert [status for _, status in done] == [0, 0], done

    out, whole = tmp_path / "run", tmp_path / "whole"
    together(whole)
    process = subprocess.Popen(call(recipe, shards, out), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not checkpoints(out) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert said.count("told to stop") == 1
    assert not (out / "manifest.json").exists()
    together(out)
    assert_equal_runs(out, whole)


def test_when_one_process_dies_the_others_are_ended(recipe, shards, tmp_path):
    out = tmp_path / "run"
    process = begin(call(recipe, shards, out, "steps=5000"), out, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(90) not in (0, 1, 75)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_launcher_that_is_killed_leaves_nobody_behind(recipe, shards, tmp_path):
    out = tmp_path / "run"
    process = begin(call(recipe, shards, out, "steps=5000"), out, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    deadline = time.time() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.time() < deadline
        time.sleep(0.05)


def test_more_gpus_than_there_are(refused, recipe, shards, tmp_path):
    line = refused("train", recipe, "--set", f"data.train={shards}", "--out", tmp_path / "r", "--gpus", "64")
    assert "this machine has" in line
    line = refused("train", recipe, "--set", f"data.train={shards}", "--out", "r", "--gpus", "1", "--processes", "1")
    assert "say the same thing" in line


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (2, False)])
def test_the_slurm_script_puts_a_preempted_job_back(tmp_path, status, requeued):
    """With stand-ins for Slurm's commands and ours, which say what they were given."""
    scripts = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*" >> calls; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 exec "$@"',
        "clipkit": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $*" >> calls; exit {status}',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(["bash", SLURM, "tiny", "--set", "a=b c"], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "3 1 4 2 node7 train tiny --set a=b c --resume"
    assert calls[1:] == (["scontrol requeue 12"] if requeued else [])
