"""Sorting files into folders and back: whatever is met in between, nothing is lost."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.classification.sort import transfer
from clipkit.classification.sort.journal import JOURNAL, Journal
from clipkit.classification.sort.plan import Item, plan
from clipkit.classification.sort.transfer import carry_out, settle, undo
from clipkit.core import ClipkitError
from tests.sorts import HOWS, far, few, items_of, photos, planned, sort, tree

__all__ = ["far", "photos"]


@pytest.mark.parametrize("how", HOWS)
def test_sort_then_undo_restores_all(photos, tmp_path, how):
    before, items, out = tree(photos), items_of(photos), tmp_path / "out"
    contents = {item.path: Path(item.path).read_bytes() for item in items}
    steps = {step.path: out / step.target for step in plan(items, [], {})}
    assert sort(items, out, how) == []
    assert len(steps) == len([path for path in out.glob("*/*") if path.name != JOURNAL]) == len(items)
    for path, target in steps.items():
        assert target.is_symlink() == (
            how == "link" or (how == "move" and Path(path).name in ("link.jpg", "straight.jpg"))
        )
        assert os.path.lexists(path) == (how != "move")
        if how != "move" or not target.is_symlink():
            assert target.read_bytes() == contents[path]
        if how == "move" and target.is_symlink():
            assert os.path.realpath(target) in map(os.path.realpath, contents)  # it leads to where it led
    assert how == "move" or tree(photos) == before
    assert undo(out) == (len(items), [])
    assert tree(photos) == before
    assert not out.exists()


@pytest.mark.parametrize("how", HOWS)
def test_a_second_sort_has_nothing_to_do_and_new_files_are_added(photos, tmp_path, how):
    out = tmp_path / "out"
    sort(items_of(photos), out, how)
    there = tree(out)
    sort(items_of(photos), out, how)
    assert tree(out) == there
    (photos / "y").mkdir(exist_ok=True)
    (photos / "y" / "new.jpg").write_bytes(b"new")
    sort(items_of(photos), out, how)
    assert len([name for name in tree(out) if "new" in name]) == 1
    assert len(tree(out)) == len(there) + 1
    undo(out)
    assert (photos / "y" / "new.jpg").read_bytes() == b"new"
    assert len(items_of(photos)) == 10


def test_what_stood_in_the_folder_stays(photos, tmp_path):
    out = tmp_path / "out"
    for name in ("cat/a.jpg", "cat/own.txt", "mine", "dog"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"mine") if name != "dog" else (out / name).mkdir()
    before = tree(tmp_path)
    sort(items_of(photos), out, "move")
    assert (out / "cat/a.jpg").read_bytes() == b"mine"
    assert (out / "cat/a-2.jpg").is_file()
    assert undo(out)[1] == []
    assert tree(tmp_path) == before


def test_a_name_that_appears_meanwhile_is_never_overwritten(photos, tmp_path, monkeypatch):
    before, items, out = tree(photos), items_of(photos), tmp_path / "out"
    for how in HOWS:
        with Journal.open(out, create=True) as journal:
            steps = planned(journal, items)
            (out / steps[0].target).parent.mkdir(exist_ok=True)
            (out / steps[0].target).write_bytes(b"somebody else's")
            (refused,) = carry_out(journal, steps, how)
        assert refused.target == steps[0].target
        assert "took its name" in refused.reason
        assert sort(items, out, how) == []  # under another name now
        assert (out / steps[0].target).read_bytes() == b"somebody else's"
        # In the first record stands what was not done: of that file undo says that it is another one.
        left = undo(out)[1]
        assert [each.target for each in left] == [steps[0].target]
        assert tree(photos) == before
        shutil.rmtree(out)


def changed(path):
    path.write_bytes(path.read_bytes() + b"!")


@pytest.mark.parametrize("how", HOWS)
def test_undo_does_not_touch_what_was_changed_since(tmp_path, how):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in "abcdef":
        (folder / name).write_text(name * 100)
    items = [Item(str(folder / name), ("cat",)) for name in "abcdef"]
    sort(items, out, how)
    if how == "link":
        (out / "cat/a").unlink()
        (out / "cat/a").write_text("my own")
    else:
        changed(out / "cat/a")
    wanted = {"a": "changed since"}
    if how == "copy":
        (folder / "b").unlink()
        changed(folder / "c")
        (out / "cat/d").unlink()  # the copy is gone, the original is not: nothing is to be done
        wanted |= {"b": "its original was changed or is gone", "c": "its original was changed or is gone"}
    elif how == "move":
        (folder / "b").write_text("another b")
        (out / "cat/c").unlink()
        (out / "cat/d").rename(folder / "d")  # put back by hand
        wanted |= {"b": "another file has its place", "c": "gone"}
    (out / "cat/mine").write_text("mine")
    before = tree(tmp_path)
    for _ in range(2):
        refused = undo(out)[1]
        assert {Path(each.path).name for each in refused} == set(wanted)
        for each in refused:
            name = Path(each.path).name
            assert wanted[name] in each.reason
            for path in (f"out/cat/{name}", f"photos/{name}"):
                assert tree(tmp_path).get(path) == before.get(path)
    for name in set("abcdef") - set(wanted):
        assert (folder / name).read_text() == name * 100
    assert (out / "cat/mine").read_text() == "mine"
    (out / "cat/a").unlink()
    (folder / "a").write_text("a")
    for name in set(wanted) - {"a"}:
        (out / "cat" / name).unlink(missing_ok=True)
        (folder / name).write_text(name)
    assert undo(out)[1] == []
    assert sorted(path.name for path in out.rglob("*")) == ["cat", "mine"]


def test_folders_taken_away_since_are_made_again(photos, tmp_path):
    before, out = tree(photos), tmp_path / "out"
    sort(items_of(photos), out, "move")
    shutil.rmtree(photos)
    undo(out)
    assert tree(photos) == before


def sorted_in_place(folder, out):
    """The sorted folder takes the place of the source, in which a folder is called as a label."""
    shutil.rmtree(folder)
    out.rename(folder)
    return folder


def linked_to(folder, out):
    """The source's folder is a link to the sorted one by now."""
    shutil.rmtree(folder / "cat")
    (folder / "cat").symlink_to(out / "cat")
    return out


def deduplicated(folder, out):
    """As `rdfind -makesymlinks` leaves it: the originals are links to their copies."""
    for path in list((out / "cat").iterdir()):
        (folder / "cat" / path.name).unlink(missing_ok=True)
        (folder / "cat" / path.name).symlink_to(path)
    return out


def deduplicated_with_a_link_more(folder, out):
    deduplicated(folder, out)
    for path in list((out / "cat").iterdir()):
        path.with_name("own " + path.name).hardlink_to(path)
    return out


@pytest.mark.parametrize("how", ["copy", "move"])
@pytest.mark.parametrize("change", [sorted_in_place, linked_to, deduplicated, deduplicated_with_a_link_more])
def test_the_only_copy_is_never_removed(tmp_path, how, change):
    """Where the place of a file leads to the sorted one itself, it only looks as though there were two."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "cat").mkdir(parents=True)
    for name in "ab":
        (folder / "cat" / name).write_text(name)
    (folder / "cat" / "l").symlink_to(tmp_path / "none")
    items = [Item(str(folder / "cat" / name), ("cat",)) for name in ("ab" if how == "copy" else "abl")]
    sort(items, out, how)
    out = change(folder, out)
    before = tree(tmp_path)
    with Journal.open(out, create=False) as journal:
        settle(journal)
    assert tree(tmp_path) == before
    done, refused = undo(out)
    assert (done, len(refused)) == (0, len(items))
    assert tree(tmp_path) == before


def test_copies_that_became_hard_links_are_taken_back(tmp_path):
    """As `rdfind -makehardlinks` leaves it: there are two of each still."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(name)
    sort([Item(str(folder / name), ("cat",)) for name in "ab"], out, "copy")
    for name in "ab":
        (out / "cat" / name).unlink()
        (out / "cat" / name).hardlink_to(folder / name)
    assert undo(out) == (2, [])
    assert {name: about[1] for name, about in tree(folder).items()} == {"a": b"a", "b": b"b"}


def read_only(monkeypatch, folder):
    """Let the system refuse every change to what a folder holds, as it does on a disk that must not be written to."""
    for name in ("unlink", "rmdir", "mkdir", "rename"):
        whole = getattr(os, name)

        def refuse(path, *about, whole=whole, **more):
            if Path(path).parent == folder:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return whole(path, *about, **more)

        monkeypatch.setattr(os, name, refuse)


def test_copies_of_what_must_not_be_written_to_are_taken_back(tmp_path, monkeypatch):
    photos, out = few(tmp_path / "photos"), tmp_path / "out"
    before = tree(tmp_path)
    read_only(monkeypatch, photos)
    assert sort(items_of(photos), out, "copy") == []
    assert undo(out) == (4, [])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("how", HOWS)
def test_a_disk_in_a_folder_that_must_not_be_written_to(tmp_path, monkeypatch, how):
    photos, out = few(tmp_path / "photos"), tmp_path / "mount" / "out"
    out.mkdir(parents=True)
    before = tree(tmp_path)
    whole = Path.mkdir
    read_only(monkeypatch, out.parent)
    # `mkdir` says of what is there that it is there, on such a disk too.
    monkeypatch.setattr(Path, "mkdir", lambda path, *about, **more: path.is_dir() or whole(path, *about, **more))
    assert sort(items_of(photos), out, how) == []
    assert undo(out) == (4, [])
    assert tree(tmp_path) == before


def test_files_move_to_another_disk_and_back(photos, far):
    before, out = tree(photos), far / "out"
    sort(items_of(photos), out, "move")
    assert not items_of(photos)
    assert undo(out)[1] == []
    assert tree(photos) == before
    assert not out.exists()


def refuse_links(monkeypatch, code):
    def link(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(transfer.os, "link", link)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_without_hard_links_it_goes_all_the_same(photos, tmp_path, monkeypatch, code):
    """Where one disk is mounted twice, and on disks that know no links."""
    before, out = tree(photos), tmp_path / "out"
    whole = transfer._rename

    def rename(path, target):
        if code == errno.EXDEV and not path.name.startswith(".clipkit"):
            raise OSError(code, os.strerror(code))
        return whole(path, target)

    monkeypatch.setattr(transfer, "_rename", rename)
    if code == errno.EPERM:
        refuse_links(monkeypatch, code)
    sort(items_of(photos), out, "move")
    assert not items_of(photos)
    assert undo(out)[1] == []
    assert tree(photos) == before


def test_a_full_disk_is_one_line_and_can_be_undone(photos, tmp_path, monkeypatch):
    before, out = tree(photos), tmp_path / "out"
    left = [3]
    whole = transfer.shutil.copystat

    def copystat(*about, **more):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*about, **more)

    monkeypatch.setattr(transfer.shutil, "copystat", copystat)
    with pytest.raises(ClipkitError, match=r"is full; 3 of 9 files are there\. Make room .* clipkit classify --undo"):
        sort(items_of(photos), out, "copy")
    assert not list(out.rglob("*.part"))
    monkeypatch.undo()
    assert undo(out) == (3, [])
    assert tree(photos) == before
    assert not out.exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_without_times_and_rights_it_goes_all_the_same(photos, tmp_path, monkeypatch, code):
    def copystat(*_, **__):
        raise OSError(code, os.strerror(code))

    before, out = tree(photos), tmp_path / "out"
    monkeypatch.setattr(transfer.shutil, "copystat", copystat)
    assert sort(items_of(photos), out, "copy") == []
    assert undo(out) == (9, [])
    assert tree(photos) == before


def test_a_disk_that_is_full_before_the_first_file(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    photos = few(tmp_path / "photos")
    with Journal.open(tmp_path / "out", create=True) as journal:
        steps = planned(journal, items_of(photos))
        monkeypatch.setattr("clipkit.classification.sort.journal.os.write", write)
        with pytest.raises(ClipkitError, match="is full; 0 of 4 files are there"):
            carry_out(journal, steps, "copy", labels={"cat": "cat"})
    monkeypatch.undo()
    assert undo(tmp_path / "out") == (0, [])


def test_folders_are_on_the_disk_before_the_only_copy_is_in_them(tmp_path, monkeypatch):
    """What moves to another disk leaves the first only when even its new folder would outlast a power cut."""
    photos, out = few(tmp_path / "photos"), tmp_path / "out"
    whole, seen = {name: getattr(transfer, name) for name in ("_rename", "_remove", "sync_folder")}, []

    def rename(path, target):
        if not path.name.startswith(".clipkit"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return whole["_rename"](path, target)

    def sync_folder(folder):
        seen.append(folder)
        whole["sync_folder"](folder)

    def remove(path, or_else):
        if not path.name.startswith(".clipkit"):
            for folder in [parent for parent in or_else.parents if parent.is_relative_to(made)][:-1]:
                assert {folder, folder.parent} <= set(seen)
            checked.append(path)
        whole["_remove"](path, or_else)

    for name, function in (("_rename", rename), ("_remove", remove), ("sync_folder", sync_folder)):
        monkeypatch.setattr(transfer, name, function)
    items, checked, made = [item for item in items_of(photos) if not Path(item.path).is_symlink()], [], out
    assert sort(items, out, "move") == []
    assert len(checked) == 3
    seen.clear()
    shutil.rmtree(photos)
    made = photos
    assert undo(out) == (3, [])
    assert len(checked) == 6


def test_a_really_full_disk(photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        for number in range(40):
            (photos / f"{number}.bin").write_bytes(os.urandom(3000))
        before = tree(photos)
        for how in ("copy", "move"):
            with pytest.raises(ClipkitError, match="is full"):
                sort(items_of(photos), disk / "out", how)
            assert undo(disk / "out")[1] == []
            assert tree(photos) == before
            assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_that_cannot_be_taken_is_named_and_the_others_go(photos, tmp_path):
    items, out = items_of(photos), tmp_path / "out"
    (photos / "y/a.jpg").unlink()
    (refused,) = sort(items, out, "move")
    assert (Path(refused.path).name, refused.reason) == ("a.jpg", "No such file or directory")
    assert undo(out)[0] == len(items) - 1


PARTS = st.sampled_from(["a", "A", "b.jpg", "B.JPG", "ü", "ü", " ", "x\ny", "-", "ÿ"])
FILES = st.dictionaries(
    st.lists(PARTS, min_size=1, max_size=3).map("/".join),
    st.tuples(st.binary(max_size=3), st.sampled_from(["cat", "dog", "unsure", None]), st.booleans()),
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES, again=st.booleans(), how=st.sampled_from(HOWS), inside=st.booleans())
def test_undo_of_a_sort_is_the_identity(tmp_path, files, again, how, inside):
    home = tmp_path / f"{np.random.default_rng().integers(2**60):x}"
    folder = home / "f"
    folder.mkdir(parents=True)
    items = []
    for name, (data, label, is_link) in files.items():
        path = folder / name
        if any(above.exists() and not above.is_dir() for above in path.parents) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_link and items:
            path.symlink_to(items[0].path)
        else:
            path.write_bytes(data)
        items.append(Item(str(path), () if label is None else (label,)))
    before = tree(home)
    out = folder if inside and how == "move" else home / "out"
    assert sort(items, out, how) == []
    if again:
        assert sort([item for item in items if os.path.lexists(item.path)], out, how) == []
    assert undo(out)[1] == []
    assert tree(home) == before
    shutil.rmtree(home)
