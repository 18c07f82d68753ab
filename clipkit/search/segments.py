"""One side of one segment: its vectors, its codes, its metadata, and which of its rows may be found."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from clipkit.artifact import atomic_write
from clipkit.embeddings import Side
from clipkit.errors import ClipkitError
from clipkit.filters import Filter
from clipkit.search.coding import read_codes
from clipkit.search.generations import SegmentState, read_dead
from clipkit.search.kinds import Effort, parameters, selector_of
from clipkit.search.vectors import Vectors

__all__ = ["Segment", "codes_path", "read_table", "table_path", "vectors_path", "write_table"]

FEW = 20_000  # rows: so many are compared in full faster than lists can be read
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
        self.codes: Any = None
        if side in state.coded:
            self.codes = read_codes(codes_path(folder, state.name, side), self.rows)
        path = table_path(folder, state.name, side)
        self.table = read_table(path)
        if self.table.num_rows != self.rows:
            raise ClipkitError(
                f"{path} has {self.table.num_rows:,} rows where {self.rows:,} are expected; it was altered, build the "
                "index again"
            )
        self.alive: np.ndarray | None = None
        """bool ``[rows]``; None where nothing is gone."""
        if side in state.dead:
            self.alive = np.ones(self.rows, bool)
            self.alive[read_dead(folder, state.dead[side], state.gone[side])] = False

    def findable(self) -> np.ndarray:
        """Which rows are not gone, bool ``[rows]``."""
        return np.ones(self.rows, bool) if self.alive is None else self.alive

    def passing(self, where: Filter | None) -> np.ndarray | None:
        """Which rows may be found, bool ``[rows]``; None where all may."""
        if where is None:
            return self.alive
        found = where.rows(self.table)
        return found if self.alive is None else found & self.alive

    def candidates(
        self, queries: np.ndarray, k: int, passing: np.ndarray | None, effort: Effort | None
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """The best k of the rows that may be found.

        Args:
            queries: float32 ``[queries, dim]``.
            k: how many.
            passing: as `passing` gives it.
            effort: for the codes, as tuned on all rows; where few rows pass, it looks wider in proportion. None to
                compare in full.

        Returns:
            float32 scores and int64 rows ``[queries, k]``, best first and -1 where there are fewer, and whether the
            scores are exact; by code they say no more than which is better, also among segments of one coding.
        """
        count = self.rows if passing is None else int(np.count_nonzero(passing))
        share = count / max(self.rows, 1)
        if self.codes is None or effort is None or not self._worth_it(count, share, effort):
            return (*self._in_full(queries, k, passing, count, share), True)
        wider = Effort(round(effort.lists / share), round(effort.breadth / share), effort.rerank)
        chosen = parameters(self.codes, wider, selector_of(passing))
        scores, rows = self.codes.search(queries, k, params=chosen)
        if self.codes.metric_type == faiss.METRIC_L2:
            scores = -scores
        return scores, rows, False

    def _worth_it(self, count: int, share: float, effort: Effort) -> bool:
        if count <= FEW and share < 1:
            return False
        ivf = faiss.try_extract_index_ivf(self.codes)
        if ivf is None:
            return share > PART_IN_FULL  # a graph whose nodes hardly ever pass leads nowhere
        return share > 0 and effort.lists / share < ivf.nlist / 2

    def _in_full(
        self, queries: np.ndarray, k: int, passing: np.ndarray | None, count: int, share: float
    ) -> tuple[np.ndarray, np.ndarray]:
        if passing is not None and (share <= PART_IN_FULL or count <= FEW):
            return self.vectors.search_among(queries, k, np.flatnonzero(passing))
        return self.vectors.search(queries, k, selector_of(passing))
