"""Sorts and their undoing, killed: each goes on, or is undone, and nothing is lost."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from clipkit.classification.sort.journal import JOURNAL
from clipkit.classification.sort.transfer import undo
from clipkit.core import ClipkitError
from tests.kills import apart, killed
from tests.paths import ROOT
from tests.sorts import HOWS, far, few, items_of, sort, tree

__all__ = ["far"]


def recovered(photos, out, before):
    """Undo whatever is there to be undone; a kill may have come before anything began, or after all had ended."""
    if out.exists() or out.with_name(f".{out.name}.clipkit-sort").exists():
        try:
            assert undo(out)[1] == []
        except ClipkitError as error:
            assert "no such folder" in str(error)  # noqa: PT017
    assert tree(photos) == before
    assert not [path for path in out.parent.iterdir() if "out" in path.name]


def kill_sorts(photos, out, how):
    """Kill a sort at each of its steps; it goes on, or is undone."""
    before, items = tree(photos), items_of(photos)
    sort(items, out, how)
    whole = {name: about[:2] for name, about in tree(out).items() if name != JOURNAL}
    undo(out)
    for at in itertools.count(1):
        died = killed(sort, items, out, how, at=at)
        if at % 2:
            assert sort([i for i in items if os.path.lexists(i.path)], out, how) == []
            assert {name: about[:2] for name, about in tree(out).items() if name != JOURNAL} == whole
        recovered(photos, out, before)
        if not died:
            break
    assert at > 8


def kill_undos(photos, out, how):
    """Kill an undo at each of its steps, and some of those that go on with it."""
    before, items = tree(photos), items_of(photos)
    for at in itertools.count(1):
        sort(items, out, how)
        died = killed(undo, out, at=at)
        if died and at % 3 == 0 and out.exists():
            killed(undo, out, at=2)
        recovered(photos, out, before)
        if not died:
            break
    assert at > 5


@pytest.mark.parametrize("how", ["copy", "link", "move", "far"])
@pytest.mark.parametrize("work", [kill_sorts, kill_undos])
def test_killed_at_any_step_it_goes_on_and_is_undone(tmp_path, how, work, request):
    photos = few(tmp_path / "photos")
    place = request.getfixturevalue("far") if how == "far" else tmp_path / "place"
    place.mkdir(exist_ok=True)
    assert apart(work, photos, place / "out", "move" if how == "far" else how) == 0


WORK = """
import sys
from tests.sorts import items_of, sort
from pathlib import Path
print("on", flush=True)
sort(items_of(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_killed_at_any_moment(tmp_path, how):
    """Not before a step but within it: by the clock."""
    photos, out = tmp_path / "photos", tmp_path / "place" / "out"
    photos.mkdir()
    out.parent.mkdir()
    for number in range(400):
        (photos / f"{number}.jpg").write_bytes(os.urandom(20_000))
    before = tree(photos)
    chance = random.Random(0)
    for _ in range(8):
        call = [sys.executable, "-c", WORK, photos, out, how]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, cwd=ROOT)
        process.stdout.readline()
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        recovered(photos, out, before)
