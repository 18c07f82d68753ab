"""Images decoded in processes: the same rows and the same bits as in threads, and failures that are told in a line."""

import multiprocessing
import os
import resource
import select
import shutil
import signal
import sys
import time
import types

import numpy as np
import pytest
from torch.utils.data import Dataset

from clipkit.core import ClipkitError, LoaderOptions, in_loader_processes
from clipkit.data.sources import open_source
from clipkit.embedding import EncodeOptions, embed_source
from clipkit.embedding import loading as room_of
from tests.kills import FORK


@pytest.fixture
def broken(captioned, tmp_path):
    """The captioned list with pictures that cannot be used, the first and the last among them."""
    shutil.copytree(captioned.parent, tmp_path / "broken")
    for number in (0, 5, 11):
        (tmp_path / "broken" / "images" / f"{number:03d}.png").write_bytes(b"no picture")
    return tmp_path / "broken" / "list.tsv"


@pytest.mark.parametrize("group", [1, 5, 16])
def test_processes_give_what_threads_give(broken, model, monkeypatch, group):
    monkeypatch.setattr(room_of, "GROUP", group)
    source = open_source(broken)
    each = (EncodeOptions(batch_size=4, workers=workers) for workers in (0, 2))
    wanted, found = (embed_source(source, model, options, show=None) for options in each)
    for side in ("image", "text", "image_of_text"):
        assert np.array_equal(getattr(wanted, side), getattr(found, side))
    assert (wanted.rows, wanted.left_out, wanted.captions) == (found.rows, found.left_out, found.captions)
    assert [sample.key for sample in wanted.samples] == [sample.key for sample in found.samples]
    assert [line["row"] for line in found.left_out] == [0, 5, 11]


@pytest.fixture
def taken(monkeypatch):
    """How many processes each call takes; none is started."""
    found = []
    monkeypatch.setattr(room_of, "WORTH_PROCESSES", 12)
    monkeypatch.setattr(room_of, "in_threads", lambda load, rows, threads, ahead: found.append(0) or map(load, rows))
    monkeypatch.setattr(room_of, "_in_groups", lambda load, rows, workers: found.append(workers) or map(load, rows))
    return found


@pytest.mark.parametrize(
    ("machine", "asked", "remote", "used"),
    [
        (16, {}, False, 14),
        (64, {}, False, 14),
        (8, {}, False, 6),
        (4, {}, False, 0),
        (16, {}, True, 0),
        (16, {"threads": 3}, False, 0),
        (16, {"decoding": "gpu"}, False, 0),
        (2, {"workers": 3}, False, 3),
        (16, {"workers": 0}, False, 0),
    ],
)
def test_processes_are_taken_where_there_are_cores_for_them(
    captioned, model, monkeypatch, taken, machine, asked, remote, used
):
    monkeypatch.setattr(room_of, "cores", lambda: machine)
    source = open_source(captioned)
    monkeypatch.setattr(source, "remote", remote)
    embed_source(source, model, EncodeOptions(**asked), show=None)
    assert taken == [used]
    if not asked:  # a few samples are not worth it
        embed_source(source, model, show=None, rows=range(11))
        assert taken[1:] == [0]


@pytest.mark.parametrize(("room", "used"), [(64_000_000, 10), (10_000_000, 0), (None, 14)])
def test_there_are_no_more_than_shared_memory_has_room_for(captioned, model, monkeypatch, taken, room, used):
    """At 224 px a group is 2.4 MB; each process may have two on their way, and a batch holds some."""
    monkeypatch.setattr(room_of, "cores", lambda: 32)
    monkeypatch.setattr(room_of, "GROUP", 16 * 224 * 224 // (32 * 32))  # as many bytes with this model's small pictures

    def statvfs(path):
        if room is None:
            raise FileNotFoundError
        return types.SimpleNamespace(f_frsize=1, f_bavail=room)

    monkeypatch.setattr(room_of.os, "statvfs", statvfs)
    embed_source(open_source(captioned), model, EncodeOptions(batch_size=2), show=None)
    assert taken == [used]


class Faulty(Dataset):
    def __getitem__(self, item):
        raise RuntimeError("sizes do not match")


def test_a_defect_within_a_process_is_no_process_that_is_gone():
    with pytest.raises(RuntimeError, match="sizes do not match"):
        list(in_loader_processes(Faulty(), range(2), 1, LoaderOptions(1)))


def test_the_command_decodes_in_processes(run, refused, broken, model_dir, tmp_path):
    call = ["embed", broken, "--model", model_dir, "--precision", "fp32", "--part-size", "7"]
    assert run(*call, "--workers", "2", "--out", tmp_path / "a").status == 1
    assert run(*call, "--workers", "0", "--out", tmp_path / "b").status == 1
    for path in sorted((tmp_path / "a").rglob("*.npy")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert "leave out --threads" in refused(*call, "--workers", "2", "--threads", "2", "--out", tmp_path / "c")


def test_an_error_of_the_source_is_told_as_it_is(captioned, model, monkeypatch):
    source = open_source(captioned)

    def changed(row):
        raise ClipkitError(f"row {row} was changed while it was read")

    monkeypatch.setattr(type(source), "__getitem__", lambda self, row: changed(row))
    with pytest.raises(ClipkitError, match="^row 0 was changed while it was read$"):
        embed_source(source, model, EncodeOptions(workers=2), show=None)


class Killed(Dataset):
    """Its process is killed at the third item."""

    def __getitem__(self, item):
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


def test_a_process_that_is_killed_is_named_in_a_line():
    with pytest.raises(ClipkitError, match="^a loader process is gone or stuck: .*") as told:
        list(in_loader_processes(Killed(), range(5), 1, LoaderOptions(1)))
    assert "\n" not in str(told.value)


class Faultless(Dataset):
    def __getitem__(self, item):
        return item


def ended_meanwhile():
    """Items of a process, and the process killed while nobody waits for one: this is where torch would raise."""
    items = in_loader_processes(Faultless(), range(5), 1, LoaderOptions(1))
    assert next(items) == 0
    (child,) = multiprocessing.active_children()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return items


def test_a_death_is_told_where_an_item_is_waited_for_and_nowhere_else():
    with pytest.raises(ClipkitError, match="^a loader process is gone or stuck: DataLoader worker .* killed by signal"):
        list(ended_meanwhile())
    assert list(in_loader_processes(Faultless(), range(3), 1, LoaderOptions(1))) == [
        0,
        1,
        2,
    ]  # the one before left nothing


def test_nobody_hears_of_a_death_who_asks_for_nothing_more():
    ended_meanwhile().close()
    assert list(in_loader_processes(Faultless(), range(3), 1, LoaderOptions(1))) == [0, 1, 2]


class Large(Dataset):
    """Items of which a pipe has room for none."""

    def __getitem__(self, item):
        return bytes(300_000)


def _asks_no_more(told):
    items = in_loader_processes(Large(), range(20), 2, LoaderOptions(2))
    next(items)
    time.sleep(0.5)  # the pipe is full, and whoever fills it waits
    os.write(told, b".")
    time.sleep(100)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's death")
def test_they_end_with_the_process_that_they_work_for():
    told, tells = os.pipe()  # at its end when nobody has it open any more
    parent = FORK.Process(target=_asks_no_more, args=(tells,))
    parent.start()
    os.close(tells)
    assert os.read(told, 1) == b"."
    parent.kill()
    parent.join()
    assert select.select([told], [], [], 8.0)[0] == [told]
    assert os.read(told, 1) == b""
    os.close(told)


def test_where_shared_memory_is_full_nothing_is_lost(captioned, model):
    """Several runs in one container measure the room at the same time. A limit on files is one on shared memory."""
    source = open_source(captioned)
    wanted = embed_source(source, model, EncodeOptions(batch_size=4, workers=0), show=None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        found = embed_source(source, model, EncodeOptions(batch_size=4, workers=2), show=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert np.array_equal(found.image, wanted.image)
    assert found.rows == wanted.rows
