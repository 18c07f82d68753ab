"""Files to be sorted, sorts, and what stands where afterwards."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from clipkit.classification.sort.journal import Journal
from clipkit.classification.sort.plan import Item, plan
from clipkit.classification.sort.transfer import carry_out, settle

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


def few(folder):
    """Three files and a link."""
    folder.mkdir()
    (folder / "x").mkdir()
    for name in ("a", "x/a", "b"):
        (folder / name).write_bytes(name.encode() * 300)
    (folder / "x/l").symlink_to("../a")
    return folder


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


@pytest.fixture
def far(tmp_path):
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK) or place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    folder = place / f"clipkit-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
