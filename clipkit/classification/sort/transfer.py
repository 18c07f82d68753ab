"""Files put where a plan says, and put back: each step stands in a journal on the disk before it is taken.

So whatever ends the work (a kill, a full disk, a power cut), the journal and the files together tell how far it came:
the same sort goes on, and `undo` restores what was there before. No step replaces a file, and none removes the last
copy of one.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from clipkit.classification.sort.journal import JOURNAL, Journal, Record
from clipkit.classification.sort.plan import How, Step, plain_form
from clipkit.core import ClipkitError, sync_folder

__all__ = ["Refused", "carry_out", "settle", "undo"]

BLOCK = 64  # steps that are written down, and brought to the disk, together; an fsync takes milliseconds
PIECE = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Refused:
    """A step that was not taken, or not taken back."""

    path: str
    """Where the file comes from."""
    target: str
    """Where it goes, in the sorted folder."""
    reason: str


def carry_out(
    journal: Journal,
    steps: Sequence[Step],
    how: How,
    advance: Callable[[int], None] = lambda count: None,
    *,
    labels: Mapping[str, str] | None = None,
) -> list[Refused]:
    """Copy, link or move files. A link is symbolic, to the file's absolute path; a symbolic link that is moved is made
    anew, so that it leads to where it led.

    Args:
        journal: of the folder that they go into.
        steps: from `clipkit.classification.sort.plan.plan`.
        how: what is done.
        advance: is told how many were done.
        labels: the folder of each label, which the journal keeps.

    Returns:
        The steps that could not be taken.

    Raises:
        ClipkitError: where the disk is full; what was done so far stands in the journal.
    """
    refused = []
    todo = iter(steps)
    taken = []
    with _full_disk_told(journal, taken, len(steps)):
        journal.name(labels or {})
    while block := list(islice(todo, BLOCK)):
        records = []
        for step in block:
            try:
                records.append(_described(step, how, journal.root))
            except OSError as error:
                refused.append(Refused(step.path, step.target, _why(error)))
        with _full_disk_told(journal, taken, len(steps)):
            journal.add(records)
            for record in records:
                try:
                    _take(journal, record)
                    taken.append(record.target)
                except OSError as error:
                    if error.errno in FULL:
                        raise
                    refused.append(Refused(record.path, record.target, _why(error)))
            for name in {record.folder for record in records}:
                with contextlib.suppress(FileNotFoundError):
                    sync_folder(journal.root / name)
        advance(len(block))
    return refused


@contextlib.contextmanager
def _full_disk_told(journal: Journal, taken: Sequence[str], of: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise ClipkitError(f"cannot write {journal.root / JOURNAL}: {error.strerror}") from error
        raise ClipkitError(
            f"the disk of {journal.root} is full; {len(taken):,} of {of:,} files are there. Make room and run this "
            f"again, or take it back: clipkit classify --undo {journal.root}"
        ) from error


def _why(error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return "another file took its name meanwhile; run this again"
    return error.strerror or str(error)


def settle(journal: Journal, *, act: bool = True) -> dict[tuple[str, str], str]:
    """Finish what a kill left half done, forget what was not begun, and say what stands where it belongs.

    Args:
        journal: of the sorted folder.
        act: whether anything on the disk may be touched.

    Returns:
        For each path and folder the target.
    """
    if act:
        _clean(journal)
    done = {}
    for record in list(journal.records.values()):
        path, target = Path(record.path), journal.root / record.target
        if record.how == "move":
            if _is_there(path) and _is_there(target) and _is_half_moved(record, path, target) and act:
                path.unlink()
            taken = _is_there(target) and not _is_there(path)
        elif record.how == "link":
            taken = _points(target, record.points)
        else:
            taken = _has_stamp(path, record) and target.is_file() and target.stat().st_size == record.size
        if taken:
            done[record.path, record.folder] = record.target
        elif not _is_there(target) and _is_there(path):
            del journal.records[record.target]  # its name is free again
    return done


def undo(root: Path, advance: Callable[[int], None] = lambda count: None) -> tuple[int, list[Refused]]:
    """Put everything back that sorts put into a folder, the last first; killed, it goes on when it is called again.

    What was changed since is not touched, nor is a copy whose original is gone. Folders that were made are removed
    where nothing is left in them, and so is the journal when all is done.

    Args:
        root: the sorted folder.
        advance: is told how many files were looked at.

    Returns:
        How many files were put back or removed, and those that were not.

    Raises:
        ClipkitError: where the folder holds no sort, or the disk is full.
    """
    real = root.resolve()
    back, refused, homes = 0, [], set()
    with Journal.open(real, create=False) as journal:
        _clean(journal)
        for record in reversed(list(journal.records.values())):
            try:
                if record.how == "move" and record.hash is not None:  # it may have been on its way to another disk
                    Path(record.path).with_name(journal.scratch).unlink(missing_ok=True)
                back += _take_back(journal, record)
                homes.add(Path(record.path).parent)
            except _Changed as error:
                refused.append(Refused(record.path, record.target, str(error)))
            except OSError as error:
                if error.errno in FULL:
                    raise ClipkitError(f"the disk of {record.path} is full; make room and run this again") from error
                refused.append(Refused(record.path, record.target, _why(error)))
            advance(1)
        if refused:
            journal.remove_folders()
            return back, refused
        for folder in homes:  # before the journal goes
            with contextlib.suppress(OSError):
                sync_folder(folder)
        journal.remove()
    return back, []


def _clean(journal: Journal) -> None:
    """Remove the beginning of a copy that a kill left."""
    for name in {record.folder for record in journal.records.values()}:
        with contextlib.suppress(NotADirectoryError):
            (journal.root / name / journal.scratch).unlink(missing_ok=True)


class _Changed(Exception):
    """What stands there is not what was put there."""


def _take_back(journal: Journal, record: Record) -> bool:
    """Whether there was anything to take back."""
    path, target = Path(record.path), journal.root / record.target
    if not _is_there(target):
        if record.how == "move" and not _is_there(path):
            raise _Changed(f"it is gone from {target}, and not back in its place")
        return False
    if record.how != "link" and _is_alone(path, target):
        raise _Changed(f"the place where it was leads to {target} itself by now, which is the only one; it stays")
    if record.points is not None:
        if not _points(target, record.points):
            raise _Changed(f"{target} was changed since")
    elif not _is_unchanged(target, record):
        raise _Changed(f"{target} was changed since")
    if record.how == "copy" and not (_has_stamp(path, record) or _has_content(path, record)):
        raise _Changed(f"its original was changed or is gone; the copy stays: {target}")
    if record.how == "move":
        if _is_there(path):
            if not _is_half_moved(record, path, target):
                raise _Changed(f"another file has its place; it stays in {target}")
        else:
            _make(path.parent)
            if record.link is None:
                _moved(journal, record, target, path)
                return True
            path.symlink_to(record.link)
            _keep_times(target, path)
    target.unlink()
    return True


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _points(path: Path, to: str | None) -> bool:
    return path.is_symlink() and os.readlink(path) == to  # noqa: PTH115 (the words as they stand)


def _has_stamp(path: Path, record: Record) -> bool:
    try:
        status = path.stat() if record.how == "copy" else path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (record.size, record.time)


def _has_content(path: Path, record: Record) -> bool:
    try:
        return path.stat().st_size == record.size and path.is_file() and _hash(path) == record.hash
    except OSError:
        return False


def _is_unchanged(target: Path, record: Record) -> bool:
    if target.is_symlink():
        return False
    # Other disks keep other times, but a hash is there then.
    return _has_stamp(target, record) if record.hash is None else _has_content(target, record)


def _is_half_moved(record: Record, path: Path, target: Path) -> bool:
    """Whether both are the file that was moved, which a kill can leave, so that either may go."""
    if _is_alone(path, target):
        return False
    if record.link is not None:
        return _points(path, record.link) and _points(target, record.points)
    if path.is_symlink() or target.is_symlink():
        return False
    if os.path.samestat(path.lstat(), target.lstat()):
        return True
    return record.hash is not None and _has_content(path, record) and _has_content(target, record)


def _is_alone(path: Path, target: Path) -> bool:
    """Whether both lead to one file that is gone with either: a folder or a file was renamed, linked or mounted since.

    Links to a file are told from ways to one link by their number, and by the folder that they stand in.
    """
    try:
        status = target.lstat()
        if os.path.samestat(path.lstat(), status):
            one_name = plain_form(path.name) == plain_form(target.name)
            return status.st_nlink < 2 or (one_name and path.parent.samefile(target.parent))
        one_file = os.path.samestat(path.stat(), status)
        return one_file and (status.st_nlink < 2 or os.path.realpath(path) == os.path.realpath(target))
    except OSError:
        return False


def _described(step: Step, how: How, root: Path) -> Record:
    path = Path(step.path)
    status = path.lstat() if how == "move" else path.stat()
    record = Record(how, step.path, step.target, status.st_size, status.st_mtime_ns)
    if how == "link":
        return replace(record, points=step.path)
    if stat.S_ISLNK(status.st_mode):
        link = os.readlink(path)  # noqa: PTH115
        return replace(record, link=link, points=str(path.parent / link))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no file")
    if how == "copy" or status.st_dev != root.stat().st_dev:
        return replace(record, hash=_hash(path))
    return record


def _take(journal: Journal, record: Record) -> None:
    path, target = Path(record.path), journal.root / record.target
    _make(target.parent)
    if record.how == "link":
        target.symlink_to(record.points or "")
    elif record.how == "copy":
        _copied(record, path, target, journal.scratch)
    elif record.link is not None:
        target.symlink_to(record.points or "")
        _keep_times(path, target)
        _remove(path, or_else=target)
    else:
        _moved(journal, record, path, target)


def _make(folder: Path) -> None:
    """Make a folder that is on the disk before a file in it is the only one; an fsync for each that is made."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _moved(journal: Journal, record: Record, path: Path, target: Path) -> None:
    if record.hash is None:
        try:
            _rename(path, target)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        # Another file system although its number is the same, as of a bind mount.
        record = replace(record, hash=_hash(path))
        journal.add([record])
    _copied(record, path, target, journal.scratch)
    sync_folder(target.parent)
    _remove(path, or_else=target)


def _rename(path: Path, target: Path) -> None:
    """Rename a file without ever replacing another, which `os.rename` does."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.EXDEV, errno.ENOENT, *FULL):
            raise
        # A file system without hard links, or a file of another user's that must not have one.
        if _is_there(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        path.rename(target)
    else:
        _remove(path, or_else=target)


def _remove(path: Path, or_else: Path) -> None:
    try:
        path.unlink()
    except OSError:
        or_else.unlink()  # so that there is one again
        raise


def _copied(record: Record, path: Path, target: Path, scratch: str) -> None:
    if _is_there(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    beside = target.with_name(scratch)
    beside.unlink(missing_ok=True)
    try:
        digest = blake2b(digest_size=16)
        with path.open("rb") as source, beside.open("xb") as copy:
            while piece := source.read(PIECE):
                digest.update(piece)
                copy.write(piece)
            copy.flush()
            _keep_times(path, beside)
            os.fsync(copy.fileno())
        if digest.hexdigest() != record.hash:
            raise OSError(errno.EBUSY, "it was changed meanwhile; run this again")
        _rename(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _keep_times(path: Path, target: Path) -> None:
    """And rights, where the file system lets them be set: vfat, SMB and FUSE may refuse either."""
    try:
        with contextlib.suppress(NotImplementedError):
            shutil.copystat(path, target, follow_symlinks=not target.is_symlink())
    except OSError as error:
        if error.errno in FULL:
            raise


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
