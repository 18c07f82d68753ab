"""A folder renewed: the new one is made beside the old one and takes its place at once.

While it is made it stands in a hidden folder, whose name tells what it will hold. Then both are exchanged in one step,
so a kill at any moment leaves the old folder or the new one, whole, under its name. Where a file system cannot exchange
two folders (NFS, macOS), two renames do it, and `mend` finishes what a kill between them left.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from clipkit.core import ClipkitError, sync_folder

__all__ = [
    "PLAN",
    "is_held",
    "mend",
    "one_at_a_time",
    "others",
    "put_in_place",
    "remove_folder",
    "replacement_folder",
    "share",
    "tidy",
]

DIGITS = 16  # of an identity, in the names of hidden folders
PLAN = Path(".work", "plan.json")  # says what is being made in a folder; there until it is whole
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time look at a folder and begin or replace it; no file is left, as its parent is locked."""
    try:
        folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise ClipkitError(f"cannot make {folder}: {error.strerror or error}") from error
    try:
        _lock(descriptor, fcntl.LOCK_EX, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:  # Lustre that is mounted without them, NFS without its daemon
        raise ClipkitError(
            f"cannot lock {folder}: {error.strerror or error}; its file system gives no locks, name a folder on another"
        ) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill in the middle leaves nothing under its name: it is renamed first.

    Raises:
        ClipkitError: where it cannot be removed.
    """
    real = folder.resolve()
    _remove(real, real)


def _remove(folder: Path, of: Path) -> None:
    aside = of.with_name(f".{of.name}.removed.{secrets.token_hex(6)}")
    try:
        folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise ClipkitError(f"cannot remove {folder}: {error.strerror or error}") from error


def replacement_folder(folder: Path, identity: str) -> Path:
    """The hidden folder in which what will replace `folder` is made.

    Args:
        folder: resolved.
        identity: hexadecimal digits that tell what it will hold.
    """
    return folder.with_name(f".{folder.name}.update.{identity[:DIGITS]}")


def _hidden(folder: Path, what: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(folder.name)}\.{what}\.[0-9a-f]+")
    return sorted(path for path in folder.parent.iterdir() if name.fullmatch(path.name))


def others(folder: Path, identity: str) -> list[Path]:
    """Hidden folders in which something else was made to replace `folder`, and has not replaced it."""
    return [path for path in _hidden(folder, "update") if path != replacement_folder(folder, identity)]


def put_in_place(new: Path, folder: Path) -> None:
    """Let a hidden folder take the place of `folder`, and remove what stood there; within `one_at_a_time`.

    Raises:
        ClipkitError: where that cannot be done; one of the two stands in the place then.
    """
    _sync(new)  # what replaces must be on the disk before what is replaced is gone
    try:
        if not folder.exists():
            new.rename(folder)
            return
        for left in _hidden(folder, "before"):  # or `mend` could take it for what stood there last
            _remove(left, folder)
        old = new
        if not _exchange(new, folder):
            old = folder.with_name(f".{folder.name}.before.{new.name.rpartition('.')[2]}")
            folder.rename(old)
            new.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ClipkitError(f"cannot replace {folder} by {new}: {error.strerror or error}") from error
    _remove(old, folder)


def mend(folder: Path) -> None:
    """Finish what a kill between the two renames of `put_in_place` left; within `one_at_a_time`."""
    if not folder.exists():
        for old in _hidden(folder, "before"):
            new = replacement_folder(folder, old.name.rpartition(".")[2])
            (new if new.is_dir() else old).rename(folder)


def tidy(folder: Path) -> None:
    """Remove what kills left beside `folder`: what was replaced or half removed, and updates that nobody works on.

    Within `one_at_a_time`, and when `folder` is whole.
    """
    for path in (*_hidden(folder, "before"), *_hidden(folder, "update")):
        if not is_held(path):
            _remove(path, folder)
    for path in _hidden(folder, "removed"):
        shutil.rmtree(path, ignore_errors=True)


def share(folder: Path) -> int:
    """Hold a folder with a plan, as others may too, until the process ends or the descriptor it returns is closed."""
    descriptor = os.open(folder / PLAN, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_SH, folder)
    except ClipkitError:
        os.close(descriptor)
        raise
    return descriptor


def is_held(folder: Path) -> bool:
    """Whether a living process holds it, see `share`."""
    try:
        descriptor = os.open(folder / PLAN, os.O_RDWR)  # over NFS only what can be written is locked
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)
