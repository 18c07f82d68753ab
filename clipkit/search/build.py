"""From embeddings to an index: one segment, its kind chosen by measurement, within a memory budget."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.core import ClipkitError, Side, atomic_write, give_back_freed_memory, note, save_figure, tradeoff_figure
from clipkit.embedding import Embeddings, in_schema, joined_schema
from clipkit.search.autotune import Choice, allowed, choose
from clipkit.search.generations import Generation, SegmentState, commit
from clipkit.search.index_types import KINDS, Effort
from clipkit.search.quantize import Coding, encode, lies_on_disk, read_codes, sample_rows, train_coding
from clipkit.search.recall import Queries, Truth, tune_and_measure
from clipkit.search.segments import codes_path, read_table, table_path, vectors_path, write_table
from clipkit.search.vector_file import Vectors, write_vectors
from clipkit.storage import Stage, digest, read_manifest

__all__ = ["Wanted", "build_index", "default_memory", "kept_queries"]

ASKED = 1000  # queries that are measured with, one half to tune, the other to tell
LEAST = 20  # captions: with fewer nothing can be told
PIECE = 8192  # vectors that are copied at a time
FIRST = "000001"  # the segment that a build writes


@dataclass(frozen=True)
class Wanted:
    """What an index is to be."""

    kind: str | None = None
    """Of `KINDS`; None to choose by measurement."""
    recall: float = 0.95
    """Recall at 10, of text queries against the exact search, to be reached."""
    memory: int | None = None
    """Bytes that building may use; None for half of what is free."""
    serve_memory: int | None = None
    """Bytes that the index may hold in memory while it is served; None for as much as it wants."""


def default_memory() -> int:
    """Half of the memory that is free, in bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def build_index(
    sets: Sequence[Embeddings],
    out: Path,
    wanted: Wanted | None = None,
    *,
    queries: np.ndarray | None = None,
    queries_identity: str | None = None,
    model_reference: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build an inner-product index over one or several embedding folders.

    Args:
        sets: opened embeddings of one model.
        out: the index folder. On an unfinished one of the same input it goes on.
        wanted: what it is to be.
        queries: float32 ``[queries, dim]``, unit norm: texts of the people who will ask, to measure with in place of
            the captions.
        queries_identity: what tells them from others; by default their numbers, which differ in their last digits
            where texts are embedded on another machine.
        model_reference: what the manifest says of the model, by default what the first set says.
        overwrite: replace what is there.

    Returns:
        The manifest; under ``tried`` stands what was measured.

    Raises:
        ClipkitError: where the sets come from different models or hold the same ids twice, or where memory or disk
            are too small.
    """
    wanted = wanted or Wanted()
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's other pools keep tens of megabytes that were freed
    _check_models(sets)
    made_from: dict[str, Any] = {"embeddings": [s.manifest["identity"] for s in sets], "wanted": vars(wanted)}
    if queries is not None:
        made_from["queries"] = queries_identity or digest(queries.tolist())
    stage = Stage(out, "index", made_from, inputs=[s.folder for s in sets], overwrite=overwrite)
    if stage.done:
        return read_manifest(out, "index")
    sides: list[Side] = [side for side in ("image", "text") if any(side in s.sides for s in sets)]
    dim: int = sets[0].manifest["dim"]
    memory = wanted.memory or default_memory()
    _refuse_full_disk(out, sets, dim, wanted, memory)
    for name in stage.pending(sides):
        side: Side = "image" if name == "image" else "text"
        rows = _write_first(out, side, sets)
        note(f"{side}: {rows:,} vectors of dimension {dim}")
        vectors = Vectors(vectors_path(out, FIRST, side), rows, dim)
        asked = _queries(sets, side, queries, vectors)
        _keep_queries(out, side, asked)
        for given in sets:
            given.refuse_changed()
        choice = _chosen(vectors, asked, wanted, memory, out / ".work" / "trial")
        if not choice.kind.is_flat:
            choice = _coded(out, side, vectors, choice, asked, wanted, memory)
        stage.finish_part(name, _record(choice, rows))
    records = stage.records(sides)
    if records is None:
        return read_manifest(out, "index")
    told = dict(zip(sides, records, strict=True))
    _first_generation(out, told)
    for side in sides:
        _plot(out, side, told[side], wanted.recall)
    return stage.commit(
        model=model_reference or sets[0].manifest["model"],
        dim=dim,
        metric="inner product of unit vectors (cosine)",
        type=told[sides[0]]["kind"],
        sides=sides,
        counts={side: record["rows"] for side, record in told.items()},
        wanted={"recall": wanted.recall, "serve_memory": wanted.serve_memory},
        chosen={side: {k: v for k, v in r.items() if k not in ("tried", "rows")} for side, r in told.items()},
        tried={side: record["tried"] for side, record in told.items()},
    )


def _check_models(sets: Sequence[Embeddings]) -> None:
    fingerprints = {s.fingerprint: s.folder for s in sets}
    if len(fingerprints) > 1:
        told = ", ".join(f"{folder}: {print_[:12]}" for print_, folder in fingerprints.items())
        raise ClipkitError(f"these embeddings come from different models ({told}); embed them with one")


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


def _refuse_full_disk(out: Path, sets: Sequence[Embeddings], dim: int, wanted: Wanted, memory: int) -> None:
    """Vectors, codes of the largest kind that may be chosen, and metadata; samples go before the codes come."""
    sizes = [sum(s.manifest["counts"][name] for s in sets) for name in ("images", "captions")]
    rows, most = sum(sizes), max(sizes)  # of both sides, and of the larger, as each has its own kind and memory
    tables = sum(
        p.stat().st_size for s in sets for folder in ("metadata", "captions") for p in s.folder.glob(f"{folder}/*")
    )
    kinds = [KINDS[wanted.kind]] if wanted.kind else allowed(list(KINDS.values()), most, dim, wanted.serve_memory)
    # Lists on the disk are there in pieces first, and as a whole beside these.
    codes = [kind.bytes_per_vector(dim) * (1 + lies_on_disk(kind, most, dim, memory)) for kind in kinds if kind.factory]
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
    if sum(sizes) >= LEAST:
        chosen = sample_rows(sum(sizes), ASKED, seed=1)
        found = np.concatenate(
            [_rows_of(s, other, chosen - start) for s, start in zip(holders, np.cumsum([0, *sizes]), strict=False)]
        )
        return Queries(found, f"{len(found):,} {name}")
    chosen = sample_rows(len(vectors.rows), ASKED, seed=1)
    told = f"{len(chosen):,} of its own {'images' if side == 'image' else 'captions'}, each without itself"
    return Queries(vectors.rows[chosen].astype(np.float32), told, chosen)


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
    found, start = [np.zeros((0, embeddings.manifest["dim"]), np.float32)], 0
    for block in embeddings.blocks(side):
        inside = rows[(rows >= start) & (rows < start + len(block))] - start
        found.append(block[inside].astype(np.float32))
        start += len(block)
    return np.concatenate(found)


def _chosen(vectors: Vectors, queries: Queries, wanted: Wanted, memory: int, scratch: Path) -> Choice:
    if wanted.kind == "Flat" or len(vectors.rows) < 2:
        return Choice(KINDS["Flat"], Effort(), 1.0, [], "as asked for" if wanted.kind else "too few to choose for")
    if wanted.kind is not None:
        return Choice(KINDS[wanted.kind], Effort(), 0.0, [], "as asked for")
    return choose(
        vectors,
        queries,
        floor=wanted.recall,
        memory=memory,
        serve_memory=wanted.serve_memory,
        kinds=list(KINDS.values()),
        scratch=scratch,
    )


def _coded(
    out: Path, side: Side, vectors: Vectors, choice: Choice, queries: Queries, wanted: Wanted, memory: int
) -> Choice:
    """Build the kind that was chosen on all vectors, tune and measure it there; the next one where it falls short."""
    truth = Truth(vectors, queries)
    done: list[Choice] = []
    for kind in (choice.kind, *choice.others):
        if kind.is_flat:
            done.append(replace(choice, kind=kind, effort=Effort(), recall=1.0))
        else:
            done.append(_built(out, side, vectors, replace(choice, kind=kind), truth, wanted.recall, memory))
        if done[-1].recall >= wanted.recall:
            break
        note(f"{side}: {kind.name} of all {len(vectors.rows):,} finds too little")
    best = max(done, key=lambda each: each.recall)
    if best is not done[-1]:
        best = _built(out, side, vectors, best, truth, wanted.recall, memory)
    if best.kind.is_flat:
        for path in codes_path(out, FIRST, side).parent.glob(f"{side}.codes*"):
            path.unlink()
    why = choice.why if len(done) == 1 else f"{choice.why}, on all vectors ({len(done)} were built)"
    return replace(best, why=why)


def _built(out: Path, side: Side, vectors: Vectors, choice: Choice, truth: Truth, floor: float, memory: int) -> Choice:
    rows, dim = vectors.rows.shape
    coding = out / "codings" / FIRST / f"{side}.faiss"
    note(f"{side}: {choice.kind.name} of {rows:,} vectors")
    on_disk = lies_on_disk(choice.kind, rows, dim, memory)
    train_coding(vectors, choice.kind, coding, rows=rows, memory=memory, on_disk=on_disk)
    encode(Coding(coding), choice.kind, vectors, codes_path(out, FIRST, side), memory=memory)
    codes = read_codes(codes_path(out, FIRST, side), rows)
    effort, recall, speed = tune_and_measure(codes, vectors, truth, floor)
    note(f"{side}: recall@10 {recall:.3f} with {truth.queries.told}, {speed:,.0f} queries/s on one thread")
    return replace(choice, effort=effort, recall=recall)


def _record(choice: Choice, rows: int) -> dict[str, Any]:
    return {
        "kind": choice.kind.name,
        "effort": choice.effort.as_json(),
        "recall": choice.recall,
        "why": choice.why,
        "rows": rows,
        "tried": [each.as_json() for each in choice.tried],
    }


def _first_generation(out: Path, told: dict[Side, dict[str, Any]]) -> None:
    coded: list[Side] = [side for side, record in told.items() if record["kind"] != "Flat"]
    segment = SegmentState(FIRST, {side: record["rows"] for side, record in told.items()}, coded)
    state = Generation(
        number=1,
        segments=[segment],
        kinds={side: record["kind"] for side, record in told.items()},
        coding=dict.fromkeys(coded, f"codings/{FIRST}"),
        efforts={side: told[side]["effort"] for side in coded},
        recall={side: record["recall"] for side, record in told.items()},
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
