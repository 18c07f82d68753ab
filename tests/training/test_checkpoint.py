"""Checkpoints: bit-equal round trips on any ranks, never half of one, damage named, full disks survived."""

import copy
import functools
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from clipkit.core import ClipkitError
from clipkit.models import best_checkpoint, checkpoints, load_model
from clipkit.models.model_spec import model_folder
from clipkit.training import Run, Saver, checkpoint, newest_usable
from clipkit.training.checkpoint import TrainedTensors, checkpoint_bytes, load_checkpoint, take_snapshot
from clipkit.training.optim import parameter_groups
from clipkit.training.settings import TrainConfig
from tests.conftest import TINY_VIT, tiny_model
from tests.distributed import run_two_ranks


@functools.cache
def untrained(changes):
    # Of few words: else nearly all of it were their embeddings.
    return tiny_model(**{"text_cfg": {**TINY_VIT["text_cfg"], "vocab_size": 64}, **json.loads(changes)}).train()


def fresh_model(seed, changes):
    """As `tiny_model`, without making its tokenizer again."""
    model = untrained(json.dumps(changes))
    model = copy.deepcopy(model, {id(model.tokenizer): model.tokenizer})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


class Training:
    """The least loop that has everything a checkpoint holds: noise from the generator stands for the data."""

    def __init__(self, seed=0, *, muon=False, ema=False, shard=False, **changes):
        self.model = fresh_model(seed, changes)
        self.optimizers = []
        if shard:
            self.model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
            scalars = {p for p in self.model.parameters() if p.ndim == 0}
            fully_shard(self.model, ignored_params=scalars)
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        groups = parameter_groups(self.model.named_parameters(), 0.1)
        if muon:
            square = [p for p in self.model.parameters() if p.ndim == 2]
            self.optimizers.append(torch.optim.Muon(square, lr=1e-3))
            rest = {id(p) for p in square}
            groups = [{**g, "params": [p for p in g["params"] if id(p) not in rest]} for g in groups]
        self.optimizers.append(torch.optim.AdamW(groups, lr=1e-3, fused=True))
        self.average = {n: t.detach().clone() for n, t in self.model.state_dict().items()} if ema else None
        self.step = 0

    def train(self, steps):
        for _ in range(steps):
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape)  # the same on every rank
                grad = torch.empty_like(parameter, requires_grad=False)
                checkpoint._put(noise, grad)
                parameter.grad = grad
            for optimizer in self.optimizers:
                optimizer.step()
            for name, tensor in (self.average or {}).items():
                now = self.model.state_dict()[name]
                tensor.lerp_(now, 0.1) if tensor.is_floating_point() else tensor.copy_(now)
            self.step += 1
        return self

    def snapshot(self, is_main=True, spare=None):
        state = {"step": self.step, "samples": 16 * self.step, "phases": (1, 2), "seen": {10: "a", 9: "b"}}
        return take_snapshot(self.tensors(), state, is_main=is_main, spare=spare)

    def load(self, folder, rank=0):
        self.state = load_checkpoint(folder, self.tensors(), rank)
        self.step = self.state["step"]
        return self

    def tensors(self):
        average = None if self.average is None else self.average.items()
        return TrainedTensors(self.model.state_dict().items(), self.optimizers, self.names, average)

    def facts(self):
        """Everything, whole, to be compared."""
        snapshot = self.snapshot()
        parts = {"weights": snapshot.weights, "optimizer": snapshot.optimizer, "average": snapshot.average or {}}
        return {f"{part}:{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def save(training, run, *, keep=2, **how):
    saver = Saver(run, training.model, keep=keep)
    saver.save(training.snapshot(), **how)
    saver.wait(final=True)
    return checkpoints(run)[-1]


def names(run):
    return [folder.name for folder in checkpoints(run)]


KINDS = {
    "adamw": {},
    "muon, average, bias": {"muon": True, "ema": True, "init_logit_bias": -10.0},
    "convolutions": {
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32},
        "ema": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path, kind):
    torch.manual_seed(7)
    whole = Training(**KINDS[kind]).train(3)
    folder = save(whole, tmp_path)
    facts = whole.facts()
    resumed = Training(seed=1, **KINDS[kind])
    torch.manual_seed(1)
    resumed.load(folder)
    assert_equal(resumed.facts(), facts)
    for parameter in resumed.model.parameters():
        for optimizer in resumed.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step":
                    assert value.stride() == parameter.stride()
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_it_goes_on_as_if_nothing_had_been(tmp_path):
    kind = KINDS["convolutions"]
    stopped, undisturbed, resumed = Training(**kind), Training(**kind), Training(seed=1, **kind)
    torch.manual_seed(7)
    folder = save(stopped.train(3), tmp_path)
    resumed.load(folder).train(2)
    torch.manual_seed(7)
    assert_equal(resumed.facts(), undisturbed.train(5).facts())


def test_what_is_in_it(tmp_path):
    training = Training(ema=True).train(2)
    folder = save(training, tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-000002"
    assert {path.name for path in folder.iterdir()} == {
        "model",
        "weights.safetensors",
        "optimizer.safetensors",
        "rng-00.safetensors",
        "state.json",
    }
    published = load_file(folder / "model" / "model.safetensors")
    for name, tensor in training.average.items():
        assert torch.equal(published[name.removeprefix("backbone.")], tensor)
    loaded = load_model(f"{tmp_path}@step-2")
    assert loaded.fingerprint() == training.model.fingerprint(training.average) != training.model.fingerprint()
    about = json.loads((folder / "model" / "clipkit.json").read_text())
    assert about["fingerprint"] == loaded.fingerprint()
    assert about["logit_scale"] == float(training.average["backbone.logit_scale"].exp())
    state = {"step": 2, "samples": 32, "phases": [1, 2], "seen": {"10": "a", "9": "b"}}
    assert training.load(folder).state == state
    plain = save(Training().train(1), tmp_path / "plain")
    assert not (plain / "weights.safetensors").exists()


def test_an_average_begins_where_a_run_without_one_stood(tmp_path):
    before = Training().train(1)
    folder = save(before, tmp_path)
    after = Training(seed=1, ema=True).load(folder)
    assert_equal(after.average, dict(before.model.state_dict()))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_masters_of_a_hugging_face_model_in_bf16_are_saved_whole(tmp_path, kind):
    from tests.models.test_towers import hugging_face_folder

    model = load_model(hugging_face_folder(tmp_path / "hf", kind))
    masters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.fingerprint()
    model.bfloat16()
    saver = Saver(tmp_path, model, keep=1)
    saver.save(take_snapshot(TrainedTensors(masters.items(), [], {}), {"step": 1}, is_main=True))
    saver.wait(final=True)
    loaded = load_model(f"{tmp_path}@step-1")
    assert loaded.fingerprint() == expected != model.fingerprint()
    for tensor in masters.values():
        tensor.zero_()
    load_checkpoint(checkpoints(tmp_path)[0], TrainedTensors(masters.items(), [], {}), 0)
    assert_equal(masters, dict(loaded.state_dict()))


def test_saving_returns_before_the_disk_is_done_and_keeps_what_was_then(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpoint._write_files

    def slowly(*args):
        assert go.wait(30)
        write(*args)

    monkeypatch.setattr(checkpoint, "_write_files", slowly)
    training = Training(ema=True).train(1)
    facts, rng = training.facts(), torch.get_rng_state()
    saver = Saver(tmp_path, training.model, keep=2)
    saver.save(training.snapshot())
    training.train(2)
    assert names(tmp_path) == []
    go.set()
    saver.wait()
    assert names(tmp_path) == ["step-000001"]
    resumed = Training(seed=1, ema=True).load(checkpoints(tmp_path)[0])
    assert torch.equal(torch.get_rng_state(), rng)
    assert_equal(resumed.facts(), facts)


def test_memory_is_used_again_once_it_is_written(tmp_path):
    training = Training(ema=True).train(1)
    saver = Saver(tmp_path, training.model, keep=2)
    assert saver.spare() is None
    first = training.snapshot()
    saver.save(first)
    saver.wait()
    training.train(1)
    facts = training.facts()
    second = training.snapshot(spare=saver.spare())
    assert saver.spare() is None
    assert second.weights["backbone.visual.proj"] is first.weights["backbone.visual.proj"]
    saver.save(second)
    saver.wait(final=True)
    assert_equal(Training(ema=True).load(checkpoints(tmp_path)[1]).facts(), facts)


def test_a_snapshot_of_other_weights_is_refused_at_once(tmp_path):
    training = Training().train(1)
    saver = Saver(tmp_path, training.model, keep=2)
    snapshot = training.snapshot()
    del snapshot.weights["backbone.logit_scale"]
    with pytest.raises(ValueError, match="other weights: .*logit_scale"):
        saver.save(snapshot)


def test_the_last_and_the_best_stay(tmp_path, capsys):
    training = Training()
    saver = Saver(tmp_path, training.model, keep=2)
    with pytest.raises(ClipkitError, match="kept no best checkpoint .*it has none"):
        model_folder(f"{tmp_path}@best")
    fingerprints = {}
    for step in range(1, 6):
        saver.save(training.train(1).snapshot(), best=step in (1, 2), score=step / 10)
        saver.wait()
        fingerprints[step] = training.model.fingerprint()
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    assert best_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "step-000002", 0.2)
    assert load_model(f"{tmp_path}@best").fingerprint() == fingerprints[2]
    with pytest.raises(ClipkitError, match="no checkpoint 'bst'.*did you mean 'best'.*step-000002, step-000004"):
        model_folder(f"{tmp_path}@bst")
    # The run goes back behind step 4 and on: what lies ahead is no longer its future.
    older = Training().load(checkpoints(tmp_path)[0])
    save(older.train(1), tmp_path, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    assert capsys.readouterr().err == ""


def test_the_same_step_again_replaces_it(tmp_path):
    save(Training().train(1), tmp_path)
    other = Training(seed=3).train(1)
    save(other, tmp_path)
    assert load_model(f"{tmp_path}@step-1").fingerprint() == other.model.fingerprint()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (cut, "optimizer.safetensors", "has 100 bytes, but"),
        (flip, "model/model.safetensors", "was altered"),
        (flip, "rng-00.safetensors", "was altered"),
        (Path.unlink, "weights.safetensors", "is missing"),
        (Path.unlink, "state.json", "cannot read"),
        (cut, "state.json", "not valid JSON"),
        (lambda p: p.write_text(p.read_text().replace('"samples": 32', '"samples": 33')), "state.json", "was altered"),
        (lambda p: p.write_text("[]"), "state.json", "is no checkpoint's state"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_taken(tmp_path, capsys, damage, name, said):
    training = Training(ema=True)
    first, second = (save(training.train(1), tmp_path, best=True, score=0.5) for _ in range(2))
    assert newest_usable(tmp_path) == second
    assert capsys.readouterr().err == ""
    damage(second / name)
    assert newest_usable(tmp_path) == first
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(second / name) in line
    assert said in line
    assert "trying step-000001 instead" in line
    damage(first / name) if name != "state.json" else (first / name).unlink()
    assert newest_usable(tmp_path) is None
    assert f"{tmp_path} has no other checkpoint" in capsys.readouterr().err
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_there_is_none(tmp_path, capsys):
    assert newest_usable(tmp_path) is None
    assert capsys.readouterr().err == ""


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = save(Training().train(1), tmp_path)
    with pytest.raises(ClipkitError, match="lacks backbone.logit_bias; it is of another model"):
        Training(init_logit_bias=-10.0).load(folder)
    with pytest.raises(ClipkitError, match=r"has backbone\.\S+ as \[.*\], the model as \["):
        Training(embed_dim=16).load(folder)
    few = Training()
    few.optimizers[0].param_groups.pop()
    with pytest.raises(ClipkitError, match="has state for backbone.*, which is not trained here"):
        few.load(folder)
    (folder / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(ClipkitError, match="step-000001/optimizer.safetensors is broken .*; remove its checkpoint"):
        Training().load(folder)


def test_a_finished_run_publishes_the_weights_it_is_given(tmp_path):
    training = Training(ema=True).train(2)
    run = Run(tmp_path, TrainConfig(model="open_clip:ViT-B-32"), is_main=True)
    manifest = run.finish(training.model, {"step": 2, "samples": 32}, training.average)
    assert load_model(tmp_path).fingerprint() == manifest["model"]["fingerprint"]
    assert manifest["model"]["fingerprint"] == training.model.fingerprint(training.average)
    assert newest_usable(tmp_path) is None
    saved = save(training, tmp_path)
    assert newest_usable(tmp_path) == saved


def test_the_estimate_is_what_it_takes(tmp_path):
    for kind in KINDS.values():
        training = Training(**kind)
        expected = checkpoint_bytes(training.model, training.optimizers, average=training.average is not None)
        taken = training.train(1).snapshot().nbytes
        assert taken == pytest.approx(expected, rel=0.01)
        folder = save(training, tmp_path)
        on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert taken < on_disk < 1.1 * taken + 2_000_000


def _sharded(folder, rank, world_size):
    """Two ranks take up what one saved unsharded, save that again, go on and save that; each tells its generator."""
    training = Training(seed=1 + rank, ema=True, shard=True)
    assert isinstance(training.model.state_dict()["backbone.text_projection"], DTensor)
    torch.manual_seed(100 + rank)
    training.load(folder / "one" / "checkpoints" / "step-000002", rank)
    alone = torch.get_rng_state()
    saver = Saver(folder / "two", training.model, keep=2) if rank == 0 else None

    def save_both():
        snapshot = training.snapshot(is_main=rank == 0)
        assert (snapshot is None) == (rank == 1)
        if saver:
            saver.save(snapshot)
            saver.wait(final=True)
        torch.distributed.barrier()

    save_both()
    torch.manual_seed(0)  # the gradients of both ranks are the same
    training.train(1)
    torch.manual_seed(100 + rank)
    before = torch.get_rng_state()
    save_both()
    torch.manual_seed(200 + rank)
    training.load(folder / "two" / "checkpoints" / "step-000003", rank)
    assert torch.equal(torch.get_rng_state(), before)
    return alone


def test_one_rank_two_sharded_ranks_and_one_again(tmp_path):
    torch.manual_seed(7)
    alone = Training(ema=True).train(2)
    one = save(alone, tmp_path / "one")
    state_of_rank_0, state_of_rank_1 = run_two_ranks(functools.partial(_sharded, tmp_path))
    assert torch.equal(state_of_rank_0, load_file(one / "rng-00.safetensors")["cpu"])
    assert torch.equal(state_of_rank_1, torch.Generator().manual_seed(101).get_state())
    two, further = checkpoints(tmp_path / "two")
    for name in ("weights.safetensors", "optimizer.safetensors", "model/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (further / "rng-01.safetensors").exists()
    resumed = Training(seed=1, ema=True).load(further)
    torch.manual_seed(0)
    expected = alone.train(1).facts()
    for name, tensor in resumed.facts().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
