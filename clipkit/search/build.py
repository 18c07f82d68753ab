"""From embeddings to an index: one segment, its kind chosen by measurement, within a memory budget."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.core import (
    SIDES,
    ClipkitError,
    Side,
    atomic_write,
    give_back_freed_memory,
    note,
    save_figure,
    tradeoff_figure,
)
from clipkit.embedding import Embeddings, in_schema, joined_schema
from clipkit.search.autotune import Goal, IndexChoice, allowed, choose
from clipkit.search.generations import Generation, SegmentState, commit
from clipkit.search.index_types import INDEX_TYPES, Effort
from clipkit.search.quantize import Coding, encode, lies_on_disk, read_codes, sample_rows, train_coding
from clipkit.search.recall import Queries, Truth, tune_and_measure
from clipkit.search.segments import codes_path, read_table, table_path, vectors_path, write_table
from clipkit.search.vector_file import Vectors, write_vectors
from clipkit.storage import Stage, digest, read_manifest, relative_to_artifact

__all__ = ["Wanted", "build_index", "default_memory", "kept_queries"]

SAMPLED_QUERIES = 1000  # queries that are measured with, one half to tune, the other to tell
FEWEST_CAPTIONS = 20  # captions: with fewer nothing can be told
PIECE = 8192  # vectors that are copied at a time
FIRST = "000001"  # the segment that a build writes


@dataclass(frozen=True)
class Wanted:
    """What an index is to be."""

    kind: str | None = None
    """Of `INDEX_TYPES`; None to choose by measurement."""
    recall: float = 0.95
    """Recall at 10, of text queries against the exact search, to be reached."""
    memory: int | None = None
    """Bytes that building may use; None for half of what is free."""
    serve_memory: int | None = None
    """Bytes that the index may hold in memory while it is served; None for as much as it wants."""


def default_memory() -> int:
    """Half of the memory that is free, in bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def _arrow_gives_back_memory() -> Iterator[None]:
    """Within, Arrow's memory is the system's, for the whole process: its own pools keep tens of megabytes that were
    freed."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def build_index(
    sets: Sequence[Embeddings],
    out: Path,
    wanted: Wanted | None = None,
    *,
    queries: np.ndarray | None = None,
    queries_identity: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build an inner-product index over one or several embedding folders.

    While it is built, Arrow's default memory pool is the system's.

    Args:
        sets: opened embeddings of one model.
        out: the index folder. On an unfinished one of the same input it goes on.
        wanted: what it is to be.
        queries: float32 ``[queries, dim]``, unit norm: texts of the people who will ask, to measure with in place of
            the captions.
        queries_identity: what tells them from others; by default their numbers, which differ in their last digits
            where texts are embedded on another machine.
        overwrite: replace what is there.

    Returns:
        The manifest; under ``tried`` stands what was measured.

    Raises:
        ClipkitError: where the sets come from different models or hold the same ids twice, or where memory or disk
            are too small.
    """
    wanted = wanted or Wanted()
    _check_models(sets)
    made_from: dict[str, Any] = {"embeddings": [s.manifest["identity"] for s in sets], "wanted": vars(wanted)}
    if queries is not None:
        made_from["queries"] = queries_identity or digest(queries.tolist())
    stage = Stage(out, "index", made_from, inputs=[s.folder for s in sets], overwrite=overwrite)
    if stage.done:
        return read_manifest(out, "index")
    sides: list[Side] = [side for side in SIDES if any(side in s.sides for s in sets)]
    goal = Goal(wanted.recall, wanted.memory or default_memory(), wanted.serve_memory)
    with _arrow_gives_back_memory():
        _refuse_full_disk(out, sets, wanted.kind, goal)
        for name in stage.pending(sides):
            side: Side = "image" if name == "image" else "text"
            stage.finish_part(name, _build_side(out, side, sets, queries, wanted.kind, goal))
    records = stage.records(sides)
    if records is None:
        return read_manifest(out, "index")
    by_side = dict(zip(sides, records, strict=True))
    _first_generation(out, by_side)
    for side in sides:
        _plot(out, side, by_side[side], wanted.recall)
    return stage.commit(
        model=_model_reference(sets[0], out),
        dim=sets[0].manifest["dim"],
        metric="inner product of unit vectors (cosine)",
        type=by_side[sides[0]]["kind"],
        sides=sides,
        counts={side: record["rows"] for side, record in by_side.items()},
        wanted={"recall": wanted.recall, "serve_memory": wanted.serve_memory},
        chosen={side: {k: v for k, v in r.items() if k not in ("tried", "rows")} for side, r in by_side.items()},
        tried={side: record["tried"] for side, record in by_side.items()},
    )


def _model_reference(embeddings: Embeddings, out: Path) -> dict[str, Any]:
    """What the embeddings say of their model, a path in it as seen from the index."""
    reference = dict(embeddings.manifest["model"])
    if "path" in reference:
        reference["path"] = relative_to_artifact(embeddings.folder / reference["path"], out)
    return reference


def _build_side(
    out: Path, side: Side, sets: Sequence[Embeddings], given: np.ndarray | None, kind: str | None, goal: Goal
) -> dict[str, Any]:
    """Write a side's vectors and metadata, choose its kind and code it; returns what the stage's record says of it."""
    rows, dim = _write_first(out, side, sets), sets[0].manifest["dim"]
    note(f"{side}: {rows:,} vectors of dimension {dim}")
    vectors = Vectors(vectors_path(out, FIRST, side), rows, dim)
    queries = _queries(sets, side, given, vectors)
    _keep_queries(out, side, queries)
    for embeddings in sets:
        embeddings.refuse_changed()
    choice = _chosen(vectors, queries, kind, goal, out / ".work" / "trial")
    if not choice.kind.is_flat:
        choice = _coded(_FirstSegment(out, side, vectors, goal), choice, queries)
    return _record(choice, rows)


def _check_models(sets: Sequence[Embeddings]) -> None:
    fingerprints = {s.fingerprint: s.folder for s in sets}
    if len(fingerprints) > 1:
        models = ", ".join(f"{folder}: {print_[:12]}" for print_, folder in fingerprints.items())
        raise ClipkitError(f"these embeddings come from different models ({models}); embed them with one")


def _write_first(out: Path, side: Side, sets: Sequence[Embeddings]) -> int:
    holders = [s for s in sets if side in s.sides]
    dim = sets[0].manifest["dim"]
    rows = sum(s.manifest["counts"]["images" if side == "image" else "captions"] for s in holders)
    write_vectors(
        vectors_path(out, FIRST, side),
        (part for s in holders for block in s.blocks(side) for part in _pieces(block)),
        dim,
    )
    # Copied: a column that is kept would keep the memory that it lies in, and that of others beside it.
    ids, end = np.empty(rows, np.int64), 0
    schema = joined_schema([schema for s in holders for schema in s.index_schemas(side)])

    def tables() -> Iterator[pa.Table]:
        nonlocal end
        for s in holders:
            for table in s.index_tables(side):
                if side == "image":
                    ids[end : end + len(table)] = table["id"].to_numpy()
                    end += len(table)
                yield in_schema(table, schema)

    write_table(table_path(out, FIRST, side), tables())
    _refuse_twins(ids[:end], table_path(out, FIRST, side))
    give_back_freed_memory()
    return rows


def _pieces(block: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(block), PIECE):
        yield block[start : start + PIECE]


def _refuse_twins(ids: np.ndarray, path: Path) -> None:
    ids.sort()
    twins = ids[1:][ids[1:] == ids[:-1]]
    if len(twins):
        key = read_table(path).filter(pc.field("id") == twins[0])["key"][0].as_py()
        path.unlink()
        raise ClipkitError(
            f"the embedding folders hold a sample of the name {key!r} more than once; embed a folder above both, "
            "so that the names differ"
        )


def _refuse_full_disk(out: Path, sets: Sequence[Embeddings], kind: str | None, goal: Goal) -> None:
    """Vectors, codes of the largest kind that may be chosen, and metadata; samples go before the codes come."""
    dim: int = sets[0].manifest["dim"]
    sizes = [sum(s.manifest["counts"][name] for s in sets) for name in ("images", "captions")]
    rows, most = sum(sizes), max(sizes)  # of both sides, and of the larger, as each has its own kind and memory
    tables = sum(
        p.stat().st_size for s in sets for folder in ("metadata", "captions") for p in s.folder.glob(f"{folder}/*")
    )
    kinds = [INDEX_TYPES[kind]] if kind else allowed(list(INDEX_TYPES.values()), most, dim, goal.serve_memory)
    # Lists on the disk are there in pieces first, and as a whole beside these.
    codes = [k.bytes_per_vector(dim) * (1 + lies_on_disk(k, most, dim, goal.memory)) for k in kinds if k.factory]
    needed, free = rows * (2 * dim + max(codes, default=0)) + 4 * tables, shutil.disk_usage(out).free
    if needed > free:
        raise ClipkitError(
            f"the index of {rows:,} vectors takes up to {needed / 2**30:.2f} GiB and the disk of {out} has "
            f"{free / 2**30:.2f} free; make room, or name another folder"
        )


def _queries(sets: Sequence[Embeddings], side: Side, given: np.ndarray | None, vectors: Vectors) -> Queries:
    """What people would ask: the given texts; for images their captions, for captions their images; else its own."""
    if given is not None:
        return Queries(np.ascontiguousarray(given, np.float32), f"{len(given):,} given texts")
    other: Side = "text" if side == "image" else "image"
    holders = [s for s in sets if other in s.sides]
    name = "captions" if other == "text" else "images"
    sizes = [s.manifest["counts"][name] for s in holders]
    if sum(sizes) >= FEWEST_CAPTIONS:
        chosen = sample_rows(sum(sizes), SAMPLED_QUERIES, seed=1)
        vectors_of_others = np.concatenate(
            [_rows_of(s, other, chosen - start) for s, start in zip(holders, np.cumsum([0, *sizes]), strict=False)]
        )
        return Queries(vectors_of_others, f"{len(vectors_of_others):,} {name}")
    chosen = sample_rows(len(vectors.rows), SAMPLED_QUERIES, seed=1)
    description = f"{len(chosen):,} of its own {'images' if side == 'image' else 'captions'}, each without itself"
    return Queries(vectors.rows[chosen].astype(np.float32), description, chosen)


def _keep_queries(out: Path, side: Side, queries: Queries) -> None:
    """Leave the queries with the index, to measure it again after a change; not where they are vectors of its own."""
    if queries.own is None:
        with atomic_write(out / "queries" / f"{side}.npy") as handle:
            np.save(handle, queries.vectors.astype(np.float16))


def kept_queries(folder: Path, side: Side) -> np.ndarray | None:
    """What `_keep_queries` left, float32 ``[queries, dim]``.

    Raises:
        ClipkitError: where the file is cut or altered.
    """
    path = folder / "queries" / f"{side}.npy"
    try:
        return np.load(path).astype(np.float32) if path.is_file() else None
    except (OSError, ValueError, EOFError) as error:
        raise ClipkitError(f"{path} is cut or altered; build the index again") from error


def _rows_of(embeddings: Embeddings, side: Side, rows: np.ndarray) -> np.ndarray:
    parts, start = [np.zeros((0, embeddings.manifest["dim"]), np.float32)], 0
    for block in embeddings.blocks(side):
        inside = rows[(rows >= start) & (rows < start + len(block))] - start
        parts.append(block[inside].astype(np.float32))
        start += len(block)
    return np.concatenate(parts)


def _chosen(vectors: Vectors, queries: Queries, kind: str | None, goal: Goal, scratch: Path) -> IndexChoice:
    if kind == "Flat" or len(vectors.rows) < 2:
        why = "as asked for" if kind else "too few to choose for"
        return IndexChoice(INDEX_TYPES["Flat"], Effort(), 1.0, [], why)
    if kind is not None:
        return IndexChoice(INDEX_TYPES[kind], Effort(), 0.0, [], "as asked for")
    return choose(vectors, queries, goal, list(INDEX_TYPES.values()), scratch)


@dataclass(frozen=True)
class _FirstSegment:
    """The side of the first segment that is being built."""

    index: Path
    side: Side
    vectors: Vectors
    goal: Goal

    @property
    def codes_path(self) -> Path:
        return codes_path(self.index, FIRST, self.side)


def _coded(segment: _FirstSegment, choice: IndexChoice, queries: Queries) -> IndexChoice:
    """Build the kind that was chosen on all vectors, tune and measure it there; the next one where it falls short."""
    truth = Truth(segment.vectors, queries)
    done: list[IndexChoice] = []
    for kind in (choice.kind, *choice.others):
        if kind.is_flat:
            done.append(replace(choice, kind=kind, effort=Effort(), recall=1.0))
        else:
            done.append(_built(segment, replace(choice, kind=kind), truth))
        if done[-1].recall >= segment.goal.recall:
            break
        note(f"{segment.side}: {kind.name} of all {len(segment.vectors.rows):,} finds too little")
    best = max(done, key=lambda each: each.recall)
    if best is not done[-1]:
        best = _built(segment, best, truth)
    if best.kind.is_flat:
        for path in segment.codes_path.parent.glob(f"{segment.side}.codes*"):
            path.unlink()
    why = choice.why if len(done) == 1 else f"{choice.why}, on all vectors ({len(done)} were built)"
    return replace(best, why=why)


def _built(segment: _FirstSegment, choice: IndexChoice, truth: Truth) -> IndexChoice:
    side, vectors, memory = segment.side, segment.vectors, segment.goal.memory
    rows, dim = vectors.rows.shape
    coding = segment.index / "codings" / FIRST / f"{side}.faiss"
    note(f"{side}: {choice.kind.name} of {rows:,} vectors")
    on_disk = lies_on_disk(choice.kind, rows, dim, memory)
    train_coding(vectors, choice.kind, coding, rows=rows, memory=memory, on_disk=on_disk)
    encode(Coding(coding), choice.kind, vectors, segment.codes_path, memory=memory)
    codes = read_codes(segment.codes_path, rows)
    effort, recall, speed = tune_and_measure(codes, vectors, truth, segment.goal.recall)
    note(f"{side}: recall@10 {recall:.3f} with {truth.queries.told}, {speed:,.0f} queries/s on one thread")
    return replace(choice, effort=effort, recall=recall)


def _record(choice: IndexChoice, rows: int) -> dict[str, Any]:
    return {
        "kind": choice.kind.name,
        "effort": choice.effort.as_json(),
        "recall": choice.recall,
        "why": choice.why,
        "rows": rows,
        "tried": [each.as_json() for each in choice.tried],
    }


def _first_generation(out: Path, records: dict[Side, dict[str, Any]]) -> None:
    coded: list[Side] = [side for side, record in records.items() if record["kind"] != "Flat"]
    segment = SegmentState(FIRST, {side: record["rows"] for side, record in records.items()}, coded)
    state = Generation(
        number=1,
        segments=[segment],
        kinds={side: record["kind"] for side, record in records.items()},
        coding=dict.fromkeys(coded, f"codings/{FIRST}"),
        efforts={side: records[side]["effort"] for side in coded},
        recall={side: record["recall"] for side, record in records.items()},
    )
    commit(out, state)


def _plot(out: Path, side: Side, record: dict[str, Any], floor: float) -> None:
    if len(record["tried"]) > 1:
        points = [
            (each["kind"], each["queries_per_second"], each["recall"], each["kind"] == record["kind"])
            for each in record["tried"]
        ]
        figure = tradeoff_figure(points, "queries per second, one thread", "recall@10", (floor, f"wanted: {floor:g}"))
        save_figure(out / f"tried-{side}.png", figure)
