"""Artifact folders: whole, unfinished, or not ours."""

import pytest

from clipkit.artifact import Stage, atomic_write, read_json, read_manifest
from clipkit.errors import ClipkitError


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
