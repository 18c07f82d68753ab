"""What is trained on: several sets, captions, policies, what is known to be unusable, remote shards."""

import functools
import http.server
import json
import threading
from collections import Counter

import numpy as np
import pytest

from clipkit.core import BadSample, ClipkitError
from clipkit.data.shards import Shards, write_shard
from clipkit.data.sources import sample_id
from clipkit.images import Preprocess
from clipkit.training.batches import Batches, describe, open_train_data, train_batches
from clipkit.training.batches.dataset import TrainSet, pick
from clipkit.training.settings import DataConfig
from tests.samples import fake_tokens, png


def make(path, names, text=b"a caption"):
    write_shard(path, [(name, {"png": png(i), "txt": text}) for i, name in enumerate(names)])


def names(data, positions):
    return [data.name(reference)[1] for reference in data.first(positions)]


def read_all(config, *, steps, batch=8, first=0, seed=0):
    made = Batches(open_train_data(config, seed), Preprocess(size=16), fake_tokens, config, seed)
    return list(train_batches(made, first_step=first, steps=steps, batch_size=batch))


@pytest.fixture
def two_sets(tmp_path):
    make(tmp_path / "a" / "0.tar", [f"a{i}" for i in range(7)])
    make(tmp_path / "a" / "1.tar", [f"a{i}" for i in range(7, 12)])
    make(tmp_path / "b" / "0.tar", [f"b{i}" for i in range(5)])
    return tmp_path


def test_several_sets_together_make_one_epoch(two_sets):
    parts = [{"shards": str(two_sets / "a")}, {"shards": str(two_sets / "b")}]
    data = open_train_data(DataConfig(train=parts), 0)
    assert data.size == 17
    everything = {f"a{i}" for i in range(12)} | {f"b{i}" for i in range(5)}
    assert set(names(data, range(17))) == everything
    assert set(names(data, range(17, 34))) == everything
    assert names(data, range(17)) != names(data, range(17, 34))


def test_weights_decide_the_shares_and_each_set_keeps_its_own_epochs(two_sets):
    parts = [{"shards": str(two_sets / "a"), "weight": 1}, {"shards": str(two_sets / "b"), "weight": 3}]
    data = open_train_data(DataConfig(train=parts), 0)
    drawn = names(data, range(4096))
    count = Counter(name[0] for name in drawn)
    assert count == {"a": 1024, "b": 3072}
    from_b = [name for name in drawn if name[0] == "b"]
    assert all(len(set(from_b[i : i + 5])) == 5 for i in range(0, 3000, 5))
    reference = data.first([11])[0]
    for draw in range(20):
        stand_in = data.other(reference, np.random.default_rng(draw))
        assert data.name(stand_in)[1][0] == data.name(reference)[1][0]


def test_equal_keys_in_two_sets_are_two_samples(tmp_path):
    for name in "ab":
        make(tmp_path / name / "0.tar", ["x", "y"])
    data = open_train_data(DataConfig(train=[{"shards": str(tmp_path / name)} for name in "ab"]), 0)
    assert len({data.image_id(reference) for reference in data.first(range(4))}) == 4


def test_weights_are_for_all_or_none(two_sets, refused, recipe):
    parts = json.dumps([{"shards": str(two_sets / "a"), "weight": 1}, {"shards": str(two_sets / "b")}])
    line = refused("train", recipe, "--set", f"data.train={parts}", "--out", two_sets / "run")
    assert "give every part of train a weight, or none of them" in line


def test_replacement_repeats_samples_within_an_epochs_length(two_sets):
    data = open_train_data(DataConfig(train=str(two_sets / "a"), replacement=True), 0)
    assert any(len(set(names(data, range(e * 12, e * 12 + 12)))) < 12 for e in range(5))


def members(captions, **columns):
    return {"png": b"image", "json": json.dumps({"captions": captions, **columns}).encode()}


def test_one_of_several_captions_by_chance_first_or_weight():
    sample = members(["one", "two", "three"], liked=[1, 0, 3])

    def texts(**config):
        return Counter(pick(sample, DataConfig(**config), np.random.default_rng(i))[1] for i in range(400))

    assert set(texts()) == {"one", "two", "three"}
    assert texts(caption="first") == {"one": 400}
    weighted = texts(caption_weights="liked")
    assert set(weighted) == {"one", "three"}
    assert weighted["three"] / 400 == pytest.approx(0.75, abs=0.08)
    for bad in ({"liked": [1, 2]}, {"liked": [0, 0, 0]}, {"liked": "x"}, {}):
        with pytest.raises(BadSample, match=r"column 'liked' must hold a number per caption \(3\)"):
            pick(members(["one", "two", "three"], **bad), DataConfig(caption_weights="liked"), np.random.default_rng(0))


def test_templates_take_the_caption_and_other_columns():
    config = DataConfig(templates=["a photo of {caption}", "{caption}, {group}"])
    drawn = {pick(members(["a cat"], group="animals"), config, np.random.default_rng(i))[1] for i in range(20)}
    assert drawn == {"a photo of a cat", "a cat, animals"}
    with pytest.raises(BadSample, match="asks for column 'group', which the sample lacks"):
        pick(members(["a cat"]), DataConfig(templates=["{group}"]), np.random.default_rng(0))


def test_samples_without_image_or_caption_are_left_out_or_stop(tmp_path):
    write_shard(
        tmp_path / "0.tar",
        [
            *[(f"good{i}", {"png": png(i), "txt": b"a"}) for i in range(30)],
            ("mute", {"png": png()}),
            ("blind", {"txt": b"a"}),
        ],
    )
    data = open_train_data(DataConfig(train=str(tmp_path)), 0)
    assert data.size == 30
    assert not {"mute", "blind"} & set(names(data, range(90)))
    with pytest.raises(ClipkitError, match=r"0\.tar: mute: the sample has no caption; mend it, or set data\.missing"):
        open_train_data(DataConfig(train=str(tmp_path), missing="stop"), 0)
    with pytest.raises(ClipkitError, match=r"2 of 32 samples .* more than data\.max_bad_share=0\.05 allows"):
        open_train_data(DataConfig(train=str(tmp_path), max_bad_share=0.05), 0)


def test_what_a_check_found_is_left_out_and_a_later_check_changes_nothing(tmp_path):
    make(tmp_path / "0.tar", [f"k{i}" for i in range(20)])
    make(tmp_path / "1.tar", [f"m{i}" for i in range(10)])
    config = DataConfig(train=str(tmp_path))
    before = open_train_data(config, 0)
    Shards.open(str(tmp_path)).keep_defects(0, {"k3": "cannot be decoded", "k19": "the file is empty"})
    data = open_train_data(config, 0)
    assert data.size == 28
    assert set(names(data, range(28))) == {f"k{i}" for i in range(19) if i != 3} | {f"m{i}" for i in range(10)}
    assert [line["key"] for line in data.left_out] == ["k3", "k19"]
    pinned = open_train_data(config, 0, excluded=before.excluded)
    assert names(pinned, range(60)) == names(before, range(60))
    assert pinned.identity() == before.identity() != data.identity()
    make(tmp_path / "0.tar", [f"k{i}" for i in range(21)])  # written anew: what was found no longer counts
    assert open_train_data(config, 0).size == 31


def test_a_run_keeps_its_plan_when_the_shards_are_checked_meanwhile(run, recipe, pictures, tmp_path):
    from clipkit.data import PackOptions, pack
    from clipkit.data.sources import open_source

    pack(open_source(pictures), tmp_path / "s", PackOptions(shard_samples=13))
    call = ["train", recipe, "--set", f"data.train={tmp_path / 's'}", "--out", tmp_path / "run", "--resume"]
    assert run(*call, "--set", "steps=2").status == 0
    shards = Shards.open(str(tmp_path / "s"))
    shards.keep_defects(0, {shards.key(0): "found later"})
    assert run(*call, "--set", "steps=3").status == 0
    assert run(*call[:-3], "--out", tmp_path / "new", "--set", "steps=1").status == 1
    assert "found later" in (tmp_path / "new" / "ledger.jsonl").read_text()


def test_a_run_stops_where_too_much_is_unusable(run, recipe, tmp_path):
    pictures = [(f"k{i}", {"png": png(i) if i % 4 else b"", "txt": b"a"}) for i in range(40)]
    write_shard(tmp_path / "s" / "0.tar", pictures)
    call = ["train", recipe, "--set", f"data.train={tmp_path / 's'}", "--set", "steps=200", "--out", tmp_path / "run"]
    result = run(*call, "--set", "data.max_bad_share=0.02")
    assert result.status == 2
    assert "could not be used, more than data.max_bad_share=0.02 allows" in result.err


class _Quiet(http.server.SimpleHTTPRequestHandler):
    requests: Counter

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.requests[self.path] += 1
        super().do_GET()


@pytest.fixture
def web(shards, monkeypatch, tmp_path):
    """The shards behind a web server, and a count of what is asked of it."""
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    requests = Counter()
    handler = type("Handler", (_Quiet,), {"requests": requests})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{{000000..000003}}.tar", requests
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_shuffled_in_a_window_and_fetched_once(web, shards, workers):
    url, requests = web
    config = DataConfig(train=url, workers=workers, window=20)
    data = open_train_data(config, 0)
    assert describe(data, 100) == "48 samples shuffled in windows of 20, 2 epochs and 4 samples of them"
    assert not any(path.endswith(".tar") for path in requests), "the sidecars tell all that the plan needs"
    local = open_train_data(DataConfig(train=str(shards), window=20), 0)
    assert names(data, range(100)) == names(local, range(100))
    far = [batch["image_ids"].tolist() for batch in read_all(config, steps=12)]
    near = read_all(DataConfig(train=str(shards), window=20, workers=0), steps=12)
    assert far == [batch["image_ids"].tolist() for batch in near]
    assert {path: n for path, n in requests.items() if path.endswith(".tar")} == {f"/00000{i}.tar": 1 for i in range(4)}


def test_remote_shards_have_a_window_by_themselves(web):
    assert open_train_data(DataConfig(train=web[0]), 0).window == 65_536


def test_the_spool_keeps_to_its_limit(web, shards):
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    remote = Shards.open(web[0], cache_bytes=size)
    for i in range(len(remote)):
        assert remote[i] == Shards.open(str(shards))[i]
    assert remote.spool is not None
    assert len(list(remote.spool.folder.glob("*.tar"))) <= 2


def test_remote_shards_without_sidecars_are_indexed_once(shards, web, monkeypatch):
    url, requests = web
    hidden = []
    for sidecar in shards.glob("*.idx.arrow"):
        hidden.append((sidecar, sidecar.read_bytes()))
        sidecar.unlink()
    try:
        assert len(Shards.open(url)) == 48
        before = sum(requests.values())
        assert len(Shards.open(url)) == 48
        assert not any(path.endswith(".tar") for path in list(requests)[before:])
    finally:
        for sidecar, data in hidden:
            sidecar.write_bytes(data)


def test_a_remote_shard_that_is_gone_is_named(web):
    with pytest.raises(ClipkitError, match=r"000007\.tar: there is no such shard, or it cannot be reached"):
        Shards.open(web[0].replace("{000000..000003}", "000007"))


def test_ids_are_those_of_the_source(shards):
    data = open_train_data(DataConfig(train=str(shards)), 0)
    assert isinstance(data, TrainSet)
    local = Shards.open(str(shards))
    assert {data.image_id(r) for r in data.first(range(48))} == {sample_id(local.key(i)) for i in range(48)}


def test_a_disk_that_fails_ends_the_run_and_costs_no_sample(two_sets, monkeypatch):
    read = Shards._read

    def fails(self, path, i, wanted):
        if path.name == "1.tar":
            raise ClipkitError(f"cannot read {path}: Input/output error")
        return read(self, path, i, wanted)

    monkeypatch.setattr(Shards, "_read", fails)
    for workers in (0, 1):
        config = DataConfig(train=str(two_sets / "a"), workers=workers)
        with pytest.raises(ClipkitError, match=r"1\.tar: Input/output error"):
            read_all(config, steps=10)


def test_a_spool_fetches_again_what_was_removed_under_its_reader(web, shards, monkeypatch):
    remote = Shards.open(web[0])
    local, removed = Shards.local, []

    def removes(self, number):
        path = local(self, number)
        if len(removed) < 2:
            removed.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(Shards, "local", removes)
    assert remote[0] == Shards.open(str(shards))[0]
    assert len(removed) == 2


def test_the_cache_is_bounded_over_all_sets_in_it(web, shards, tmp_path):
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    for number in range(4):
        Shards.open(web[0].replace("{000000..000003}", f"00000{number}"), cache_bytes=size)[0]
    assert len(list((tmp_path / "cache" / "shards").glob("*/*.tar"))) <= 2


def test_a_sidecar_of_another_tar_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    far = tmp_path / "far" / "x.tar"
    write_shard(far, [("a0", {"txt": b"an a"}), ("a1", {"txt": b"two"})])
    sidecar = far.with_name("x.idx.arrow")
    stale, size = sidecar.read_bytes(), far.stat().st_size
    write_shard(far, [("b0", {"txt": b"something longer"})])
    assert far.stat().st_size == size
    sidecar.write_bytes(stale)
    with pytest.raises(ClipkitError, match=r"the \.idx\.arrow beside it is of another tar"):
        Shards.open(f"file://{far}")[0]


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for name in "ab":
        make(tmp_path / name / "0.tar", ["k0", "k1"])
    both = Shards.open(str(tmp_path / "{a,b}" / "0.tar"))
    assert both.names == ["a/0.tar", "b/0.tar"]
    assert [both.key(i) for i in range(4)] == ["a/0/k0", "a/0/k1", "b/0/k0", "b/0/k1"]


def test_missing_stops_for_an_empty_caption_too(tmp_path):
    write_shard(tmp_path / "0.tar", [("mute", {"png": png(), "txt": b"  "})])
    with pytest.raises(ClipkitError, match=r"0\.tar: mute: the sample has no caption; mend it, or set data\.missing"):
        read_all(DataConfig(train=str(tmp_path), missing="stop", workers=0), steps=1)


def test_what_is_cut_or_damaged_is_in_the_ledger(tmp_path):
    make(tmp_path / "0.tar", [f"k{i}" for i in range(20)])
    data = bytearray((tmp_path / "0.tar").read_bytes())
    (tmp_path / "0.idx.arrow").unlink()
    at = data.index(b"k10.png")
    data[at : at + 512] = bytes([7]) * 512
    (tmp_path / "0.tar").write_bytes(data)
    left_out = open_train_data(DataConfig(train=str(tmp_path)), 0).left_out
    assert [line["key"] for line in left_out] == [None]
    assert "damaged at byte" in left_out[0]["reason"]


def test_captions_in_any_place_of_the_json_count():
    for about in ({"captions": "one"}, {"caption": ["one"]}, {"caption": "one"}, {"captions": ["one", None, " "]}):
        sample = {"png": b"image", "json": json.dumps(about).encode()}
        assert pick(sample, DataConfig(), np.random.default_rng(0))[1] == "one"
    with pytest.raises(BadSample, match=r"\.json member is broken"):
        pick({"png": b"image", "json": b"[" * 100_000}, DataConfig(), np.random.default_rng(0))


def test_a_resumed_run_with_other_sets_is_refused(run, refused, recipe, two_sets, tmp_path):
    call = ["train", recipe, "--out", tmp_path / "run", "--resume", "--set"]
    assert run(*call, f"data.train={two_sets / 'a'}", "--set", "steps=1").status == 0
    both = f"data.train=[{two_sets / 'a'}, {two_sets / 'b'}]"
    assert "data.train names 2 sets of shards, the run was trained on 1" in refused(*call, both, "--set", "steps=2")
