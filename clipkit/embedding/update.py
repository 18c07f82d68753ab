"""What earlier embeddings hold of samples that have not changed, so that an update embeds only the others.

Beside each part stands ``stamps/*.parquet``, a row per sample of the source, those that could not be used among them:
what its image and its words were stamped with (`clipkit.data.sources.Stamp`; zeros where that is not known), its row in
the metadata, and why it was left out. An image is known again by its stamp, a caption of it by its text.
"""

import errno
import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.core import SIDES, ClipkitError, atomic_write, read_json, warn
from clipkit.data.sources import Stamp
from clipkit.embedding.store import Embedded, part_table_path, part_vectors_path
from clipkit.embedding.tables import write_parquet
from clipkit.storage import WORK, Checksum, file_flaw, size_flaw, state_of

__all__ = ["EarlierEmbeddings", "KnownSample", "part_files", "refuse_unlike", "stamps_path", "write_stamps"]

UNKNOWN = bytes(16)
ALIKE = ("model", "sides", "precision")  # in what an artifact was made from; where one differs, so does every vector
NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP)


def stamps_path(folder: Path, name: str) -> Path:
    """Where a part's stamps stand."""
    return folder / "stamps" / f"stamps_{name}.parquet"


def write_stamps(out: Path, name: str, rows: range, stamps: Sequence[Stamp], embedded: Embedded) -> dict[str, Checksum]:
    """Write the stamps of one part's samples, atomically.

    Args:
        out: the artifact.
        name: of the part.
        rows: of the source.
        stamps: of these rows, taken before the samples were read: of a file that changes meanwhile the old one counts.
        found: what came of these rows.
    """
    place = {row: at for at, row in enumerate(embedded.rows)}
    reasons = {line["row"]: line["reason"] for line in embedded.left_out}
    unread = set(embedded.unread)
    known_stamps = [Stamp(None, None) if row in unread else stamp for row, stamp in zip(rows, stamps, strict=True)]
    columns = {
        "image": pa.array([stamp.image or UNKNOWN for stamp in known_stamps], pa.binary(16)),
        "words": pa.array([stamp.words or UNKNOWN for stamp in known_stamps], pa.binary(16)),
        "row": pa.array([place.get(row) for row in rows], pa.int32()),
        "reason": pa.array([reasons.get(row) for row in rows], pa.string()),
    }
    path = stamps_path(out, name)
    # Hashes are all different: a dictionary of them would be what they take once more.
    return {path.relative_to(out).as_posix(): write_parquet(path, pa.table(columns), use_dictionary=["reason"])}


def refuse_unlike(folder: Path, made_from: dict[str, Any]) -> None:
    """Refuse to bring embeddings up to date that were made in another way.

    Args:
        folder: of the embeddings; it may be empty, and hold what is none, which others refuse.
        made_from: what they are to be made from now.

    Raises:
        ClipkitError: where model, sides or precision differ, or an older clipkit left no stamps there.
    """
    state, facts = state_of(folder)
    before = facts.get("made_from", {})
    if facts.get("kind") != "embeddings" or before == made_from:
        return
    if state == "finished" and not (folder / "stamps").is_dir():
        raise ClipkitError(f"{folder} was made by an older clipkit and does not say of what; make it anew: --overwrite")
    for what in ALIKE:
        old, new = (_told(value) for value in (before.get(what), made_from[what]))
        if old != new:
            raise ClipkitError(
                f"{folder} was embedded with {what} {old}, not {new}; --update keeps to that, --overwrite makes it anew"
            )


def _told(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)[:12]


@dataclass(frozen=True)
class KnownSample:
    """What is known of a sample whose image has not changed (where only texts are embedded: whose words have not)."""

    reason: str | None
    """Why it cannot be used; None where it can."""
    image: np.ndarray | None
    """float16 ``[dim]``; None where only texts are embedded."""
    captions: Sequence[str]
    """As they were."""
    texts: np.ndarray
    """float16 ``[captions, dim]``."""

    def text_vectors(self, captions: Sequence[str]) -> list[np.ndarray | None]:
        """For each caption, as they are now, its embedding where it is one that there was before."""
        left = defaultdict(list)
        for caption, vector in zip(self.captions, self.texts, strict=True):
            left[caption].append(vector)
        return [left[caption].pop(0) if left[caption] else None for caption in captions]


class _Part(NamedTuple):
    folder: Path
    name: str
    images: int
    captions: int
    files: dict[str, Checksum]


class EarlierEmbeddings:
    """Every sample of earlier embeddings, by its stamp. 32 bytes of memory for each.

    Args:
        folders: of embeddings, finished or not; those made in another way are passed over.
        made_from: what the new ones are made from.
    """

    def __init__(self, folders: Sequence[Path], made_from: dict[str, Any]):
        self._by = ("image", "words") if "image" in made_from["sides"] else ("words",)
        self._parts: list[_Part] = []
        self._whole: dict[bytes, int] = {}
        self._flawed: dict[int, bool] = {}
        stamps, ends = [np.zeros((0, 2), np.uint64)], [0]
        for part in (part for folder in folders for part in _parts(folder, made_from)):
            try:
                table = pq.read_table(stamps_path(part.folder, part.name), columns=["image", "words"])
            except (OSError, pa.ArrowInvalid) as error:
                warn(f"{stamps_path(part.folder, part.name)}: {error}; its part is embedded anew")
                continue
            columns = [_column(table[name]) for name in self._by]
            if all(column.any(1).all() for column in columns):
                self._whole.setdefault(_digest(columns), len(self._parts))
            self._parts.append(part)
            stamps.append(columns[0])
            ends.append(ends[-1] + len(table))
        self._starts = np.array(ends[:-1], np.int64)
        self._stamps = np.concatenate(stamps)
        # By half of each stamp: where two should agree in it, one is not found and embedded anew, that is all.
        self._order = np.argsort(self._stamps[:, 0], kind="stable")
        self._halves = self._stamps[self._order, 0]

    def part_of(self, stamps: Sequence[Stamp]) -> int | None:
        """The number of the part that was made of exactly these samples, where there is one."""
        columns = [_numbers([getattr(stamp, name) for stamp in stamps]) for name in self._by]
        number = self._whole.get(_digest(columns))
        if number is None or any(size_flaw(*each) for each in self._files(number)):
            return None
        return number

    def link(self, number: int, out: Path, name: str, first: int, keys: Sequence[str]) -> dict[str, Any]:
        """Let a part be one of `out` too, without a copy where the disk can do so.

        Args:
            number: of the part, see `part_of`.
            out: the new artifact.
            name: of the part there.
            first: row of its first sample in the source.
            keys: of its samples.

        Returns:
            The part's record.
        """
        part = self._parts[number]
        files = {}
        for old, new in zip(part_files(part.folder, part.name), part_files(out, name), strict=True):
            checksum = part.files.get(old.relative_to(part.folder).as_posix())
            if checksum is not None:
                _link(old, new)
                files[new.relative_to(out).as_posix()] = checksum
        reasons = pq.read_table(stamps_path(out, name), columns=["reason"])["reason"].to_pylist()
        left_out = [
            {"row": first + at, "key": key, "reason": reason}
            for at, (key, reason) in enumerate(zip(keys, reasons, strict=True))
            if reason is not None
        ]
        counts = {"images": part.images, "captions": part.captions, "taken": part.images}
        return {**counts, "left_out": left_out, "files": dict(sorted(files.items()))}

    def take(self, rows: range, stamps: Sequence[Stamp]) -> dict[int, KnownSample]:
        """What is known of these rows of the source, by row."""
        if not len(self._stamps):
            return {}
        wanted = _numbers([getattr(stamp, self._by[0]) for stamp in stamps])
        at = np.minimum(np.searchsorted(self._halves, wanted[:, 0]), len(self._halves) - 1)
        index = self._order[at]
        same = (self._stamps[index] == wanted).all(1) & wanted.any(1)
        number = np.searchsorted(self._starts, index, side="right") - 1
        known: dict[int, KnownSample] = {}
        for each in np.unique(number[same]).tolist():
            if self._is_flawed(each):
                continue
            chosen = np.flatnonzero(same & (number == each)).tolist()
            kept = self._gather(self._parts[each], index[chosen] - self._starts[each], [stamps[i] for i in chosen])
            known |= {rows[i]: one for i, one in zip(chosen, kept, strict=True) if one is not None}
        return known

    def _gather(self, part: _Part, offsets: np.ndarray, stamps: Sequence[Stamp]) -> Iterator[KnownSample | None]:
        """What a part holds of the samples at these offsets; None of one that was left out with other words."""
        lines = pq.read_table(stamps_path(part.folder, part.name)).take(pa.array(offsets))
        image = text = None
        captions, owner = [], np.zeros(0, np.int64)
        if "image" in self._by and part.images:
            image = np.load(part_vectors_path(part.folder, "image", part.name), mmap_mode="r")
        if part_vectors_path(part.folder, "text", part.name).is_file():
            text = np.load(part_vectors_path(part.folder, "text", part.name), mmap_mode="r")
            table = pq.read_table(part_table_path(part.folder, "text", part.name), columns=["caption", "image_row"])
            captions, owner = table["caption"].to_pylist(), table["image_row"].to_numpy()
        empty = np.zeros((0, 0), np.float16)
        for line, stamp in zip(lines.to_pylist(), stamps, strict=True):
            row = line["row"]
            if row is None:
                yield KnownSample(line["reason"], None, (), empty) if line["words"] == stamp.words else None
                continue
            low, high = np.searchsorted(owner, [row, row + 1]).tolist()
            texts = empty if text is None or low == high else np.array(text[low:high])
            yield KnownSample(None, None if image is None else np.array(image[row]), captions[low:high], texts)

    def _files(self, number: int) -> Iterator[tuple[Path, Checksum]]:
        part = self._parts[number]
        return ((part.folder / name, written) for name, written in part.files.items())

    def _is_flawed(self, number: int) -> bool:
        # All of a part is read, once: what is damaged would get a checksum of its own in the new artifact.
        if number not in self._flawed:
            message = next(filter(None, (file_flaw(*each) for each in self._files(number))), None)
            self._flawed[number] = message is not None
            if message is not None:
                warn(f"{message}; its part is embedded anew")
        return self._flawed[number]


def part_files(folder: Path, name: str) -> list[Path]:
    """Every file that a part may have, there or not."""
    paths = [path(folder, side, name) for side in SIDES for path in (part_vectors_path, part_table_path)]
    return [*paths, stamps_path(folder, name)]


def _parts(folder: Path, made_from: dict[str, Any]) -> list[_Part]:
    try:
        state, facts = state_of(folder)
    except ClipkitError:
        return []
    if any(facts.get("made_from", {}).get(what) != made_from[what] for what in ALIKE):
        return []
    if state == "finished":
        records = facts["parts"]
    else:
        records = [{"name": path.stem, **read_json(path)} for path in sorted((folder / WORK / "parts").glob("*.json"))]
    return [
        _Part(folder, record["name"], record["images"], record["captions"], record["files"])
        for record in records
        if "files" in record
    ]


def _numbers(stamps: Sequence[bytes | None]) -> np.ndarray:
    """uint64 ``[stamps, 2]``; zeros for one that is not known."""
    return np.frombuffer(b"".join(stamp or UNKNOWN for stamp in stamps), np.uint64).reshape(-1, 2)


def _column(stamps: pa.ChunkedArray) -> np.ndarray:
    """As `_numbers`, of a column of a table."""
    filled = [chunk for chunk in stamps.chunks if len(chunk)]
    pairs = [np.frombuffer(chunk.buffers()[1], np.uint64, 2 * len(chunk), 16 * chunk.offset) for chunk in filled]
    return np.concatenate([np.zeros(0, np.uint64), *pairs]).reshape(-1, 2)


def _digest(columns: Sequence[np.ndarray]) -> bytes:
    return hashlib.blake2b(np.concatenate(columns).tobytes(), digest_size=16).digest()


def _link(old: Path, new: Path) -> None:
    scratch = new.with_name(f".{new.name}.{os.getpid()}.tmp")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        scratch.unlink(missing_ok=True)
        os.link(old, scratch)
        scratch.replace(new)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise ClipkitError(f"cannot link {old} to {new}: {error.strerror or error}") from error
        with old.open("rb") as source, atomic_write(new) as target:
            shutil.copyfileobj(source, target)
    finally:
        scratch.unlink(missing_ok=True)  # it stays where `new` was a link to the same file already
