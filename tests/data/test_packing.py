"""Packing: the same bytes by any number of hands, killed or not, and a word for all that is left out."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.core import ClipkitError, in_processes, in_threads, log
from clipkit.data import PackOptions, pack
from clipkit.data.shards import Shards
from clipkit.data.sources import open_source
from tests.conftest import make_pictures
from tests.paths import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "clipkit", "pack", *map(str, args)]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A list of 60 photos of noise, slow to make smaller; the last is broken."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (450, 600, 3), np.uint8)).save(buffer, "JPEG", quality=95)
    lines = ["path\tcaption"]
    for number in range(60):
        data = buffer.getvalue() if number < 59 else buffer.getvalue()[:5000]
        (folder / f"{number:03d}.jpg").write_bytes(data)
        lines.append(f"{number:03d}.jpg\tnoise number {number}")
    (folder / "list.tsv").write_text("\n".join(lines) + "\n")
    return folder / "list.tsv"


def test_any_number_of_workers_gives_the_same_bytes(pictures, shards, tmp_path):
    for workers in (2, 3):
        manifest = pack(open_source(pictures), tmp_path / str(workers), PackOptions(shard_samples=13, workers=workers))
        assert contents(tmp_path / str(workers)) == contents(shards)
        assert manifest == json.loads((shards / "manifest.json").read_text())


@pytest.mark.parametrize("shard_samples", [7, 100])  # processes, and threads within one
def test_any_number_of_workers_makes_the_same_smaller_images(tmp_path, shard_samples):
    listed = make_pictures(tmp_path / "p", 20, side=90)
    (tmp_path / "p" / "images" / "003.png").write_bytes(b"no picture")
    made = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        pack(open_source(listed), out, PackOptions(shard_samples=shard_samples, max_side=64, workers=workers))
        made.append((contents(out), (out / "ledger.jsonl").read_bytes(), (out / "manifest.json").read_bytes()))
    assert made[0] == made[1]
    sample = Shards.open(str(tmp_path / "1"))[0]
    assert Image.open(io.BytesIO(sample["png"])).size == (64, 64)
    assert (json.loads(sample["json"])["original_width"], json.loads(sample["json"])["original_height"]) == (90, 90)


def test_the_manifest_has_a_checksum_of_each_shard(shards):
    for shard in json.loads((shards / "manifest.json").read_text())["shards"]:
        data = (shards / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["blake2b"]) == (len(data), hashlib.blake2b(data).hexdigest())


def test_shards_of_equal_counts(pictures, run, refused, tmp_path):
    assert run("pack", pictures, "--out", tmp_path / "s", "--shards", 7).status == 0
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [6, 7, 7, 7, 7, 7, 7]
    both = refused("pack", pictures, "--out", tmp_path / "t", "--shards", 7, "--shard-samples", 5)
    assert "--shards says how many, --shard-samples and --shard-mib say how large; choose one way" in both
    assert "has 48 samples, too few for 49 shards" in refused("pack", pictures, "--out", tmp_path / "t", "--shards", 49)
    assert not (tmp_path / "t").exists()


def test_other_settings_are_another_artifact(pictures, run, refused, tmp_path):
    assert run("pack", pictures, "--out", tmp_path / "s", "--max-side", 30).status == 0
    for changed in ([], ["--max-side", 31], ["--max-side", 30, "--quality", 90], ["--max-side", 30, "--shards", 1]):
        assert "made from other input or settings" in refused("pack", pictures, "--out", tmp_path / "s", *changed)
    assert run("pack", pictures, "--out", tmp_path / "s", "--max-side", 30, "--workers", 1).status == 0


def test_packing_our_own_shards_again_keeps_the_samples(captioned, tmp_path):
    pack(open_source(captioned), tmp_path / "a", PackOptions(max_side=30))
    pack(open_source(tmp_path / "a"), tmp_path / "b", PackOptions(shards=3, workers=2))
    before, after = Shards.open(str(tmp_path / "a")), Shards.open(str(tmp_path / "b"))
    assert [before.key(i) for i in range(12)] == [after.key(i) for i in range(12)]
    for i in range(12):
        assert {ext: data for ext, data in before[i].items() if ext != "json"} == {
            ext: data for ext, data in after[i].items() if ext != "json"
        }
        assert json.loads(before[i]["json"]) == json.loads(after[i]["json"])
    pack(open_source(tmp_path / "b"), tmp_path / "c", PackOptions(max_side=20))
    assert json.loads(Shards.open(str(tmp_path / "c"))[0]["json"])["original_width"] == 40


def test_killed_and_run_again_it_goes_on(noise, tmp_path):
    options = [noise, "--shards", 15, "--max-side", 500, "--workers", 2]
    process = subprocess.Popen(command(*options, "--out", tmp_path / "a"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    parts = tmp_path / "a" / ".work" / "parts"
    while len(list(parts.glob("*.json"))) < 3:
        assert process.poll() is None, "done before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.stem: (tmp_path / "a" / f"{path.stem}.tar").stat().st_mtime_ns for path in parts.glob("*.json")}
    assert len(finished) < 15
    done = subprocess.run(
        command(*options, "--out", tmp_path / "a"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "1 left out" in done.stderr
    for name, when in finished.items():
        assert (tmp_path / "a" / f"{name}.tar").stat().st_mtime_ns == when
    pack(open_source(noise), tmp_path / "b", PackOptions(shards=15, max_side=500))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == (tmp_path / "b" / "ledger.jsonl").read_bytes()
    assert [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_loses_nothing(pictures, shards, run, refused, tmp_path, workers):
    call = ["pack", pictures, "--shard-samples", 13, "--workers", workers, "--out", tmp_path / "s"]
    # How large a file may get: the system says "File too large" as it says "No space left on device".
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        line = refused(*call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in line
    assert "File too large; nothing of it was kept" in line
    assert not list((tmp_path / "s").glob("*.tar")) + list((tmp_path / "s").glob(".*.tmp"))
    assert run(*call).status == 0
    assert contents(tmp_path / "s") == contents(shards)


def test_a_folder_that_cannot_be_made(pictures, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot make" in refused("pack", pictures, "--out", tmp_path / "file" / "s")


def test_all_that_is_left_out_or_odd_is_in_the_ledger(run, tmp_path):
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "list.tsv").write_text(
        "path\tcaption\na.png\tone\na.png\tone\na.png\ttwo\nb.png\t \nc.png\tx\nc.png\t\nnone.png\ty\nd.png\tz\n"
    )
    result = run("pack", tmp_path / "list.tsv", "--out", tmp_path / "s")
    assert result.status == 1
    assert "1 captions repeat one of their image's" in result.err
    assert "3 left out" in result.err
    assert "the first: b.png: the sample has no caption" in result.err
    ledger = [json.loads(line) for line in (tmp_path / "s" / "ledger.jsonl").read_text().splitlines()]
    assert ledger == [
        {"row": 0, "key": "a.png", "kept": True, "reason": "caption 2 repeats caption 1; both are kept"},
        {"row": 1, "key": "b.png", "reason": "the sample has no caption"},
        {"row": 2, "key": "c.png", "reason": "caption 2 of 2 is empty"},
        {"row": 3, "key": "none.png", "reason": "cannot be read: No such file or directory"},
    ]
    assert open_source(tmp_path / "s")[0].captions == ("one", "one", "two")


def test_repeated_captions_alone_are_no_failure(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.tsv").write_text("path\tcaption\na.png\tone\na.png\tone\n")
    assert run("pack", tmp_path / "list.tsv", "--out", tmp_path / "s").status == 0
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["first_left_out"] is None


def test_threads_keep_the_order_and_do_not_run_ahead():
    begun = []
    results = in_threads(lambda i: (begun.append(i), time.sleep(0.002 * (i % 3)), i)[2], range(50), 4, ahead=8)
    for i, result in enumerate(results):
        assert result == i
        assert len(begun) <= i + 10
    assert list(in_threads(str, [1, 2], 0, 0)) == ["1", "2"]


def test_processes_tell_what_they_do():
    def work(tell):
        for _ in range(10):
            tell(os.getpid())

    told = list(in_processes(work, 3))
    assert len(told) == 30
    assert len(set(told)) == 3
    assert os.getpid() not in told


def test_a_process_that_fails_ends_the_others(tmp_path):
    def work(tell):
        try:
            (tmp_path / "begun").touch(exist_ok=False)
        except FileExistsError:
            while len(list(tmp_path.iterdir())) < 2:
                time.sleep(0.001)
            raise ClipkitError("the disk is full") from None
        try:
            (tmp_path / "ready").touch()
            time.sleep(30)
        finally:
            (tmp_path / "cleaned").touch()

    began = time.monotonic()
    with pytest.raises(ClipkitError, match="^the disk is full$"):
        list(in_processes(work, 2))
    assert time.monotonic() - began < 10
    assert (tmp_path / "cleaned").exists()


def test_a_process_that_is_killed_is_named():
    with pytest.raises(ClipkitError, match="a worker process ended with SIGKILL; the same command goes on"):
        list(in_processes(lambda _: os.kill(os.getpid(), signal.SIGKILL), 2))
    with pytest.raises(ClipkitError, match="^ValueError: odd$"):
        list(in_processes(lambda _: (_ for _ in ()).throw(ValueError("odd")), 1))


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import time, os\nfrom clipkit.core import in_processes\n"
        "def work(tell):\n"
        f"    open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()\n"
        "    while True:\n        tell(1); time.sleep(0.02)\n"
        "for _ in in_processes(work, 2): pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    children = [int(path.name) for path in tmp_path.iterdir()]
    for _ in range(200):
        if not any(_is_alive(child) for child in children):
            return
        time.sleep(0.02)
    raise AssertionError("they go on")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_bar_shows_rates_where_somebody_watches(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with log.meter("pack", 100, "samples", done=50) as advance:
        for _ in range(5):
            advance(10, 2_000_000)
            time.sleep(0.12)
    assert "100/100" in shown.getvalue()
    assert "samples/s" in shown.getvalue()
    assert "MB/s" in shown.getvalue()
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    with log.meter("pack", 100) as advance:
        advance(10)
    assert quiet.getvalue() == ""
