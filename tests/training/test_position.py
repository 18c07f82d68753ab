"""One sequence of samples, whoever reads it, wherever it was stopped, whatever is broken in the shards."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.data.shards import Shards, write_shard
from clipkit.images import Preprocess
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.batches.dataset import TrainSet
from clipkit.training.settings import DataConfig
from tests.distributed import run_two_ranks
from tests.samples import fake_tokens, png, tar_of

STEPS, BATCH = 18, 8
FORK = multiprocessing.get_context("fork")


def batches(spec, *, rank=0, world=1, workers=0, first=0, steps=STEPS, **settings):
    config = DataConfig(train=str(spec), workers=workers, **settings)
    made = Batches(open_train_data(config, 5), Preprocess(size=16), fake_tokens, config, 5)
    return train_batches(made, first_step=first, steps=steps, batch_size=BATCH, rank=rank, world_size=world)


def ids(spec, **how):
    return [batch["image_ids"].tolist() for batch in batches(spec, **how)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Seven shards of 1 to 13 samples."""
    folder = tmp_path_factory.mktemp("uneven")
    for number, size in enumerate((3, 1, 13, 2, 8, 1, 5)):
        write_shard(
            folder / f"{number}.tar",
            [(f"s{number}-{i}", {"png": png(16 * number + i), "txt": b"a"}) for i in range(size)],
        )
    return folder


def _ids_of_rank(rank, world, spec, workers):
    mine = torch.tensor(ids(spec, rank=rank, world=world, workers=workers))
    parts = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(parts, mine)
    return torch.cat(parts, dim=1)


class _OnBothRanks:
    def __init__(self, spec):
        self.spec = str(spec)

    def __call__(self, rank, world):
        return [_ids_of_rank(rank, world, self.spec, workers).tolist() for workers in (0, 1, 2)]


def test_processes_ranks_and_workers_see_one_sequence(uneven):
    """One process with 0, 1, 2 workers and two gloo ranks with 0, 1, 2 workers."""
    whole = ids(uneven)
    assert ids(uneven, workers=1) == ids(uneven, workers=2) == ids(uneven, threads=3) == whole
    assert ids(uneven, workers=3, threads=2) == whole
    for found in run_two_ranks(_OnBothRanks(uneven)):
        assert found == [whole] * 3
    flat = [number for step in whole for number in step]
    everything = set(flat[:33])
    assert len(everything) == 33
    for epoch in range(len(flat) // 33):
        assert set(flat[epoch * 33 : (epoch + 1) * 33]) == everything


def test_one_shard_over_two_ranks(uneven, tmp_path):
    shutil.copy(uneven / "2.tar", tmp_path)
    whole = ids(tmp_path)
    parts = [ids(tmp_path, rank=rank, world=2, workers=1) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert len({number for step in whole for number in step}) == 13


def _read_and_log(spec, log, rank, world, workers, first):
    """A run's rank: what it used goes to its log, step by step, until it is killed."""
    os.setpgrp()  # its workers go with it
    with Path(log).open("a") as handle:
        for step, batch in enumerate(batches(spec, rank=rank, world=world, workers=workers, first=first), first):
            handle.write(json.dumps([step, rank, batch["image_ids"].tolist()]) + "\n")
            handle.flush()


def killed_run(spec, log, world, workers, first, steps_before_the_kill):
    """Let all ranks read until they logged some steps, then SIGKILL them. Returns the step to resume from."""
    logs = [f"{log}-{rank}" for rank in range(world)]
    for path in logs:
        Path(path).unlink(missing_ok=True)
    ranks = [
        FORK.Process(target=_read_and_log, args=(spec, path, rank, world, workers, first))
        for rank, path in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    wanted = None if steps_before_the_kill is None else min(steps_before_the_kill, STEPS - first)

    def lines(path):
        return Path(path).read_text().count("\n") if Path(path).exists() else 0

    while any(process.is_alive() for process in ranks):
        if wanted is not None and all(lines(path) >= wanted for path in logs):
            break
        time.sleep(0.002)
    for process in ranks:
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
        process.join()
    steps: dict[int, dict[int, list[int]]] = {}
    for path in logs:
        for line in Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []:
            if line.endswith("\n"):
                step, rank, found = json.loads(line)
                steps.setdefault(step, {})[rank] = found
    # As a checkpoint would have it: the steps that every rank has finished.
    done = first
    while len(steps.get(done, {})) == world:
        done += 1
    return done, {s: [i for rank in range(world) for i in steps[s][rank]] for s in range(first, done)}


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 4]), st.integers(0, 2)),
        min_size=2,
        max_size=3,
    )
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_and_resumed_on_other_ranks_and_workers_the_log_is_the_undisturbed_one(uneven, tmp_path, lives):
    whole = ids(uneven)
    step, log = 0, {}
    for kill_after, world, workers in lives:
        step, used = killed_run(uneven, tmp_path / "log", world, workers, step, kill_after)
        log |= used
    step, used = killed_run(uneven, tmp_path / "log", 1, 1, step, None)
    log |= used
    assert step == STEPS
    assert [log[number] for number in range(STEPS)] == whole


def broken_set(folder):
    """Shards with everything that goes wrong; returns the keys that are good, and those that are named."""
    good = {f"good{i:02d}": {"png": png(i), "txt": b"fine"} for i in range(20)}
    bad = {
        "zero": {"jpg": b"", "txt": b"a"},
        "truncated": {"png": png()[:-30], "txt": b"a"},
        "bomb": {"png": _bomb(), "txt": b"a"},
        "latin": {"png": png(), "txt": b"caf\xe9"},
        "alone": {"png": png()},
        "blind": {"txt": b"a"},
        "json": {"png": png(), "json": b"{"},
        "mute": {"png": png(), "txt": b"  "},
    }
    write_shard(folder / "0.tar", [*list(good.items())[:12], *bad.items()])
    (folder / "1.tar").write_bytes(b"")
    tar_of(folder / "2.tar", {})
    write_shard(folder / "3.tar", list(good.items())[12:16])
    cut = (folder / "3.tar").read_bytes()
    (folder / "3.tar").write_bytes(cut[: 512 * 13 + 100])  # inside the 4th sample
    (folder / "3.idx.arrow").unlink()
    tar_of(
        folder / "4.tar",
        [
            ("twice.png", png(77)),
            ("twice.txt", b"first"),
            ("good16.png", png(16)),
            ("good16.txt", b"fine"),
            ("twice.png", png(78)),
            ("twice.txt", b"second"),
            ("no-extension", b"?"),
        ],
    )
    return bad


def _bomb():
    """A PNG of a few kB that claims 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_everything_that_goes_wrong_at_once(tmp_path, capsys):
    bad = broken_set(tmp_path)
    usable = len(Shards.open(str(tmp_path)))
    found = list(batches(tmp_path, steps=40, max_bad_share=0.5, workers=2))
    assert "1.tar is empty" in capsys.readouterr().err
    data = open_train_data(DataConfig(train=str(tmp_path), max_bad_share=0.5), 5)
    assert isinstance(data, TrainSet)
    assert data.size is not None
    drawn = Counter(number for batch in found for number in batch["image_ids"].tolist())
    named = {line["key"] for line in data.left_out} | {line["key"] for batch in found for line in batch["left_out"]}
    by_key = {data.name(r)[1]: data.image_id(r) for r in data.first(range(data.size))}
    good = {key for key in by_key if key.startswith(("good", "twice"))}
    assert {"good00", "good11", "good12", "good13", "good16", "twice"} <= good
    assert {key for key in by_key if by_key[key] in drawn} == good, "every good sample, and nothing else"
    assert set(bad) <= named
    assert "twice" in named, "the second of two is named"
    assert usable == data.size + len(data.excluded[0])
    assert all(len(batch["pixels"]) == BATCH for batch in found)
    again = ids(tmp_path, steps=40, max_bad_share=0.5)
    assert again == [batch["image_ids"].tolist() for batch in found]
    parts = [ids(tmp_path, steps=40, max_bad_share=0.5, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == again


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_stalls_is_given_up_with_the_name_of_its_shard(uneven, monkeypatch, workers):
    read = Shards.read

    def stalls(self, i, *extensions):
        if self.tar_of(i).name == "4.tar":
            time.sleep(3600)
        return read(self, i, *extensions)

    monkeypatch.setattr(Shards, "read", stalls)
    began = time.monotonic()
    with pytest.raises(ClipkitError, match=r"4\.tar has not given sample 's4-\d' for 0\.5 s"):
        ids(uneven, timeout=0.5, workers=workers)
    assert time.monotonic() - began < 20


def test_a_worker_that_is_killed_stops_the_run_with_one_line(uneven):
    reading = batches(uneven, workers=1, steps=100_000)
    next(reading)
    for child in multiprocessing.active_children():  # the workers, and not multiprocessing's own helpers
        child.kill()
    with pytest.raises(ClipkitError, match="a loader process is gone or stuck"):
        for _ in reading:
            pass


def test_threads_end_with_the_iterator(uneven):
    import threading

    before = threading.active_count()
    reading = batches(uneven, steps=1000)
    next(reading)
    reading.close()
    deadline = time.monotonic() + 5
    while any(t.name == "clipkit-batches" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(t.name == "clipkit-batches" for t in threading.enumerate())
    del reading
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_an_exit_in_the_middle_is_an_exit(uneven):
    """The interpreter must not end while loader threads are inside torch, which aborts the process."""
    script = f"""
import sys, torch
from clipkit.training.settings import DataConfig
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.images import Preprocess
config = DataConfig(train={str(uneven)!r}, workers=0, threads=3)
made = Batches(open_train_data(config, 0), Preprocess(size=64), lambda t: torch.zeros(len(t), 4), config, 0)
batches = train_batches(made, first_step=0, steps=10**6, batch_size=64)
next(batches)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
