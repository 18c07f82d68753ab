"""Training from pipes: in order, resumed by passing over, never hanging."""

import numpy as np
import pytest

from clipkit.core import ClipkitError
from clipkit.data.shards import Shards, write_shard
from clipkit.data.sources import sample_id
from clipkit.images import Preprocess
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.batches.pipe import StreamSet
from clipkit.training.settings import DataConfig
from tests.samples import fake_tokens, png, tar_of


def flat(steps):
    return [number for step in steps for number in step]


def ids(spec, *, first=0, steps=6, rank=0, world=1, workers=0, **settings):
    config = DataConfig(train=spec, workers=workers, **settings)
    made = Batches(open_train_data(config, 3, is_main=rank == 0), Preprocess(size=24), fake_tokens, config, 3)
    found = list(train_batches(made, first_step=first, steps=steps, batch_size=16, rank=rank, world_size=world))
    return [batch["image_ids"].tolist() for batch in found], [line for batch in found for line in batch["left_out"]]


@pytest.fixture
def piped(shards):
    return f"pipe:cat {shards}/{{000000..000003}}.tar"


def test_a_pipe_is_read_in_order_epoch_after_epoch(piped, shards):
    local = Shards.open(str(shards))
    expected = [sample_id(local.key(i)) for i in range(48)] * 2
    found, left_out = ids(piped)
    assert flat(found) == expected
    assert left_out == []


def test_ranks_divide_a_pipe_and_a_resumed_run_passes_over_what_was_used(piped):
    whole, _ = ids(piped)
    parts = [ids(piped, rank=rank, world=2, workers=2)[0] for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert ids(piped, first=4)[0] == whole[4:]


@pytest.mark.parametrize("window", [5, 24, 500])
def test_a_window_shuffles_blocks_alike_on_every_rank(piped, window):
    plain = flat(ids(piped)[0])
    whole, _ = ids(piped, window=window)
    shuffled = flat(whole)
    assert shuffled != plain
    if window == 24:
        assert [sorted(shuffled[i : i + 24]) for i in range(0, 96, 24)] == [
            sorted(plain[i : i + 24]) for i in range(0, 96, 24)
        ]
    assert ids(piped, window=window, first=3)[0] == whole[3:]
    parts = [ids(piped, window=window, rank=rank, world=2)[0] for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_what_cannot_be_used_is_replaced_or_passed_over_and_named_once(tmp_path):
    samples = [(f"good{i}", {"png": png(i), "txt": b"a"}) for i in range(12)]
    bad = [("cut", {"png": png()[:60], "txt": b"a"}), ("mute", {"png": png()}), ("blind", {"txt": b"a"})]
    write_shard(tmp_path / "0.tar", samples[:4] + bad + samples[4:])
    spec = f"pipe:cat {tmp_path}/0.tar"
    whole, ledger = ids(spec, steps=4)
    assert all(len(step) == 16 for step in whole)
    assert set(flat(whole)) == {sample_id(key) for key, _ in samples}
    assert sorted({line["key"] for line in ledger}) == ["blind", "cut", "mute"]
    assert sum(line["key"] == "mute" for line in ledger) == 1
    parts = [ids(spec, steps=4, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)] == whole
    with pytest.raises(ClipkitError, match="mute: the sample has no caption; mend it, or set data.missing=skip"):
        ids(spec, steps=1, missing="stop")


def test_a_stream_that_is_cut_gives_what_came(shards, tmp_path):
    (tmp_path / "cut.tar").write_bytes((shards / "000000.tar").read_bytes()[:30_000])
    found, ledger = ids(f"pipe:cat {tmp_path}/cut.tar", steps=2)
    assert 0 < len(set(flat(found))) < 13
    assert "cut or broken" in ledger[0]["reason"]


def test_a_pipe_that_sleeps_fails_with_its_name(shards):
    with pytest.raises(ClipkitError, match=r"pipe:sleep 60.* has not answered for 0\.3 s"):
        ids("pipe:sleep 60", timeout=0.3)
    with pytest.raises(ClipkitError, match=r"has not answered for 0\.3 s"):
        ids(f"pipe:head -c 40000 {shards}/000000.tar; sleep 60", timeout=0.3)


def test_a_command_that_fails_stops_the_run(shards):
    with pytest.raises(ClipkitError, match="ended with status 3"):
        ids(f"pipe:cat {shards}/000000.tar; exit 3")
    with pytest.raises(ClipkitError, match="none has an image and a caption"):
        ids("pipe:true")


def test_a_pipe_is_not_mixed_and_has_no_epochs(shards, piped):
    with pytest.raises(ClipkitError, match="a pipe is read in order and cannot be mixed"):
        open_train_data(DataConfig(train=[{"shards": piped}, {"shards": str(shards)}]), 0)
    data = StreamSet(piped, 0)
    assert data.size is None
    data.first([300])
    with pytest.raises(ClipkitError, match="cannot be read backwards"):
        data.first([0])


def test_members_out_of_order_make_samples_of_their_own(tmp_path):
    tar_of(tmp_path / "a.tar", {"a.png": png(), "b.png": png(), "b.txt": b"b", "a.txt": b"a"})
    data = StreamSet(f"pipe:cat {tmp_path}/a.tar", 0)
    assert {data.name(r)[1] for r in data.first(np.arange(4).tolist())} == {"b"}
    assert [line["key"] for line in data.drain()] == ["a", "a"]


def test_a_resumed_pipe_tells_nothing_twice(run, recipe, tmp_path):
    samples = [(f"good{i}", {"png": png(i), "txt": b"a"}) for i in range(40)]
    write_shard(tmp_path / "0.tar", [*samples[:5], ("mute", {"png": png()}), *samples[5:]])
    call = ["train", recipe, "--set", f"data.train=pipe:cat {tmp_path}/0.tar", "--out", tmp_path / "run", "--resume"]
    assert run(*call, "--set", "steps=2").status == 1
    assert run(*call, "--set", "steps=4").status == 1
    assert (tmp_path / "run" / "ledger.jsonl").read_text().count("mute") == 1
