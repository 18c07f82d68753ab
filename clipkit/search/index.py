"""An opened index: questions in, scores and rows out."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipkit.core import ClipkitError, Side
from clipkit.embedding import in_schema, joined_schema
from clipkit.search.filters import Filter
from clipkit.search.generations import Generation, current_number, read
from clipkit.search.index_types import Effort
from clipkit.search.segments import Passing, Segment
from clipkit.search.vector_file import refuse_bad_vectors
from clipkit.storage import read_manifest

__all__ = ["Found", "Index"]


@dataclass(frozen=True)
class Found:
    """What a search found."""

    scores: np.ndarray
    """float32 ``[queries, k]``: cosines, best first; -inf where fewer rows than k may be found."""
    positions: np.ndarray
    """int64 ``[queries, k]``: rows of the index (see `Index.rows`); -1 where there are fewer."""
    _metadata: Callable[[np.ndarray], list[dict[str, Any]]] = field(repr=False)

    @cached_property
    def rows(self) -> list[list[dict[str, Any]]]:
        """The metadata of what each query found, best first; read when first asked for."""
        counts = (self.positions >= 0).sum(axis=1)
        found = iter(self._metadata(self.positions.ravel()))
        return [list(islice(found, int(count))) for count in counts]


class Index:
    """An index as it was when it was opened. Searching changes nothing in it, so threads may share it.

    A change (`clipkit update`) makes a new generation; who opened the one before keeps it, and opens again to see it.

    Args:
        folder: of the index.
        manifest: its own.
        state: the generation to open.

    Raises:
        ClipkitError: where a file is missing, cut or altered.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], state: Generation):
        self.folder, self.manifest, self.state = folder, manifest, state
        self.dim: int = manifest["dim"]
        self._segments: dict[Side, list[Segment]] = {
            side: [Segment(folder, s, side, self.dim) for s in state.segments if s.rows.get(side)]
            for side in state.sides
        }
        # An update may bring columns that were not there before, or leave some out: all segments are seen with all.
        self._schemas = {
            side: joined_schema([segment.table.schema for segment in segments])
            for side, segments in self._segments.items()
        }
        self._starts = {
            side: np.cumsum([0, *(segment.rows for segment in segments)]) for side, segments in self._segments.items()
        }
        self._masks: dict[tuple[Side, str], list[Passing | None]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open the current generation.

        Raises:
            ClipkitError: where it is missing, unfinished, cut or altered.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "index")
        while True:
            number = current_number(folder)
            try:
                return cls(folder, manifest, read(folder, number))
            except ClipkitError:
                if current_number(folder) == number:
                    raise
                # Changed twice since its number was read, and cleared away: there is a newer one.

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors it holds."""
        return self.manifest["model"]["fingerprint"]

    @property
    def sides(self) -> list[Side]:
        """What can be found: ``image``, ``text`` or both."""
        return self.state.sides

    def __len__(self) -> int:
        """How many images can be found (captions, where it holds no images)."""
        return self.state.count(self.sides[0])

    def count(self, side: Side, where: str | None = None) -> int:
        """How many rows of a side can be found, or those of them that a condition holds for."""
        self._check_side(side)
        if where is None:
            return self.state.count(side)
        return sum(s.rows if p is None else p.count for s, p in self.passing(side, where))

    def search(
        self,
        vectors: np.ndarray,
        k: int = 10,
        side: Side = "image",
        *,
        where: str | None = None,
        exact: bool = False,
        effort: Effort | None = None,
    ) -> Found:
        """The k rows nearest to each query, by cosine.

        Args:
            vectors: float ``[queries, dim]``, unit norm.
            k: how many; one larger than what can be found is cut to it.
            side: whether to look among images or captions.
            where: a condition on the metadata (see `clipkit.search.filters`); only rows that it holds for are looked
                at.
            exact: compare in full, whatever the kind of the index.
            effort: how hard to look, in place of what was tuned when the index was built.

        Returns:
            Scores and positions, each ``[queries, min(k, rows)]``, best first, and rows of metadata; of equal scores
            the first row is first. A score is the same whatever else is asked or looked at.

        Raises:
            ClipkitError: for a wrong dimension, NaN, k < 1, a side that the index does not hold, or a filter that
                does not fit.
        """
        self._check_side(side)
        queries = np.ascontiguousarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ClipkitError(f"queries of shape {queries.shape} do not fit an index of dimension {self.dim}")
        if k < 1:
            raise ClipkitError(f"k must be at least 1, got {k}")
        refuse_bad_vectors(queries, "the queries")
        k = min(k, self.count(side))
        if effort is None and side in self.state.efforts:
            effort = Effort(**self.state.efforts[side])
        chosen = None if exact or effort is None else effort.for_results(k)
        if chosen is not None and chosen.rerank > self.state.count(side) / 4:
            chosen = None  # to score so many again is to compare in full
        parts, coded = [], []
        for start, (segment, passing) in zip(self._starts[side], self.passing(side, where), strict=False):
            harder = None if chosen is None else segment.effort_among(passing, chosen)
            if harder is None:
                parts.append(_moved(segment.in_full(queries, k, passing), start))
            else:
                coded.append((start, segment, passing, harder))
        if len(coded) == 1:
            start, segment, passing, harder = coded[0]
            parts.append(_moved(segment.reranked(queries, k, passing, harder), start))
        elif chosen is not None and coded:
            # As one index over all segments would: the best of all by code, and those again by their vectors.
            found = [_moved(segment.by_code(queries, chosen.rerank, *how), start) for start, segment, *how in coded]
            _, candidates = _best(found, chosen.rerank)
            parts.append((self._scores(queries, candidates, side), candidates))
        if not parts:
            parts.append((np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)))
        return self.found(*_best(parts, k), side)

    def found(self, scores: np.ndarray, positions: np.ndarray, side: Side) -> Found:
        """These scores and positions, ``[queries, k]`` each, with their metadata."""
        return Found(scores, positions, lambda flat: self.rows(flat, side))

    def positions(self, side: Side = "image", where: str | None = None) -> np.ndarray:
        """Of all rows that can be found, or of those that a condition holds for, int64, rising."""
        self._check_side(side)
        parts = [
            start + (np.arange(segment.rows) if passing is None else passing.numbers)
            for (segment, passing), start in zip(self.passing(side, where), self._starts[side], strict=False)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def column(self, name: str, positions: np.ndarray, side: Side = "image") -> list[Any]:
        """One column of the metadata of rows; None where a row has none."""
        values_in_order: list[Any] = [None] * len(positions)
        for number, at in self._by_segment(positions, side):
            table = self._segments[side][number].table
            if name in table.column_names:
                values = table[name].take(pa.array(positions[at] - self._starts[side][number])).to_pylist()
                for place, value in zip(at.tolist(), values, strict=True):
                    values_in_order[place] = value
        return values_in_order

    def rows(self, positions: Sequence[int] | np.ndarray, side: Side = "image") -> list[dict[str, Any]]:
        """The metadata of rows, in the order given; of -1 (nothing found) there is none."""
        wanted = np.asarray(positions, np.int64)
        wanted = wanted[wanted >= 0]
        tables, order = [], []
        for number, at in self._by_segment(wanted, side):
            segment = self._segments[side][number]
            chosen = segment.table.take(pa.array(wanted[at] - self._starts[side][number]))
            tables.append(in_schema(chosen, self._schemas[side]))
            order.append(at)
        if not tables:
            return []
        found = pa.concat_tables(tables).combine_chunks()
        return found.take(pa.array(np.argsort(np.concatenate(order), kind="stable"))).to_pylist()

    def vectors(self, positions: Sequence[int] | np.ndarray, side: Side = "image") -> np.ndarray:
        """The stored vectors of rows, float16 ``[n, dim]``."""
        wanted = np.asarray(positions, np.int64)
        vectors = np.empty((len(wanted), self.dim), np.float16)
        for number, at in self._by_segment(wanted, side):
            vectors[at] = self._segments[side][number].vectors.rows[wanted[at] - self._starts[side][number]]
        return vectors

    def _by_segment(self, positions: np.ndarray, side: Side) -> list[tuple[int, np.ndarray]]:
        self._check_side(side)
        end = int(self._starts[side][-1])
        if len(positions) and not (positions.min() >= 0 and positions.max() < end):
            raise ClipkitError(f"{self.folder} has rows 0 to {end - 1} of {side}; {positions.max()} is none of them")
        numbers = np.searchsorted(self._starts[side], positions, side="right") - 1
        return [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]

    def _scores(self, queries: np.ndarray, positions: np.ndarray, side: Side) -> np.ndarray:
        all_scores = np.full(positions.shape, -np.inf, np.float32)
        for segment, start in zip(self._segments[side], self._starts[side], strict=False):
            inside = (positions >= start) & (positions < start + segment.rows)
            if inside.any():
                scores = segment.vectors.scores(queries, np.where(inside, positions - start, -1))
                all_scores = np.where(inside, scores, all_scores)
        return all_scores

    def segments(self, side: Side) -> list[Segment]:
        """What a side is made of, in the order of the positions."""
        self._check_side(side)
        return self._segments[side]

    def passing(self, side: Side, where: str | None) -> list[tuple[Segment, Passing | None]]:
        """The segments of a side and which of their rows may be found; None where all may."""
        segments = self._segments[side]
        if where is None:
            return [(segment, segment.alive) for segment in segments]
        with self._lock:
            masks = self._masks.get((side, where))
        if masks is None:
            condition, schema = Filter(where), self._schemas[side]
            masks = list[Passing | None](segment.passing(condition, schema) for segment in segments)
            with self._lock:
                if len(self._masks) >= 8:  # the pages of one answer ask the same; many askers ask differently
                    self._masks.pop(next(iter(self._masks)))
                self._masks[side, where] = masks
        return list(zip(segments, masks, strict=True))

    def _check_side(self, side: Side) -> None:
        if side not in self._segments:
            raise ClipkitError(f"{self.folder} holds no {side} vectors; it holds {' and '.join(self.sides)}")


def _moved(found: tuple[np.ndarray, np.ndarray], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of a segment as scores and positions in the index."""
    return found[0], np.where(found[1] < 0, -1, found[1] + start)


def _best(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several lists of scores and positions; of equal scores the lower position is first."""
    scores, positions = (np.concatenate([part[i] for part in parts], axis=1) for i in range(2))
    scores = np.where(positions < 0, -np.inf, scores)
    order = np.lexsort((positions, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)
