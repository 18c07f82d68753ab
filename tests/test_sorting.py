"""Sorting files into folders and back: names, plans, and that whatever happens in between, nothing is lost."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit import placing
from clipkit.errors import ClipkitError
from clipkit.placing import carry_out, settle, undo
from clipkit.sort_journal import JOURNAL, Journal
from clipkit.sorting import Item, Step, folders_of, numbered, plain_form, plan, safe_name
from tests.kills import apart, killed

HOWS = ("copy", "link", "move")


def tree(folder):
    """All that is below a folder: kind, content, time and rights of files; what links say."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path), about.st_mtime_ns)  # noqa: PTH115
        elif path.is_dir():
            found[name] = ("folder",)
        else:
            found[name] = ("file", path.read_bytes(), about.st_mtime_ns, stat.S_IMODE(about.st_mode))
    return found


def planned(journal, items):
    """Steps for items, as the command plans them."""
    done = settle(journal)
    there = (f"{path.parent.name}/{path.name}" for path in journal.root.glob("*/*"))
    moved = {r.path for r in journal.records.values() if r.how == "move" and (r.path, r.folder) in done}
    return plan([item for item in items if item.path not in moved], [*there, *journal.records], done)


def sort(items, out, how):
    with Journal.open(out, create=True) as journal:
        return carry_out(journal, planned(journal, items), how)


def items_of(folder, labels=("cat", "dog", "unsure")):
    """Each file below a folder, with a label by its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [Item(str(path), (labels[sum(path.read_bytes()) % len(labels)],)) for path in files]


@pytest.fixture
def photos(tmp_path):
    """Files of one name in several folders, duplicates, strange names, links."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.jpg", "x/a.jpg", "x/A.JPG", "y/a.jpg", "ü b\n.jpg", "plain", "x/d.tar.gz"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([number // 2]) * 1000)
        os.utime(folder / name, ns=(10**18 + number, 10**18 + 10 * number))
    (folder / "x/link.jpg").symlink_to("../a.jpg")
    (folder / "y/straight.jpg").symlink_to(folder / "plain")
    (folder / "a.jpg").chmod(0o640)
    return folder


# Names


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("cat", "cat"),
        ("a red heart", "a red heart"),
        ("a/b", "a_b"),
        ("a\\b", "a_b"),
        ("..", "_"),
        (".", "_"),
        ("../../etc", "__.._etc"),
        ("/", "_"),
        (" ", "_"),
        (".hidden", "_hidden"),
        ("dot.", "dot"),
        ("a\nb\0c", "a_b_c"),
        ("grüße 猫", "grüße 猫"),
        ("u\u0308", "ü"),
        ("CON", "CON_"),
        ("nul.txt", "nul.txt_"),
        ('what?"<>|*:', "what_______"),
    ],
)
def test_a_label_becomes_a_name_that_a_folder_can_have(label, name):
    assert safe_name(label) == name


@given(st.text(max_size=60) | st.text("a猫.", min_size=100, max_size=200))
def test_any_label_is_a_single_harmless_name(label):
    name = safe_name(label)
    assert name
    assert name not in (".", "..")
    assert not name.startswith(".")
    assert "/" not in name
    assert "\0" not in name
    assert len(name.encode()) <= 120
    assert Path("x", name).parent == Path("x")


def test_long_labels_that_begin_alike_stay_apart():
    names = {safe_name("猫" * 200 + end) for end in "abc"}
    assert len(names) == 3
    assert all(name.startswith("猫" * 30) for name in names)


@settings(max_examples=100)
@given(st.lists(st.text("aAäÄ/._ u\u0308ß", min_size=1, max_size=4), unique=True, max_size=12))
def test_no_two_labels_share_a_folder(labels):
    found = folders_of(labels, {}, lambda name: name == "a")
    plain = [plain_form(name) for name in found.values()]
    assert len(set(plain)) == len(labels)
    assert not {"a", "unsure", "background"} & set(found.values())
    assert folders_of(labels[::-1], found, lambda name: False) == found  # as they were called before


def test_labels_called_as_the_places_of_the_unsure_get_others():
    assert folders_of(["unsure", "Background"], {}, lambda _: False) == {
        "unsure": "unsure-2",
        "Background": "Background-2",
    }


def test_names_are_numbered_before_the_ending_and_cut_to_what_fits():
    assert numbered("a.jpg", 2) == "a-2.jpg"
    assert numbered("a", 13) == "a-13"
    assert numbered(".x", 2) == ".x-2"
    long = numbered("ü" * 125 + ".jpg", 100)
    assert len(os.fsencode(long)) <= 255
    assert long.endswith("ü-100.jpg")


def slow_plan(items, taken, done):
    """Twin: tries every name against all others."""
    used, steps, seen = [plain_form(name) for name in taken], [], set(done)
    for item in items:
        for folder in item.folders:
            if (item.path, folder) in seen:
                continue
            seen.add((item.path, folder))
            name = item.path.rpartition("/")[2]
            names = itertools.chain([name], (numbered(name, n) for n in itertools.count(2)))
            free = next(each for each in names if plain_form(f"{folder}/{each}") not in used)
            used.append(plain_form(f"{folder}/{free}"))
            steps.append(Step(item.path, f"{folder}/{free}"))
    return steps


NAMES = st.sampled_from(["a.jpg", "A.JPG", "a-2.jpg", "b", "ü.png", "u\u0308.png"])
ITEMS = st.builds(
    lambda above, name, folders: Item(f"/{above}/{name}", tuple(folders)),
    st.sampled_from("xyz"),
    NAMES,
    st.lists(st.sampled_from(["cat", "dog"]), unique=True),
)


@given(st.lists(ITEMS, max_size=12), st.lists(NAMES, max_size=3))
def test_a_plan_gives_every_file_a_name_of_its_own(items, there):
    taken = [f"cat/{name}" for name in there]
    steps = plan(items, taken, {("/x/b", "dog"): "dog/b"})
    assert steps == slow_plan(items, taken, {("/x/b", "dog"): "dog/b"})
    targets = [plain_form(step.target) for step in steps]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & {plain_form(name) for name in taken}


def test_ten_thousand_files_of_one_name_are_planned_at_once():
    items = [Item(f"/{n}/image.jpg", ("cat",)) for n in range(10_000)]
    began = time.process_time()
    steps = plan(items, [], {})
    assert steps[-1].target == "cat/image-10000.jpg"
    assert time.process_time() - began < 5


# Doing and undoing


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


@pytest.fixture
def far(tmp_path):
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK) or place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    folder = place / f"clipkit-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


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

    monkeypatch.setattr(placing.os, "link", link)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_without_hard_links_it_goes_all_the_same(photos, tmp_path, monkeypatch, code):
    """Where one disk is mounted twice, and on disks that know no links."""
    before, out = tree(photos), tmp_path / "out"
    whole = placing._rename

    def rename(path, target):
        if code == errno.EXDEV and not path.name.startswith(".clipkit"):
            raise OSError(code, os.strerror(code))
        return whole(path, target)

    monkeypatch.setattr(placing, "_rename", rename)
    if code == errno.EPERM:
        refuse_links(monkeypatch, code)
    sort(items_of(photos), out, "move")
    assert not items_of(photos)
    assert undo(out)[1] == []
    assert tree(photos) == before


def test_a_full_disk_is_one_line_and_can_be_undone(photos, tmp_path, monkeypatch):
    before, out = tree(photos), tmp_path / "out"
    left = [3]
    whole = placing.shutil.copystat

    def copystat(*about, **more):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*about, **more)

    monkeypatch.setattr(placing.shutil, "copystat", copystat)
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
    monkeypatch.setattr(placing.shutil, "copystat", copystat)
    assert sort(items_of(photos), out, "copy") == []
    assert undo(out) == (9, [])
    assert tree(photos) == before


def test_a_disk_that_is_full_before_the_first_file(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    photos = few(tmp_path / "photos")
    with Journal.open(tmp_path / "out", create=True) as journal:
        steps = planned(journal, items_of(photos))
        monkeypatch.setattr("clipkit.sort_journal.os.write", write)
        with pytest.raises(ClipkitError, match="is full; 0 of 4 files are there"):
            carry_out(journal, steps, "copy", labels={"cat": "cat"})
    monkeypatch.undo()
    assert undo(tmp_path / "out") == (0, [])


def test_folders_are_on_the_disk_before_the_only_copy_is_in_them(tmp_path, monkeypatch):
    """What moves to another disk leaves the first only when even its new folder would outlast a power cut."""
    photos, out = few(tmp_path / "photos"), tmp_path / "out"
    whole, seen = {name: getattr(placing, name) for name in ("_rename", "_remove", "sync_folder")}, []

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
        monkeypatch.setattr(placing, name, function)
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


# Journals


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
            full.setattr("clipkit.sort_journal.os.write", write)
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


# Kills


def recovered(photos, out, before):
    """Undo whatever is there to be undone; a kill may have come before anything began, or after all had ended."""
    if out.exists() or out.with_name(f".{out.name}.clipkit-sort").exists():
        try:
            assert undo(out)[1] == []
        except ClipkitError as error:
            assert "no such folder" in str(error)  # noqa: PT017
    assert tree(photos) == before
    assert not [path for path in out.parent.iterdir() if "out" in path.name]


def few(folder):
    folder.mkdir()
    (folder / "x").mkdir()
    for name in ("a", "x/a", "b"):
        (folder / name).write_bytes(name.encode() * 300)
    (folder / "x/l").symlink_to("../a")
    return folder


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
from tests.test_sorting import items_of, sort
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
        process = subprocess.Popen(call, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
        process.stdout.readline()
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        recovered(photos, out, before)


# Any tree


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
