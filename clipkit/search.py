"""The index: FAISS behind a folder of segments, and search that gives scores and metadata rows.

An index never sees a model; it takes unit-norm vectors and returns rows. It knows the fingerprint of the model whose
vectors it holds, so that a question from another model can be refused. FAISS is imported here and nowhere else.

On disk: ``current.json`` names the generation, ``generations/N.json`` its segments, and each segment holds, per side,
``image.faiss``, ``image.vectors.npy`` (float16, as embedded) and ``image.arrow``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from clipkit.artifact import Stage, atomic_write, read_json, read_manifest, write_json
from clipkit.embeddings import Embeddings, Side, joined_tables
from clipkit.errors import ClipkitError

__all__ = ["Index", "build_index"]


def build_index(
    sets: Sequence[Embeddings],
    out: Path,
    *,
    model_reference: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build an exact inner-product index over one or several embedding folders.

    Args:
        sets: opened embeddings of one model.
        out: the index folder.
        model_reference: what the manifest says of the model, by default what the first set says.
        overwrite: replace what is there.

    Returns:
        The manifest.

    Raises:
        ClipkitError: where the sets come from different models or hold the same ids twice.
    """
    fingerprints = {s.fingerprint: s.folder for s in sets}
    if len(fingerprints) > 1:
        told = ", ".join(f"{folder}: {print_[:12]}" for print_, folder in fingerprints.items())
        raise ClipkitError(f"these embeddings come from different models ({told}); embed them with one")
    made_from = {"embeddings": [s.manifest["identity"] for s in sets], "factory": "Flat"}
    stage = Stage(out, "index", made_from, inputs=[s.folder for s in sets], overwrite=overwrite)
    if stage.done:
        return read_manifest(out, "index")
    sides: list[Side] = [side for side in ("image", "text") if any(side in s.sides for s in sets)]
    segment = out / "segments" / "000000"
    for name in stage.pending(sides):
        side: Side = "image" if name == "image" else "text"
        holders = [s for s in sets if side in s.sides]
        stage.finish_part(side, {"rows": _write_side(segment, side, holders)})
    records = stage.records(sides)
    if records is None:
        return read_manifest(out, "index")
    counts = {side: record["rows"] for side, record in zip(sides, records, strict=True)}
    write_json(out / "generations" / "1.json", {"segments": ["000000"], "rows": counts})
    write_json(out / "current.json", {"generation": 1})
    return stage.commit(
        model=model_reference or sets[0].manifest["model"],
        dim=sets[0].manifest["dim"],
        metric="inner product of unit vectors (cosine)",
        type="Flat",
        sides=sides,
        counts=counts,
    )


def _write_side(segment: Path, side: Side, sets: Sequence[Embeddings]) -> int:
    dim = sets[0].manifest["dim"]
    rows = sum(s.manifest["counts"]["images" if side == "image" else "captions"] for s in sets)
    index = faiss.IndexFlatIP(dim)
    segment.mkdir(parents=True, exist_ok=True)
    scratch = segment / f".{side}.vectors.npy"
    vectors = np.lib.format.open_memmap(scratch, "w+", np.float16, (rows, dim))
    at = 0
    for block in (block for s in sets for block in s.blocks(side)):
        _refuse_bad_vectors(block, f"the {side} embeddings")
        index.add(np.ascontiguousarray(block, np.float32))
        vectors[at : at + len(block)] = block
        at += len(block)
    vectors.flush()
    del vectors
    scratch.replace(segment / f"{side}.vectors.npy")
    table = joined_tables([_metadata(s, side) for s in sets])
    if side == "image":
        ids = table["id"].to_numpy()
        _, first = np.unique(ids, return_index=True)
        if len(first) < len(ids):
            twice = table["key"][int(np.setdiff1d(np.arange(len(ids)), first)[0])].as_py()
            raise ClipkitError(
                f"the embedding folders hold a sample of the name {twice!r} more than once; embed a folder above both, "
                "so that the names differ"
            )
    with atomic_write(segment / f"{side}.arrow") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    with atomic_write(segment / f"{side}.faiss") as stream:
        faiss.write_index(index, stream.name)
    return rows


def _metadata(embeddings: Embeddings, side: Side) -> pa.Table:
    if side == "image":
        return embeddings.table("image")
    captions, images = embeddings.table("text"), embeddings.table("image")
    paths = images["image_path"].take(captions["image_row"])
    return captions.drop_columns(["image_row"]).append_column("image_path", paths)


def _refuse_bad_vectors(vectors: np.ndarray, what: str) -> None:
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise ClipkitError(f"{what} hold NaN or infinity, first in row {row}")


class Index:
    """An opened index. Searching changes nothing in it, so threads may share it."""

    def __init__(self, folder: Path, manifest: dict[str, Any], segment: Path, sides: dict[Side, tuple[Any, pa.Table]]):
        self.folder = folder
        self.manifest = manifest
        self._segment = segment
        self._sides = sides

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open the current generation; on the GPUs where there are any.

        Raises:
            ClipkitError: where it is missing, unfinished, cut or altered.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "index")
        generation = read_json(folder / "current.json")["generation"]
        state = read_json(folder / "generations" / f"{generation}.json")
        (name,) = state["segments"]
        segment = folder / "segments" / name
        sides: dict[Side, tuple[Any, pa.Table]] = {}
        for side, rows in state["rows"].items():
            index, table = _read_side(segment, side)
            if index.ntotal != rows or table.num_rows != rows:
                raise ClipkitError(
                    f"{folder}: {side} has {index.ntotal} vectors and {table.num_rows} metadata rows where {rows} are "
                    "expected; it was altered, build it again"
                )
            sides[side] = (index, table)
        return cls(folder, manifest, segment, sides)

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors it holds."""
        return self.manifest["model"]["fingerprint"]

    @property
    def sides(self) -> list[Side]:
        """What can be found: ``image``, ``text`` or both."""
        return list(self._sides)

    def __len__(self) -> int:
        """How many images it holds (captions, where it holds no images)."""
        return self._sides[self.sides[0]][0].ntotal

    def search(self, vectors: np.ndarray, k: int = 10, side: Side = "image") -> tuple[np.ndarray, np.ndarray]:
        """The k rows nearest to each query, by cosine.

        Args:
            vectors: float ``[queries, dim]``, unit norm.
            k: how many; one larger than the index is cut to it.
            side: whether to look among images or captions.

        Returns:
            float32 scores and int64 rows, each ``[queries, min(k, rows)]``, best first.

        Raises:
            ClipkitError: for a wrong dimension, NaN, k < 1, or a side that the index does not hold.
        """
        if side not in self._sides:
            raise ClipkitError(f"{self.folder} holds no {side} vectors; it holds {' and '.join(self.sides)}")
        index, _ = self._sides[side]
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != index.d:
            raise ClipkitError(f"queries of shape {vectors.shape} do not fit an index of dimension {index.d}")
        if k < 1:
            raise ClipkitError(f"k must be at least 1, got {k}")
        _refuse_bad_vectors(vectors, "the queries")
        return index.search(vectors, min(k, index.ntotal))

    def rows(self, positions: Sequence[int] | np.ndarray, side: Side = "image") -> list[dict[str, Any]]:
        """The metadata of rows, in the order given."""
        return self._sides[side][1].take(pa.array(positions, pa.int64())).to_pylist()

    def vectors(self, positions: Sequence[int] | np.ndarray, side: Side = "image") -> np.ndarray:
        """The stored vectors of rows, float16 ``[n, dim]``."""
        return np.load(self._segment / f"{side}.vectors.npy", mmap_mode="r")[np.asarray(positions)]


def _read_side(segment: Path, side: str) -> tuple[Any, pa.Table]:
    path = segment / f"{side}.faiss"
    try:
        index = faiss.read_index(str(path))
        with pa.memory_map(str(segment / f"{side}.arrow")) as stream:
            table = pa.ipc.open_file(stream).read_all()
    except (RuntimeError, OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())[-200:]
        raise ClipkitError(
            f"{path.with_suffix('')}.* is missing, cut or altered ({reason}); build the index again"
        ) from error
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    return index, table
