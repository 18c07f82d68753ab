"""One side of one segment: its vectors, its codes, its metadata, and which of its rows may be found."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from clipkit.core import ClipkitError, Side, atomic_write
from clipkit.embedding import in_schema
from clipkit.search.filters import Filter
from clipkit.search.generations import SegmentState, read_dead
from clipkit.search.index_types import Effort, parameters, reranking, selector_of
from clipkit.search.quantize import read_codes
from clipkit.search.vector_file import Vectors

__all__ = ["Passing", "Segment", "codes_path", "read_table", "table_path", "vectors_path", "write_table"]

SPARE = 8  # rows beyond the k that are wanted
ERROR = 2e-6  # of FAISS's float32 scores of unit vectors, with room
FEW_ROWS = 20_000  # rows: so many are compared in full faster than lists can be read
CODES_FASTER = 3  # times, than whole vectors are compared; those that do not pass cost their code's time, too
PART_IN_FULL = 0.05  # of a segment: up to here the rows that pass are gathered, beyond them all are walked through


def vectors_path(folder: Path, name: str, side: Side) -> Path:
    """Where a segment's vectors of a side stand."""
    return folder / "segments" / name / f"{side}.vectors.faiss"


def codes_path(folder: Path, name: str, side: Side) -> Path:
    """Where a segment's codes of a side stand."""
    return folder / "segments" / name / f"{side}.codes.faiss"


def table_path(folder: Path, name: str, side: Side) -> Path:
    """Where a segment's metadata of a side stand, in Arrow's IPC format."""
    return folder / "segments" / name / f"{side}.arrow"


def write_table(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write tables of one schema one after another; returns how many rows they have."""
    rows, writer = 0, None
    with atomic_write(path) as stream:
        for table in tables:
            writer = writer or pa.ipc.new_file(stream, table.schema)
            writer.write_table(table)
            rows += table.num_rows
        if writer is not None:
            writer.close()
    return rows


def read_table(path: Path) -> pa.Table:
    """What `write_table` wrote, memory-mapped.

    Raises:
        ClipkitError: where it is missing, cut or altered.
    """
    try:
        with pa.memory_map(str(path)) as stream:
            return pa.ipc.open_file(stream).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipkitError(f"{path} is missing, cut or altered; build the index again") from error


@dataclass(frozen=True)
class Passing:
    """Which rows of a segment may be found, and what is derived from that once."""

    rows: np.ndarray
    """bool ``[rows]``."""

    @cached_property
    def count(self) -> int:
        """How many may be found."""
        return int(np.count_nonzero(self.rows))

    @cached_property
    def numbers(self) -> np.ndarray:
        """Their numbers, int64, rising."""
        return np.flatnonzero(self.rows)

    @cached_property
    def selector(self) -> Any:
        """The same for FAISS."""
        return selector_of(self.rows)


class Segment:
    """A side of a segment, opened. Nothing in it changes, so threads may share it.

    Args:
        folder: of the index.
        state: of the segment in the generation that is opened.
        side: which side.
        dim: of its vectors.

    Raises:
        ClipkitError: where a file is missing, cut or altered.
    """

    def __init__(self, folder: Path, state: SegmentState, side: Side, dim: int):
        self.name, self.side = state.name, side
        self.rows = state.rows[side]
        self.vectors = Vectors(vectors_path(folder, state.name, side), self.rows, dim)
        self._codes = self._refined = None
        if side in state.coded:
            self._codes = read_codes(codes_path(folder, state.name, side), self.rows)
            self._refined = self.vectors.refining(self._codes)
        path = table_path(folder, state.name, side)
        self.table = read_table(path)
        if self.table.num_rows != self.rows:
            raise ClipkitError(
                f"{path} has {self.table.num_rows:,} rows where {self.rows:,} are expected; it was altered, build the "
                "index again"
            )
        self.alive: Passing | None = None
        """None where nothing is gone."""
        if side in state.dead:
            alive = np.ones(self.rows, bool)
            alive[read_dead(folder, state.dead[side], state.gone[side])] = False
            self.alive = Passing(alive)

    def findable(self) -> np.ndarray:
        """Which rows are not gone, bool ``[rows]``."""
        return np.ones(self.rows, bool) if self.alive is None else self.alive.rows

    def passing(self, where: Filter, schema: pa.Schema) -> Passing:
        """Which rows may be found.

        Args:
            where: must hold for them.
            schema: of the whole index: a column that this segment has not is missing in all its rows.
        """
        used, own = where.columns(schema.names), self.table.schema
        fields = [own.field(f.name) if f.name in own.names and f.name not in used else f for f in schema]
        mask = where.rows(in_schema(self.table, pa.schema(fields)))
        return Passing(mask if self.alive is None else mask & self.alive.rows)

    def effort_among(self, passing: Passing | None, effort: Effort) -> Effort | None:
        """How hard the codes are to be searched among the rows that pass: wider in proportion, where these are few.

        Args:
            passing: as `passing` gives it.
            effort: as tuned on all rows.

        Returns:
            None where there are no codes, or comparing in full is faster or surer.
        """
        if self._codes is None:
            return None
        if passing is None:
            return effort
        share = passing.count / max(self.rows, 1)
        if share == 0 or (passing.count <= FEW_ROWS and share < 1):
            return None
        ivf = faiss.try_extract_index_ivf(self._codes)
        if ivf is None:
            in_vain = share <= PART_IN_FULL  # a graph whose nodes hardly ever pass leads nowhere
        else:
            in_vain = CODES_FASTER * share < min(1, effort.lists / share / ivf.nlist)
        if in_vain:
            return None
        return Effort(round(effort.lists / share), round(effort.breadth / share), effort.rerank)

    def by_code(
        self, queries: np.ndarray, k: int, passing: Passing | None, effort: Effort
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k by code; scores say no more than which is better, also among segments of one coding.

        Args:
            queries: float32 ``[queries, dim]``.
            k: how many.
            passing: as `passing` gives it.
            effort: see `effort_among`.

        Returns:
            float32 scores and int64 rows ``[queries, k]``, best first, -1 where there are fewer.
        """
        codes: Any = self._codes
        scores, rows = codes.search(queries, k, params=parameters(codes, effort, passing and passing.selector))
        return (-scores if codes.metric_type == faiss.METRIC_L2 else scores), rows

    def reranked(
        self, queries: np.ndarray, k: int, passing: Passing | None, effort: Effort
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `by_code`, of the best `effort.rerank` by code the best k by their vectors, with exact scores."""
        refined: Any = self._refined
        deep = max(k, effort.rerank)
        search_parameters = reranking(refined, effort, deep, passing and passing.selector)
        scores, rows = refined.search(queries, deep, params=search_parameters)
        return self._settled(queries, scores, rows, k)[:2]

    def in_full(self, queries: np.ndarray, k: int, passing: Passing | None) -> tuple[np.ndarray, np.ndarray]:
        """As `by_code`, of all rows that pass, with exact scores; where the k-th shares its score, the first rows."""
        # FAISS keeps any rows of the last score. Some more than k show where others are as near: few, or copies.
        deep = k + SPARE
        scores, rows, undecided = self._settled(queries, *self._compared(queries, deep, passing), k)
        open_ = np.flatnonzero(undecided)
        while len(open_):
            deep *= 4
            open_queries = queries[open_]
            scores[open_], rows[open_], undecided = self._settled(
                open_queries, *self._compared(open_queries, deep, passing), k
            )
            open_ = open_[undecided]
        return scores, rows

    def _settled(
        self, queries: np.ndarray, scores: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best k of what FAISS found, by scores that depend on nothing else that is asked; of equal ones the first.

        FAISS's scores err in their last digits, differently with the number of questions and of threads. So all rows
        are scored again that are as near as that to the k-th.

        Returns:
            Scores and rows ``[queries, k]``, and for which queries a row that was not found might be among them, bool.
        """
        reach = scores[:, k - 1] - ERROR * np.linalg.norm(queries, axis=1)
        near = (rows >= 0) & (scores >= reach[:, None])
        width = max(k, int(near.sum(axis=1).max(initial=0)))
        exact = self.vectors.scores(queries, rows[:, :width])
        return *_in_order(exact, rows[:, :width], k), near[:, -1]

    def _compared(self, queries: np.ndarray, k: int, passing: Passing | None) -> tuple[np.ndarray, np.ndarray]:
        if passing is not None and (passing.count <= FEW_ROWS or passing.count / self.rows <= PART_IN_FULL):
            return self.vectors.search_among(queries, k, passing.numbers)
        return self.vectors.search(queries, k, passing and passing.selector)


def _in_order(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k; of equal scores the lower row is first, and -1, which is no row, comes last."""
    order = np.lexsort((rows, -np.where(rows < 0, -np.inf, scores)), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
