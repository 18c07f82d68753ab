"""Artifact folders: whole, unfinished, or not ours."""

import errno
import fcntl
import shutil
from pathlib import Path

import pytest

from clipkit.core import ClipkitError, atomic_write, read_json
from clipkit.storage import Stage, folder_swap, read_manifest
from tests.kills import contents, killed


def make(folder, content="x", kind="shards", parts=("0", "1"), stop_after=None, overwrite=False):
    """A stage of two parts; returns the parts it worked on."""
    stage = Stage(folder, kind, {"content": content}, overwrite=overwrite)
    worked = []
    if not stage.done:
        for name in stage.pending(parts):
            with atomic_write(folder / f"{name}.txt", "w") as handle:
                handle.write(content)
            stage.finish_part(name, {"n": int(name)})
            worked.append(name)
            if name == stop_after:
                return worked
        stage.commit(counts=len(stage.records(parts)))
    return worked


def test_a_finished_stage_does_nothing_when_run_again(tmp_path):
    assert make(tmp_path / "a") == ["0", "1"]
    manifest = read_manifest(tmp_path / "a", "shards")
    assert manifest["counts"] == 2
    assert not (tmp_path / "a" / ".work").exists()
    assert make(tmp_path / "a") == []
    assert make(tmp_path / "a", overwrite=True) == ["0", "1"]


def test_a_killed_stage_passes_for_nothing_and_is_completed(tmp_path):
    make(tmp_path / "a", stop_after="0")
    with pytest.raises(ClipkitError, match="unfinished shards"):
        read_manifest(tmp_path / "a", "shards")
    assert make(tmp_path / "a") == ["1"]
    assert read_manifest(tmp_path / "a", "shards")["counts"] == 2


@pytest.mark.parametrize("stop_after", ["0", None])
def test_what_was_made_from_other_input_is_not_touched(tmp_path, stop_after):
    make(tmp_path / "a", stop_after=stop_after)
    with pytest.raises(ClipkitError, match="already holds .* made from other input"):
        make(tmp_path / "a", content="y")
    with pytest.raises(ClipkitError, match="already holds .* shards; name another"):
        make(tmp_path / "a", kind="index")
    assert (tmp_path / "a" / "0.txt").read_text() == "x"
    assert make(tmp_path / "a", content="y", overwrite=True) == ["0", "1"]
    assert (tmp_path / "a" / "0.txt").read_text() == "y"


def test_a_folder_that_is_no_artifact_is_never_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    for overwrite in (False, True):
        with pytest.raises(ClipkitError, match="holds no clipkit artifact"):
            make(tmp_path, overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(ClipkitError, match="is a file"):
        make(tmp_path / "file")
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_a_part_that_another_process_holds_is_left_to_it(tmp_path):
    first = Stage(tmp_path / "a", "shards", {})
    held = first.pending(["0", "1"])
    assert next(held) == "0"
    second = Stage(tmp_path / "a", "shards", {})
    others = second.pending(["0", "1"])
    assert next(others) == "1"
    second.finish_part("1", {})
    first.finish_part("0", {"n": 7})
    held.close()
    assert list(others) == []
    assert second.records(["0", "1"]) == [{"n": 7}, {}]
    first.commit()
    assert second.records(["0", "1"]) is None


def test_the_part_of_a_process_that_died_is_taken_over(tmp_path):
    first = Stage(tmp_path / "a", "shards", {})
    held = first.pending(["0", "1"])
    assert next(held) == "0"
    others = Stage(tmp_path / "a", "shards", {}).pending(["0", "1"])
    assert next(others) == "1"
    held.close()  # what the end of a process does to its lock
    Stage(tmp_path / "a", "shards", {}).finish_part("1", {})
    assert next(others) == "0"


def test_what_is_read_is_never_removed(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "x").mkdir()
    for inputs in ([tmp_path / "a"], [tmp_path / "a" / "0.txt"], [str(tmp_path / "x" / ".." / "a")]):
        with pytest.raises(ClipkitError, match="which is read to make it"):
            Stage(tmp_path / "a", "shards", {"content": "y"}, inputs=inputs, overwrite=True)
    Stage(tmp_path / "a" / "inside", "shards", {}, inputs=[tmp_path / "a"])
    assert (tmp_path / "a" / "0.txt").read_text() == "x"


def test_records_without_a_plan_count_for_nothing(tmp_path):
    (tmp_path / "a" / ".work" / "parts").mkdir(parents=True)
    (tmp_path / "a" / ".work" / "parts" / "0.json").write_text('{"n": 0}')
    assert make(tmp_path / "a") == ["0", "1"]


def test_scratch_files_of_a_killed_write_are_gone_in_the_end(tmp_path):
    make(tmp_path / "a", stop_after="0")
    (tmp_path / "a" / ".1.txt.99.tmp").write_text("half")
    make(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0.txt", "1.txt", "manifest.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as handle:
        handle.write("half")
        raise ZeroDivisionError
    with pytest.raises(ClipkitError, match="cannot write .*No space left"), atomic_write(path, "w") as handle:
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_disk_that_is_read_only_is_named(tmp_path, monkeypatch):
    """It refuses to remove even what is not there, as one that is mounted so does."""

    def refuses(self, *args, **how):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuses)
    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(ClipkitError, match=r"cannot write .*/a: Read-only file system"), atomic_write(tmp_path / "a"):
        pass


def test_manifests_of_another_kind_or_a_newer_version_are_refused(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ClipkitError, match="holds shards, but index is needed"):
        read_manifest(tmp_path / "a", "index")
    text = (tmp_path / "a" / "manifest.json").read_text()
    (tmp_path / "a" / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ClipkitError, match="newer clipkit"):
        read_manifest(tmp_path / "a", "shards")
    (tmp_path / "a" / "manifest.json").write_text(text[:30])
    with pytest.raises(ClipkitError, match="not valid JSON"):
        read_json(tmp_path / "a" / "manifest.json")
    with pytest.raises(ClipkitError, match="no such folder"):
        read_manifest(tmp_path / "b", "shards")


def renew(folder, content, parts=("0", "1"), stop_after=None):
    """Bring an artifact of two parts up to date; returns what was there to take over."""
    stage = Stage(folder, "shards", {"content": content}, update=True)
    if not stage.done:
        for name in stage.pending(parts):
            with atomic_write(stage.folder / f"{name}.txt", "w") as handle:
                handle.write(content)
            stage.finish_part(name, {"n": int(name)})
            if name == stop_after:
                return stage.earlier
        records = stage.records(parts)
        if records is not None:
            stage.commit(counts=len(records))
    return stage.earlier


def test_an_update_leaves_the_old_one_whole_until_the_new_one_is(tmp_path):
    make(tmp_path / "a")
    before = contents(tmp_path / "a")
    assert renew(tmp_path / "a", "y", stop_after="0") == [tmp_path / "a"]
    assert contents(tmp_path / "a") == before
    (hidden,) = (path for path in tmp_path.iterdir() if path.name.startswith(".a.update."))
    assert renew(tmp_path / "a", "z", stop_after="0") == [tmp_path / "a", hidden]
    assert renew(tmp_path / "a", "y")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "1.txt").read_text() == "y"
    assert read_manifest(tmp_path / "a", "shards")["made_from"] == {"content": "y"}
    assert renew(tmp_path / "a", "y") == []
    assert renew(tmp_path / "new", "y") == []


def test_an_unfinished_one_is_brought_up_to_date_too(tmp_path):
    make(tmp_path / "a", stop_after="0")
    assert renew(tmp_path / "a", "y") == [tmp_path / "a"]
    assert contents(tmp_path / "a").keys() == {"0.txt", "1.txt", "manifest.json"}


def test_an_update_of_another_kind_or_of_no_artifact_is_refused(tmp_path):
    make(tmp_path / "a", kind="index")
    with pytest.raises(ClipkitError, match="already holds finished index; name another"):
        renew(tmp_path / "a", "y")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("")
    with pytest.raises(ClipkitError, match="holds no clipkit artifact"):
        renew(tmp_path / "b", "y")
    make(tmp_path / "c")
    with pytest.raises(ClipkitError, match="or add --update to bring it up to date, or --overwrite to replace it"):
        Stage(tmp_path / "c", "shards", {"content": "y"}, update=False)


def test_what_another_process_works_on_is_not_replaced(tmp_path):
    make(tmp_path / "a")
    at_work = Stage(tmp_path / "a", "shards", {"content": "y"}, update=True)
    with pytest.raises(ClipkitError, match="another process makes .* from other input right now"):
        Stage(tmp_path / "a", "shards", {"content": "z"}, update=True)
    del at_work
    renew(tmp_path / "a", "z", stop_after="0")
    unfinished = Stage(tmp_path / "b", "shards", {"content": "x"})
    with pytest.raises(ClipkitError, match="another process makes"):
        renew(tmp_path / "b", "y")
    del unfinished
    update = Stage(tmp_path / "b", "shards", {"content": "y"}, update=True)
    came_late = Stage(tmp_path / "b", "shards", {"content": "x"})
    with pytest.raises(ClipkitError, match="another process works in"):
        update.commit()
    del came_late
    assert renew(tmp_path / "b", "y") == [tmp_path / "b"]
    assert read_manifest(tmp_path / "b", "shards")["made_from"] == {"content": "y"}


@pytest.mark.parametrize("exchange", [True, False])
def test_two_processes_update_one_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folder_swap, "_exchange", lambda *_: False)
    make(tmp_path / "a")
    first, second = (Stage(tmp_path / "a", "shards", {"content": "y"}, update=True) for _ in range(2))
    for stage, part in ((first, "0"), (second, "1")):
        (stage.folder / f"{part}.txt").write_text("y")
        stage.finish_part(part, {})
    waiting = second.pending(["0", "1", "2"])
    assert next(waiting) == "2"
    first.commit()
    assert list(waiting) == []
    assert second.records(["0", "1"]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert contents(tmp_path / "a").keys() == {"0.txt", "1.txt", "manifest.json"}


def test_where_something_else_came_into_the_place_meanwhile_it_is_said(tmp_path):
    make(tmp_path / "a")
    late = Stage(tmp_path / "a", "shards", {"content": "y"}, update=True)
    (tmp_path / "a").rename(tmp_path / "b")
    make(tmp_path / "a", content="z")
    with pytest.raises(ClipkitError, match="made .* from other input meanwhile; run this again"):
        late.records(["0"])


@pytest.mark.parametrize("exchange", [True, False])
def test_an_update_that_is_killed_at_any_change_to_the_disk_is_mended(tmp_path, monkeypatch, exchange):
    """By the same update again, by another one, and by the old command where that still fits."""
    if not exchange:
        monkeypatch.setattr(folder_swap, "_exchange", lambda *_: False)
    make(tmp_path / "old" / "a")
    make(tmp_path / "new" / "a", content="y")
    old, new = contents(tmp_path / "old" / "a"), contents(tmp_path / "new" / "a")
    missing, at = 0, 1
    while killed(renew, shutil.copytree(tmp_path / "old", tmp_path / f"{at}" / "left") / "a", "y", at=at):
        left = tmp_path / f"{at}" / "left"
        missing += not (left / "a").exists()
        there = {k: v for k, v in contents(left / "a").items() if not k.startswith(".work")}
        assert there in (old, new) or not (left / "a").exists(), at
        for then in ("y", "z", "x") if exchange else ("y",):
            folder = shutil.copytree(left, tmp_path / f"{at}" / then) / "a"
            if then != "x":
                renew(folder, then)
            elif there == old:
                assert make(folder) == []
            else:
                with pytest.raises(ClipkitError, match="made from other input"):
                    make(folder)
                continue
            assert [path.name for path in folder.parent.iterdir()] == ["a"], at
            assert contents(folder).keys() == new.keys(), at
            assert contents(folder) == {"x": old, "y": new}.get(then, contents(folder)), at
        at += 1
    assert contents(tmp_path / f"{at}" / "left" / "a") == new
    assert at > 20
    assert missing == (0 if exchange else 1)


def test_when_the_one_that_puts_an_update_in_place_is_killed_another_does_it(tmp_path):
    at, waited = 1, True
    while waited:
        folder = tmp_path / f"{at}" / "a"
        make(folder)
        other = Stage(folder, "shards", {"content": "y"}, update=True)
        for part in other.pending(["0", "1"]):
            (other.folder / f"{part}.txt").write_text("y")
            other.finish_part(part, {})
        waited = killed(renew, folder, "y", at=at)
        records = other.records(["0", "1"])
        if records is not None:
            other.commit()
        assert [path.name for path in folder.parent.iterdir()] == ["a"], at
        assert read_manifest(folder, "shards")["made_from"] == {"content": "y"}, at
        assert contents(folder).keys() == {"0.txt", "1.txt", "manifest.json"}, at
        at += 1
    assert records is None
    assert at > 10


@pytest.mark.parametrize("at", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, at):
    flock = fcntl.flock

    def refuses(descriptor, how):
        if how == at:
            raise OSError(errno.ENOLCK, "No locks available")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(ClipkitError, match=r"^cannot lock .*/a: No locks available; .* name a folder on another$"):
        Stage(tmp_path / "a", "test", {})
