"""Embeddings that lie on the disk, of an artifact or an index, with which caption belongs to which image.

Vectors stay where they are: blocks are memory-mapped views, and what is read of the metadata is a number per row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.core import ClipkitError, Side
from clipkit.embedding import Embeddings
from clipkit.storage import digest, kind_of

if TYPE_CHECKING:
    from clipkit.search import Index

__all__ = ["Stored", "open_stored"]

Array = np.ndarray


@dataclass(frozen=True)
class Stored:
    """Both sides as they were embedded."""

    folder: Path
    manifest: dict[str, Any]
    state: str
    """Which state of the folder it is; an update makes another."""
    image: list[Array]
    """float16 ``[rows, dim]``, parts that follow each other."""
    text: list[Array]
    """Of the captions whose image is there; empty where there is no such side."""
    image_of_text: Array
    """int64: the image row of each caption."""
    ids: Array
    """int64 of each image."""
    left_out: list[dict[str, Any]]
    """Ledger lines: what could not be embedded, and captions whose image is not there."""
    index: "Index | None" = None
    image_at: Array | None = None
    """Of an index: the position of each image row."""
    text_at: Array | None = None
    """And of each caption."""

    def identity(self) -> list[object]:
        """All that a result depends on."""
        return [str(self.folder.resolve()), self.manifest["model"]["fingerprint"], self.state, self.of()]

    def of(self) -> str:
        """A hash of which images and captions they are, in which order."""
        hasher = hashlib.blake2b(digest_size=16)
        for values in (self.ids, self.image_of_text):
            hasher.update(np.ascontiguousarray(values).tobytes())
        return hasher.hexdigest()

    def paths(self) -> list[str]:
        """Where each image was, relative to its source."""
        if self.index is not None and self.image_at is not None:
            return [str(path) for path in self.index.column("image_path", self.image_at)]
        return [str(path) for path in Embeddings.open(self.folder).column("image_path")]

    def both(self) -> "Stored":
        """Itself, where both sides are there.

        Raises:
            ClipkitError: where one is not.
        """
        for side, rows in (("image", self.image), ("text", self.text)):
            if not sum(map(len, rows)):
                raise ClipkitError(
                    f"{self.folder} has no {side} embeddings, and retrieval asks both sides; embed a source with "
                    "captions (clipkit embed, without --sides)"
                )
        return self


def open_stored(folder: str | Path) -> Stored:
    """Open an embeddings artifact or an index.

    Raises:
        ClipkitError: where it is neither, or broken.
    """
    folder = Path(folder)
    return _of_index(folder) if kind_of(folder) == "index" else _of_embeddings(Embeddings.open(folder))


def _of_embeddings(opened: Embeddings) -> Stored:
    blocks: dict[Side, list[Array]] = {side: list(opened.blocks(side)) for side in opened.sides}
    ids = np.concatenate([np.zeros(0, np.int64), opened.column("id").to_numpy()])
    if "text" in opened.sides:
        owner = opened.column("image_row", "text").to_numpy().astype(np.int64)
    else:
        owner = np.zeros(0, np.int64)
    state = digest([opened.manifest.get("identity"), opened.manifest["counts"], opened.manifest["parts"]])
    sides = blocks.get("image", []), blocks.get("text", [])
    return Stored(opened.folder, opened.manifest, state, *sides, owner, ids, opened.ledger())


def _of_index(folder: Path) -> Stored:
    from clipkit.search import Index  # which imports FAISS

    index = Index.open(folder)
    at: dict[Side, Array] = {side: index.positions(side) for side in index.sides}
    nothing = np.zeros(0, np.int64)
    if not len(at.get("image", nothing)):
        raise ClipkitError(f"{folder} holds no images; it can be searched for texts only")
    ids = _numbers(index, "id", "image", at["image"])
    owners = _numbers(index, "image_id", "text", at["text"]) if "text" in at else nothing
    order = np.argsort(ids, kind="stable")
    image_of_text = order[np.minimum(np.searchsorted(ids, owners, sorter=order), len(ids) - 1)]
    there = ids[image_of_text] == owners
    left_out = [
        {"key": f"caption at position {int(position)}", "reason": "its image is not in the index"}
        for position in at.get("text", nothing)[~there]
    ]
    text_at = at.get("text", nothing)[there]
    state = f"{index.manifest.get('identity')} generation {index.state.number}"
    blocks = _rows(index, "image", at["image"]), _rows(index, "text", text_at) if len(text_at) else []
    return Stored(
        folder, index.manifest, state, *blocks, image_of_text[there], ids, left_out, index, at["image"], text_at
    )


def _numbers(index: "Index", column: str, side: Side, positions: Array) -> Array:
    """A column of numbers of rows that can be found, without a Python object for each."""
    tables = [segment.table[column].to_numpy() for segment in index.segments(side)]
    return np.concatenate([np.zeros(0, np.int64), *tables])[positions].astype(np.int64)


def _rows(index: "Index", side: Side, positions: Array) -> list[Array]:
    """The vectors at these positions, which rise: a view of each stretch that follows on without a gap."""
    found, start = [], 0
    for segment in index.segments(side):
        own = positions[(positions >= start) & (positions < start + segment.rows)] - start
        for run in _runs(own):
            found.append(np.asarray(segment.vectors.rows[run]))
        start += segment.rows
    return found


def _runs(rows: Array) -> Sequence[slice]:
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    firsts, lasts = rows[np.append(0, cuts)], rows[np.append(cuts, len(rows)) - 1]
    return [slice(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
