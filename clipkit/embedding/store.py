"""The embeddings artifact on disk: clip-retrieval's exchange layout, so embedding-reader and autofaiss read it.

``img_emb/*.npy`` and ``text_emb/*.npy`` (float16, unit norm, source order) and ``metadata/*.parquet``. Captions have
rows of their own in ``captions/*.parquet``, each with the id and the row of its image; with one caption per image the
rows of both sides agree, as there.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.core import ClipkitError, Side, atomic_write
from clipkit.data.sources import Sample
from clipkit.embedding.tables import as_column, joined_tables, write_parquet
from clipkit.storage import Checksum, Hashed, file_flaw, kind_of, read_manifest, size_flaw

__all__ = [
    "Embedded",
    "Embeddings",
    "image_id_column",
    "part_table_path",
    "part_vectors_path",
    "stored_kind",
    "write_part",
]

VECTOR_FOLDERS: dict[Side, str] = {"image": "img_emb", "text": "text_emb"}
TABLE_FOLDERS: dict[Side, str] = {"image": "metadata", "text": "captions"}


def stored_kind(source: str | Path) -> Literal["embeddings", "index"] | None:
    """What a folder is that holds vectors, made by the model that its manifest names; None for any other source."""
    kind = kind_of(Path(source))
    return kind if kind in ("embeddings", "index") else None  # type: ignore[return-value]


@dataclass
class Embedded:
    """Embeddings of some samples, in source order, without those that could not be used."""

    image: np.ndarray
    """float32 ``[images, dim]``."""
    text: np.ndarray
    """float32 ``[captions, dim]``."""
    samples: list[Sample]
    """One per image row; the image bytes are dropped."""
    captions: list[str]
    """One per text row."""
    image_of_text: np.ndarray
    """int64 ``[captions]``: the image row that each caption belongs to."""
    rows: list[int] = field(default_factory=list)
    """The source row of each sample."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Ledger lines of what could not be used: ``row``, ``key``, ``reason``."""
    unread: list[int] = field(default_factory=list)
    """The source rows among these that could not be read, and may be another time."""

    @classmethod
    def empty(cls, dim: int) -> "Embedded":
        """Embeddings of nothing."""
        return cls(np.zeros((0, dim), np.float32), np.zeros((0, dim), np.float32), [], [], np.zeros(0, np.int64))

    def ledger(self) -> list[dict[str, Any]]:
        """The lines of what could not be used; with ``unread``, true, of what could not be read."""
        unread = set(self.unread)
        return [line | {"unread": True} if line["row"] in unread else line for line in self.left_out]


def image_id_column(side: Side) -> str:
    """The column of a side's metadata that holds the id of a row's image."""
    return "id" if side == "image" else "image_id"


def part_vectors_path(folder: Path, side: Side, name: str) -> Path:
    """Where a part's embeddings of a side stand."""
    return folder / VECTOR_FOLDERS[side] / f"{VECTOR_FOLDERS[side]}_{name}.npy"


def part_table_path(folder: Path, side: Side, name: str) -> Path:
    """Where a part's metadata of a side stand."""
    return folder / TABLE_FOLDERS[side] / f"{TABLE_FOLDERS[side]}_{name}.parquet"


def write_part(out: Path, name: str, embedded: Embedded, sides: Sequence[Side]) -> dict[str, Checksum]:
    """Write one part's vectors and tables, each file atomically; gives the files, by their path in `out`.

    There are none where there are no rows: embedding-reader stumbles over files without any.
    """
    if not embedded.samples:
        return {}
    ids = [sample.id for sample in embedded.samples]
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids, pa.int64()),
        "key": pa.array([sample.key for sample in embedded.samples], pa.string()),
        "image_path": pa.array(
            [str(sample.columns.get("path", sample.key)) for sample in embedded.samples], pa.string()
        ),
        "caption": pa.array(
            [sample.captions[0] if sample.captions else None for sample in embedded.samples], pa.string()
        ),
    }
    for column in dict.fromkeys(name for sample in embedded.samples for name in sample.columns if name != "path"):
        columns[column] = as_column([sample.columns.get(column) for sample in embedded.samples])
    files = {part_table_path(out, "image", name): write_parquet(part_table_path(out, "image", name), pa.table(columns))}
    if "image" in sides:
        files[part_vectors_path(out, "image", name)] = _write_npy(part_vectors_path(out, "image", name), embedded.image)
    if "text" in sides and embedded.captions:
        files[part_vectors_path(out, "text", name)] = _write_npy(part_vectors_path(out, "text", name), embedded.text)
        columns = {
            "caption": pa.array(embedded.captions, pa.string()),
            "image_id": pa.array([ids[row] for row in embedded.image_of_text], pa.int64()),
            "image_row": pa.array(embedded.image_of_text, pa.int64()),
        }
        files[part_table_path(out, "text", name)] = write_parquet(part_table_path(out, "text", name), pa.table(columns))
    return {path.relative_to(out).as_posix(): checksum for path, checksum in files.items()}


def _write_npy(path: Path, rows: np.ndarray) -> Checksum:
    with atomic_write(path) as handle:
        output: Any = Hashed(handle)
        np.save(output, rows.astype(np.float16))
    return output.checksum()


class Embeddings:
    """An embeddings artifact, opened for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self._parts = manifest["parts"]

    @classmethod
    def open(cls, folder: str | Path) -> "Embeddings":
        """Open a finished artifact, and see whether its files are there as long as they were written.

        Raises:
            ClipkitError: where it is missing, unfinished or of another kind, or a file of it is missing or cut.
        """
        opened = cls(Path(folder), read_manifest(Path(folder), "embeddings"))
        opened._check(size_flaw)
        return opened

    def verify(self) -> None:
        """Compare every file with its checksum; that reads all of them, a gigabyte a second at best.

        Raises:
            ClipkitError: for the first that was cut or altered, and where there are no checksums to compare with.
        """
        if not all(part.get("files") for part in self._parts):
            raise ClipkitError(
                f"{self.folder} has no checksums: an older clipkit wrote it; embed it again to have them"
            )
        self._check(file_flaw)

    def refuse_changed(self) -> None:
        """To be asked when all has been read, as an update may have exchanged the folder meanwhile.

        Raises:
            ClipkitError: where it holds something else than when it was opened.
        """
        if read_manifest(self.folder, "embeddings").get("identity") != self.manifest.get("identity"):
            raise ClipkitError(f"{self.folder} was changed while it was read; run this again")

    def _check(self, find: Callable[[Path, Checksum], str | None]) -> None:
        for part in self._parts:
            for name, written in part.get("files", {}).items():
                message = find(self.folder / name, written)
                if message is not None:
                    raise ClipkitError(f"{message}; bring it back from a copy, or embed again with --overwrite")

    @property
    def fingerprint(self) -> str:
        """Of the model that made it."""
        return self.manifest["model"]["fingerprint"]

    @property
    def sides(self) -> list[Side]:
        """``image``, ``text`` or both."""
        return self.manifest["sides"]

    def blocks(self, side: Side) -> Iterator[np.ndarray]:
        """The parts' embeddings in order, float16 ``[rows, dim]``, memory-mapped."""
        for part in self._parts:
            rows = part["images" if side == "image" else "captions"]
            if rows:
                path = part_vectors_path(self.folder, side, part["name"])
                try:
                    block = np.load(path, mmap_mode="r")
                except (OSError, ValueError) as error:
                    raise ClipkitError(f"{path} is missing or broken ({error})") from error
                if block.shape != (rows, self.manifest["dim"]):
                    raise ClipkitError(
                        f"{path} has shape {block.shape}, the manifest says {(rows, self.manifest['dim'])}"
                    )
                yield block

    def vectors(self, side: Side = "image") -> np.ndarray:
        """All embeddings of a side as float32 ``[rows, dim]``.

        Raises:
            ClipkitError: where that side was not embedded, or a file is missing or broken.
        """
        if side not in self.sides:
            raise ClipkitError(f"{self.folder} has no {side} embeddings; it has {' and '.join(self.sides)}")
        return np.concatenate([block.astype(np.float32) for block in self.blocks(side)])

    def ledger(self) -> list[dict[str, Any]]:
        """What could not be embedded: ``row`` in the source, ``key``, ``reason``."""
        path = self.folder / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def table(self, side: Side = "image") -> pa.Table:
        """The metadata, row by row with `vectors`; a caption's ``image_row`` counts over the whole artifact."""
        return joined_tables(list(self.tables(side)))

    def tables(self, side: Side = "image") -> Iterator[pa.Table]:
        """The metadata part by part, as `table` has it."""
        before = 0
        for part in self._parts:
            if part["images" if side == "image" else "captions"]:
                table = pq.read_table(part_table_path(self.folder, side, part["name"]))
                if side == "text":
                    moved = pa.array(table["image_row"].to_numpy() + before)
                    table = table.set_column(table.schema.get_field_index("image_row"), "image_row", moved)
                yield table
            before += part["images"]

    def column(self, name: str, side: Side = "image") -> pa.ChunkedArray:
        """One column of `table`, for which no other is read; a caption's ``image_row`` counts over all parts."""
        values_of_parts, before = [], 0
        for part in self._parts:
            if part["images" if side == "image" else "captions"]:
                values = pq.read_table(part_table_path(self.folder, side, part["name"]), columns=[name])[name]
                moved = name == "image_row" and side == "text"
                values_of_parts.append(pa.chunked_array([pa.array(values.to_numpy() + before)]) if moved else values)
            before += part["images"]
        return pa.chunked_array([chunk for values in values_of_parts for chunk in values.chunks])

    def index_tables(self, side: Side) -> Iterator[pa.Table]:
        """The metadata part by part as an index keeps it: each caption's row says what is known of its image, too."""
        if side == "image":
            yield from self.tables()
            return
        for part in self._parts:
            if part["captions"]:
                paths = [part_table_path(self.folder, s, part["name"]) for s in ("text", "image")]
                captions, images = (pq.read_table(path) for path in paths)
                yield _with_images(captions, images.take(captions["image_row"]))

    def index_schemas(self, side: Side) -> Iterator[pa.Schema]:
        """The columns of `index_tables`, of which no row is read."""
        for part in self._parts:
            if part["images" if side == "image" else "captions"]:
                images = pq.read_schema(part_table_path(self.folder, "image", part["name"]))
                if side == "image":
                    yield images
                else:
                    captions = pq.read_schema(part_table_path(self.folder, "text", part["name"]))
                    yield _with_images(captions.empty_table(), images.empty_table()).schema


def _with_images(captions: pa.Table, images: pa.Table) -> pa.Table:
    """Captions with the columns of their images, row by row; where both have one, the caption's own."""
    captions = captions.drop_columns(["image_row"])
    for name in images.column_names:
        if name not in ("id", *captions.column_names):
            captions = captions.append_column(name, images[name])
    return captions
