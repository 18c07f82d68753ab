"""Journals of sorts that are cut, damaged, held or missing."""

import errno
import json
import os

import pytest

from clipkit.classification.sort.journal import JOURNAL, Journal
from clipkit.classification.sort.transfer import carry_out, undo
from clipkit.core import ClipkitError
from tests.sorts import items_of, photos, planned, sort, tree

__all__ = ["photos"]


def test_a_journal_that_is_cut_is_read_to_its_last_whole_line(photos, tmp_path):
    before, out = tree(photos), tmp_path / "out"
    sort(items_of(photos), out, "move")
    with (out / JOURNAL).open("ab") as file:
        file.write(b'{"how": "move", "pa')
    (photos / "new").write_bytes(b"new")
    sort(items_of(photos), out, "move")
    assert all(json.loads(line) for line in (out / JOURNAL).read_text().splitlines())
    undo(out)
    (photos / "new").unlink()
    assert tree(photos) == before


@pytest.mark.parametrize("begun", [b"", b'{"sort": 1, "tok'])
def test_a_journal_that_was_only_begun_is_none(photos, tmp_path, begun):
    """A kill between its first two steps; the folder was there before."""
    out = tmp_path / "out"
    out.mkdir()
    before = tree(tmp_path)
    (out / JOURNAL).write_bytes(begun)
    with pytest.raises(ClipkitError, match="holds no sort that could be undone"):
        undo(out)
    assert tree(tmp_path) == before
    (out / JOURNAL).write_bytes(begun)
    assert sort(items_of(photos), out, "move") == []
    assert undo(out) == (9, [])
    assert tree(tmp_path) == before


def test_what_a_full_disk_cut_short_is_no_line_of_the_journal(photos, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", os.write
    before = tree(photos)

    def write(descriptor, data):
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(descriptor, data[:-20])

    with Journal.open(out, create=True) as journal:
        steps = planned(journal, items_of(photos))
        with monkeypatch.context() as full:
            full.setattr("clipkit.classification.sort.journal.os.write", write)
            with pytest.raises(ClipkitError, match="is full"):
                carry_out(journal, steps, "move")
        assert carry_out(journal, steps, "move") == []  # there is room again
    assert undo(out) == (9, [])
    assert tree(photos) == before


def test_a_journal_that_is_damaged_or_held_or_missing_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ClipkitError, match="no such folder"):
        undo(out)
    with pytest.raises(ClipkitError, match="holds no sort that could be undone"):
        undo(photos)
    sort(items_of(photos), out, "link")
    with Journal.open(out, create=False), pytest.raises(ClipkitError, match="another process sorts into"):
        undo(out)
    whole = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(whole.replace(b'"how"', b'"who"', 1))
    there = tree(out)
    with pytest.raises(ClipkitError, match="damaged .*; nothing was touched"):
        undo(out)
    assert tree(out) == there
    (out / JOURNAL).write_bytes(whole.replace(b'"sort": 1', b'"sort": 9', 1))
    with pytest.raises(ClipkitError, match="newer clipkit"):
        undo(out)
