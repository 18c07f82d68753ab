"""An index that lives: rows are added, replaced and taken away while others read, and put together again in time.

A change writes a segment of what is new, marks what is gone, measures the recall again, and makes the next generation.
Vectors are never moved by it, so it costs what is new and not what is there; `compact_index` moves them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipkit.core import ClipkitError, Side, note, warn
from clipkit.embedding import Embeddings, image_id_column, in_schema, joined_schema
from clipkit.search.build import default_memory, kept_queries
from clipkit.search.generations import Generation, SegmentState, commit, current, revert, write_dead
from clipkit.search.index import Index
from clipkit.search.index_types import INDEX_TYPES, TUNED_FOR, Effort
from clipkit.search.quantize import Coding, encode, sample_rows
from clipkit.search.recall import share_found, without_self
from clipkit.search.segments import codes_path, table_path, vectors_path, write_table
from clipkit.search.vector_file import Vectors, write_vectors
from clipkit.storage import hold, read_manifest

__all__ = ["Changed", "compact_index", "delete_rows", "go_back", "update_index"]

BLOCK = 65_536
RECHECKED_QUERIES = 500  # queries that a change is measured with


@dataclass(frozen=True)
class Changed:
    """What a change did, in images (captions, where an index holds no images)."""

    generation: int
    added: int = 0
    replaced: int = 0
    deleted: int = 0
    unchanged: int = 0

    @property
    def nothing(self) -> bool:
        """Whether everything was as it should be already."""
        return not (self.added or self.replaced or self.deleted)


class _Change:
    """The next generation of an index in the making. As a context, it holds the index's lock."""

    def __init__(self, folder: Path):
        self.manifest = read_manifest(folder, "index")
        self._lock = hold(folder, "changes")
        self.folder = folder
        self.state = current(folder)
        self.index = Index(folder, self.manifest, self.state)
        self.number = self.state.number + 1
        self.segments = {segment.name: segment for segment in self.state.segments}

    def __enter__(self) -> "_Change":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def ids(self, side: Side) -> Iterator[tuple[SegmentState, np.ndarray, np.ndarray]]:
        """Per segment the image ids of its rows, and whether each can be found."""
        for segment in self.index.segments(side):
            yield self.segments[segment.name], segment.table[image_id_column(side)].to_numpy(), segment.findable()

    def bury(self, ids: np.ndarray) -> None:
        """Mark every row of these images, and of their captions, as gone."""
        for side in self.state.sides:
            for segment, of_rows, alive in self.ids(side):
                dying = alive & np.isin(of_rows, ids)
                if dying.any():
                    rows = np.flatnonzero(~alive | dying)
                    name = write_dead(self.folder, self.number, segment.name, side, rows)
                    self.segments[segment.name] = replace(
                        self.segments[segment.name],
                        dead={**self.segments[segment.name].dead, side: name},
                        gone={**self.segments[segment.name].gone, side: len(rows)},
                    )

    def write(self, side: Side, blocks: Iterator[np.ndarray], tables: Iterator[pa.Table], memory: int) -> int:
        """Write a side of the generation's own segment; returns how many rows it has."""
        name = f"{self.number:06d}"
        path = vectors_path(self.folder, name, side)
        rows = write_vectors(path, blocks, self.index.dim)
        write_table(table_path(self.folder, name, side), tables)
        known = self.segments.get(name) or SegmentState(name, {}, [])
        coded = known.coded
        if side in self.state.coding and rows:
            coding = Coding(self.folder / self.state.coding[side] / f"{side}.faiss")
            vectors = Vectors(path, rows, self.index.dim)
            encode(
                coding, INDEX_TYPES[self.state.kinds[side]], vectors, codes_path(self.folder, name, side), memory=memory
            )
            coded = [*coded, side]
        self.segments[name] = replace(known, rows={**known.rows, side: rows}, coded=coded)
        return rows

    def commit(self, *, floor: float) -> int:
        """Measure what has come of it, look harder where that is needed, and make it what counts."""
        segments = [segment for segment in self.segments.values() if any(_left(segment))]
        state = replace(self.state, number=self.number, segments=segments, before=self.state.number)
        state = _measured(self.folder, self.manifest, state, floor)
        commit(self.folder, state)
        return state.number


def _left(segment: SegmentState) -> list[int]:
    return [rows - segment.gone.get(side, 0) for side, rows in segment.rows.items()]


def update_index(folder: Path, sets: Sequence[Embeddings], *, gone: bool = False, memory: int | None = None) -> Changed:
    """Bring an index up to date with embeddings: what is new is added, what has changed is replaced.

    An image has changed where its vector, its metadata, or any of its captions has.

    Args:
        folder: of the index.
        sets: embeddings of the index's model.
        gone: take away what is in none of them.
        memory: bytes that may be used; None for half of what is free.

    Raises:
        ClipkitError: where the embeddings are of another model or hold an id twice, or another process changes the
            index.
    """
    with _Change(folder) as change:
        for given in sets:
            if given.fingerprint != change.index.fingerprint:
                own, other = change.index.fingerprint[:12], given.fingerprint[:12]
                raise ClipkitError(
                    f"{folder} is of model {own}, {given.folder} of {other}; embed with the index's model, or build "
                    "another index"
                )
            if not set(given.sides) & set(change.state.sides):
                raise ClipkitError(
                    f"{given.folder} holds {' and '.join(given.sides)} vectors only, and {folder} none of them; build "
                    "another index of both"
                )
        ids = np.concatenate([np.zeros(0, np.int64), *(table["id"].to_numpy() for s in sets for table in s.tables())])
        if len(np.unique(ids)) < len(ids):
            raise ClipkitError(
                "the embedding folders hold a sample of one name more than once; embed a folder above both"
            )
        alive_ids = _alive_ids(change)
        new = ~np.isin(ids, alive_ids)
        changed = np.zeros(len(ids), bool)
        common = ids[~new]
        if len(common):
            before, after = _digests(change, sets, common)
            changed[~new] = [before[i] != after[i] for i in common.tolist()]
        missing = np.setdiff1d(alive_ids, ids) if gone else np.zeros(0, np.int64)
        counts = Changed(change.number, int(new.sum()), int(changed.sum()), len(missing), int((~new & ~changed).sum()))
        if counts.nothing:
            return replace(counts, generation=change.state.number)
        change.bury(np.concatenate([ids[changed], missing]))
        wanted = ids[new | changed]
        if len(wanted):
            for side in change.state.sides:
                holders = [s for s in sets if side in s.sides]
                change.write(side, _vectors_of(holders, side, wanted), _rows_of(holders, side, wanted), _memory(memory))
        for given in sets:
            given.refuse_changed()
        change.commit(floor=_floor(change))
        return counts


def delete_rows(folder: Path, ids: Sequence[int] = (), *, where: str | None = None) -> Changed:
    """Take images and their captions away, by id or by a condition on their metadata.

    Raises:
        ClipkitError: for an id that the index does not hold, or a condition that does not fit.
    """
    with _Change(folder) as change:
        alive_ids = _alive_ids(change)
        try:
            wanted = np.asarray(ids, np.int64)
        except OverflowError as error:
            raise ClipkitError(f"{folder} holds no image of id {max(ids, key=abs)}: ids have 63 bits") from error
        unknown = np.setdiff1d(wanted, alive_ids)
        if len(unknown):
            raise ClipkitError(
                f"{folder} holds no image of id {unknown[0]} ({len(unknown):,} of {len(wanted):,} unknown)"
            )
        if where is not None:
            side = change.state.sides[0]
            column = image_id_column(side)
            passing_ids = [
                s.table[column].to_numpy()[p.rows] for s, p in change.index.passing(side, where) if p is not None
            ]
            wanted = np.union1d(wanted, np.concatenate([np.zeros(0, np.int64), *passing_ids]))
        wanted = np.unique(wanted)
        if not len(wanted):
            return Changed(change.state.number)
        change.bury(wanted)
        change.commit(floor=_floor(change))
        return Changed(change.number, deleted=len(wanted))


def compact_index(folder: Path, *, memory: int | None = None) -> Changed:
    """Put all segments together into one without the rows that are gone; what can be found stays the same."""
    with _Change(folder) as change:
        if len(change.state.segments) == 1 and not change.state.segments[0].dead:
            return Changed(change.state.number)
        old = list(change.segments)
        for side in change.state.sides:
            segments = change.index.segments(side)
            schema = joined_schema([segment.table.schema for segment in segments])

            def blocks(segments: Any = segments) -> Iterator[np.ndarray]:
                for segment in segments:
                    for start in range(0, segment.rows, BLOCK):
                        block = segment.vectors.rows[start : start + BLOCK]
                        yield block if segment.alive is None else block[segment.alive.rows[start : start + BLOCK]]

            def tables(segments: Any = segments, schema: Any = schema) -> Iterator[pa.Table]:
                for segment in segments:
                    kept = (
                        segment.table if segment.alive is None else segment.table.filter(pa.array(segment.alive.rows))
                    )
                    yield in_schema(kept, schema)

            change.write(side, blocks(), tables(), _memory(memory))
        for name in old:
            del change.segments[name]
        return Changed(change.commit(floor=_floor(change)))


def go_back(folder: Path) -> Changed:
    """Make the generation before the last change the one that counts.

    Raises:
        ClipkitError: where there is none, or another process changes the index.
    """
    read_manifest(folder, "index")
    lock = hold(folder, "changes")
    try:
        return Changed(revert(folder).number)
    finally:
        lock.release()


def _memory(given: int | None) -> int:
    return given or default_memory()


def _floor(change: _Change) -> float:
    return change.manifest["wanted"]["recall"]


def _alive_ids(change: _Change) -> np.ndarray:
    found = [ids[alive] for side in change.state.sides for _, ids, alive in change.ids(side)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def _vectors_of(sets: Sequence[Embeddings], side: Side, wanted: np.ndarray) -> Iterator[np.ndarray]:
    column = image_id_column(side)
    for each in sets:
        for block, table in zip(each.blocks(side), each.tables(side), strict=True):
            yield block[np.isin(table[column].to_numpy(), wanted)]


def _rows_of(sets: Sequence[Embeddings], side: Side, wanted: np.ndarray) -> Iterator[pa.Table]:
    column = image_id_column(side)
    schema = joined_schema([schema for each in sets for schema in each.index_schemas(side)])
    for each in sets:
        for table in each.index_tables(side):
            yield in_schema(table.filter(pa.array(np.isin(table[column].to_numpy(), wanted))), schema)


def _digests(change: _Change, sets: Sequence[Embeddings], ids: np.ndarray) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Of images as the index holds them and as the sets do, on the sides that the index has."""
    there, given = ({i: hashlib.blake2b(digest_size=16) for i in ids.tolist()} for _ in range(2))
    for side in change.state.sides:
        segments, holders = change.index.segments(side), [each for each in sets if side in each.sides]
        # A column whose types differ among folders is kept as one that goes for all: both are told as that.
        own = joined_schema([schema for each in holders for schema in each.index_schemas(side)])
        kinds = joined_schema([own, *(segment.table.schema for segment in segments)])
        for segment in segments:
            _digest(there, side, segment.vectors.rows, segment.table, segment.findable(), [kinds])
        for each in holders:
            for block, table in zip(each.blocks(side), each.index_tables(side), strict=True):
                _digest(given, side, block, table, np.ones(len(block), bool), [own, kinds])
    before, after = ({i: each.digest() for i, each in found.items()} for found in (there, given))
    return before, after


def _digest(
    found: dict[int, Any],
    side: Side,
    vectors: np.ndarray,
    table: pa.Table,
    alive: np.ndarray,
    schemas: Sequence[pa.Schema],
) -> None:
    """Add rows, brought into each schema in turn, to the digests of their images.

    A value that is missing is as a column that is not there.
    """
    column = image_id_column(side)
    ids = table[column].to_numpy()
    chosen = np.flatnonzero(alive & np.isin(ids, np.fromiter(found, np.int64, len(found))))
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK]
        taken = table.take(pa.array(rows))
        for schema in schemas:
            taken = in_schema(taken, schema)
        for i, vector, row in zip(ids[rows].tolist(), vectors[rows], taken.to_pylist(), strict=True):
            known = {name: value for name, value in row.items() if value is not None}
            found[i].update(vector.tobytes())
            found[i].update(json.dumps(known, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))


def _measured(folder: Path, manifest: dict[str, Any], state: Generation, floor: float) -> Generation:
    """The state with its recall measured again, and more effort where it had fallen below the floor."""
    index = Index(folder, manifest, state)
    for side, effort_before in state.efforts.items():
        queries, own = _questions(index, side)
        k = min(TUNED_FOR, state.count(side) - (own is not None))
        if k < 1 or not len(queries):
            continue
        exact = _scores(index, queries, own, k, side, exact=True)
        effort = Effort(**effort_before)
        while True:
            recall = share_found(_scores(index, queries, own, k, side, effort=effort), exact[:, -1:], k)
            harder = effort.doubled()
            if recall >= floor or harder == effort:
                break
            effort = harder
        if recall < floor:
            warn(f"{side}: recall@10 is {recall:.3f} where {floor:g} was wanted, and more does not help; build anew")
        if effort.as_json() != effort_before:
            note(f"{side}: looks harder now, to keep a recall@10 of {floor:g}")
        state = replace(
            state,
            efforts={**state.efforts, side: effort.as_json()},
            recall={**state.recall, side: recall},
        )
    return state


def _questions(index: Index, side: Side) -> tuple[np.ndarray, np.ndarray | None]:
    """What the index was measured with; where that was vectors of its own, of those that it holds now, and where."""
    kept = kept_queries(index.folder, side)
    if kept is not None:
        return kept[sample_rows(len(kept), RECHECKED_QUERIES)], None
    positions = index.positions(side)
    own = positions[sample_rows(len(positions), RECHECKED_QUERIES)]
    return index.vectors(own, side).astype(np.float32), own


def _scores(
    index: Index, queries: np.ndarray, own: np.ndarray | None, k: int, side: Side, **options: Any
) -> np.ndarray:
    """The k best scores, best first; a vector of the index is no answer to itself."""
    found = index.search(queries, k + (own is not None), side, **options)
    return -np.sort(-without_self(found.scores, found.positions, own), axis=1)[:, :k]
