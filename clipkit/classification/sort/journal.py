"""The journal of a sorted folder: what is to be put there, on the disk before it is done."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.classification.sort.plan import How
from clipkit.core import ClipkitError, sync_folder
from clipkit.storage import one_at_a_time

__all__ = ["JOURNAL", "Journal", "Record", "is_begun"]

JOURNAL = ".clipkit-sort.jsonl"
JOURNAL_VERSION = 1


@dataclass(frozen=True)
class Record:
    """A step as it stands in the journal, with what tells whether it was taken, and what was changed since."""

    how: How
    path: str
    """Where the file was, absolute."""
    target: str
    """Where it goes, ``FOLDER/NAME``."""
    size: int
    """Of the file before."""
    time: int
    """When it was changed, in nanoseconds."""
    hash: str | None = None
    """BLAKE2b of its content, 16 bytes in hexadecimal digits, where it is copied, be it to another disk."""
    link: str | None = None
    """What it says, where it is a symbolic link that is moved."""
    points: str | None = None
    """What the link says that is made at the target."""

    @property
    def folder(self) -> str:
        """Of the target."""
        return str(PurePosixPath(self.target).parent)


class Journal:
    """Open, and held by this process alone until `close`.

    A folder that the sort makes comes into being with the journal in it, and goes with it: both are prepared in a
    hidden folder beside, so that a kill leaves no trace that the next call does not find.
    """

    def __init__(self, root: Path, descriptor: int):
        self.root, self._descriptor = root, descriptor
        self.records: dict[str, Record] = {}
        """The last record of each target, in the order in which they were written."""
        self.labels: dict[str, str] = {}
        """The folder of each label."""
        self.made: list[str] = []
        """Folders that were made."""
        self.token, self.made_root = "", False
        self._end = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, root: Path, *, create: bool) -> Iterator["Journal"]:
        """Open the journal of a folder.

        Args:
            root: the folder, resolved.
            create: make the folder and the journal where they are missing.

        Raises:
            ClipkitError: where there is none, it is damaged, or another process holds it.
        """
        with one_at_a_time(root):
            _sweep(root)
            if create:
                _prepare(root)
            elif not root.is_dir():
                raise ClipkitError(f"no such folder: {root}; what a sort made there was taken back, or it never was")
            try:
                descriptor = os.open(root / JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                raise ClipkitError(f"{root} holds no sort that could be undone: it has no {JOURNAL}") from None
            except OSError as error:
                raise ClipkitError(f"cannot open {root / JOURNAL}: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise ClipkitError(f"another process sorts into {root} right now; wait for it") from None
        journal = cls(root, descriptor)
        try:
            journal._read()
            yield journal
        finally:
            os.close(descriptor)

    @property
    def scratch(self) -> str:
        """The name under which a file is copied, until it is whole."""
        return f".clipkit-{self.token}.part"

    def name(self, labels: Mapping[str, str]) -> None:
        """Keep which folder each label has."""
        new = {label: folder for label, folder in labels.items() if self.labels.get(label) != folder}
        self._append([{"label": label, "folder": folder} for label, folder in new.items()])
        self.labels |= new

    def add(self, records: Sequence[Record]) -> None:
        """Write down what comes next, and the folders that have to be made for it; it is on the disk afterwards."""
        folders = list(dict.fromkeys(record.folder for record in records))
        new = [name for name in folders if name not in self.made and not os.path.lexists(self.root / name)]
        self._append([*({"made": name} for name in new), *map(_line_of, records)])
        self.made += new
        for record in records:
            self.records.pop(record.target, None)  # so that the order is that of the last writing
            self.records[record.target] = record

    def remove(self) -> None:
        """Remove the journal and the folders that were made, except where something else is in them."""
        self.remove_folders()
        with one_at_a_time(self.root):
            if self.made_root and [path.name for path in self.root.iterdir()] == [JOURNAL]:
                self.root.rename(_beside(self.root))
                _sweep(self.root)
            else:
                (self.root / JOURNAL).unlink()

    def remove_folders(self) -> None:
        """Remove the folders that were made and hold nothing."""
        for name in reversed(self.made):
            with contextlib.suppress(OSError):
                (self.root / name).rmdir()

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        if lines:
            os.ftruncate(self._descriptor, self._end)  # of a line that is not whole nothing has begun
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()  # ASCII: names need not be Unicode
            end = self._end + len(data)
            while data:
                data = data[os.write(self._descriptor, data) :]
            self._end = end  # not before all is written, so that what a full disk cut short is cut away
            os.fsync(self._descriptor)

    def _read(self) -> None:
        raw = (self.root / JOURNAL).read_bytes()
        lines = raw.rpartition(b"\n")[0].split(b"\n")
        self._end = len(raw) - len(raw.rpartition(b"\n")[2])
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    if entry["sort"] > JOURNAL_VERSION:
                        raise ClipkitError(f"{self.root / JOURNAL} was written by a newer clipkit; update")
                    self.token, self.made_root = entry["token"], entry["made"]
                elif "label" in entry:
                    self.labels[entry["label"]] = entry["folder"]
                elif "made" in entry:
                    self.made.append(entry["made"])
                else:
                    record = Record(**entry)
                    self.records.pop(record.target, None)
                    self.records[record.target] = record
            except (ValueError, KeyError, TypeError) as error:
                message = f"{self.root / JOURNAL}, line {number} is damaged ({error}); nothing was touched"
                raise ClipkitError(message) from error


def _line_of(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


def _beside(root: Path) -> Path:
    return root.with_name(f".{root.name}.clipkit-sort")


def _sweep(root: Path) -> None:
    """Remove what a kill left of a folder or a journal that was coming into being, or going."""
    try:
        # Where there is nothing, nothing is tried: read-only disks refuse even that.
        if os.path.lexists(_beside(root)):
            (_beside(root) / JOURNAL).unlink(missing_ok=True)
            _beside(root).rmdir()
        if (root / JOURNAL).is_file() and not is_begun(root):
            (root / JOURNAL).unlink()
    except OSError as error:
        raise ClipkitError(f"cannot remove {error.filename}: {error.strerror}") from error


def is_begun(root: Path) -> bool:
    """Whether a folder has a journal whose first line is whole; of another one nothing was done yet."""
    try:
        with (root / JOURNAL).open("rb") as file:
            return file.readline().endswith(b"\n")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except OSError:
        return True  # to open it says what the matter is


def _prepare(root: Path) -> None:
    header = (
        json.dumps({"sort": JOURNAL_VERSION, "token": secrets.token_hex(6), "made": not os.path.lexists(root)}) + "\n"
    )
    try:
        if not os.path.lexists(root):
            _beside(root).mkdir()
            _write(_beside(root) / JOURNAL, header)
            sync_folder(_beside(root))
            _beside(root).rename(root)
            sync_folder(root.parent)
        elif not root.is_dir():
            raise ClipkitError(f"{root} is a file; name a folder to sort into")
        elif not is_begun(root):
            _write(root / JOURNAL, header)
            sync_folder(root)
    except OSError as error:
        raise ClipkitError(f"cannot sort into {root}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
