"""Images decoded in processes: the same rows and the same bits as in threads, and failures that are told in a line."""

import os
import shutil
import signal

import numpy as np
import pytest
from torch.utils.data import Dataset

from clipkit import encoding as room
from clipkit.encoding import embed_source
from clipkit.errors import ClipkitError
from clipkit.processes import in_loader_processes
from clipkit.sources import open_source


@pytest.fixture
def broken(captioned, tmp_path):
    """The captioned list with pictures that cannot be used, the first and the last among them."""
    shutil.copytree(captioned.parent, tmp_path / "broken")
    for number in (0, 5, 11):
        (tmp_path / "broken" / "images" / f"{number:03d}.png").write_bytes(b"no picture")
    return tmp_path / "broken" / "list.tsv"


@pytest.mark.parametrize("group", [1, 5, 16])
def test_processes_give_what_threads_give(broken, model, monkeypatch, group):
    monkeypatch.setattr(room, "GROUP", group)
    source = open_source(broken)
    wanted, found = (embed_source(source, model, batch_size=4, show=None, workers=workers) for workers in (0, 2))
    for side in ("image", "text", "image_of_text"):
        assert np.array_equal(getattr(wanted, side), getattr(found, side))
    assert (wanted.rows, wanted.left_out, wanted.captions) == (found.rows, found.left_out, found.captions)
    assert [sample.key for sample in wanted.samples] == [sample.key for sample in found.samples]
    assert [line["row"] for line in found.left_out] == [0, 5, 11]


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
    captioned, model, monkeypatch, machine, asked, remote, used
):
    taken = []
    monkeypatch.setattr(room, "cores", lambda: machine)
    monkeypatch.setattr(room, "WORTH_PROCESSES", 12)
    monkeypatch.setattr(room, "in_threads", lambda load, rows, threads, ahead: taken.append(0) or map(load, rows))
    monkeypatch.setattr(room, "_in_groups", lambda load, rows, workers: taken.append(workers) or map(load, rows))
    source = open_source(captioned)
    monkeypatch.setattr(source, "remote", remote)
    embed_source(source, model, show=None, **asked)
    assert taken == [used]
    if not asked:  # a few samples are not worth it
        embed_source(source, model, show=None, rows=range(11))
        assert taken[1:] == [0]


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
        embed_source(source, model, show=None, workers=2)


class Killed(Dataset):
    """Its process is killed at the third item."""

    def __getitem__(self, item):
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


def test_a_process_that_is_killed_is_named_in_a_line():
    with pytest.raises(ClipkitError, match="^a loader process is gone or stuck: .*") as told:
        list(in_loader_processes(Killed(), range(5), 1, ahead=1))
    assert "\n" not in str(told.value)
