"""The vectors as they were embedded, in one file that is a FAISS index too: what exact answers come from.

float16 codes of a scalar-quantised index are the float16 numbers themselves, one row after another at the end of the
file. So one file serves both: FAISS searches it where it lies, memory-mapped, and rows for re-ranking are read from
the same bytes. FAISS can write such a file only from memory; here it is written from a stream of blocks.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipkit.core import ClipkitError, atomic_write
from clipkit.metrics import paired_products
from clipkit.search.index_types import Effort, parameters

__all__ = ["Vectors", "refuse_bad_vectors", "write_vectors"]

ROWS_AT = slice(8, 16)  # of the header: how many rows, int64; behind the four letters of the kind and the dimension
BYTES_AT = slice(-8, None)  # how many bytes of codes follow, uint64
AT_ONCE = 8192  # rows in float32 at a time: 16 MiB at 512 dimensions


def write_vectors(path: Path, blocks: Iterable[np.ndarray], dim: int) -> int:
    """Write blocks of vectors one after another; the file comes into place whole.

    Args:
        path: of the file.
        blocks: float ``[rows, dim]`` each, finite; kept as float16.
        dim: of every vector.

    Returns:
        How many rows there are.

    Raises:
        ClipkitError: where a vector is not finite, or the file cannot be written.
    """
    header = bytearray(faiss.serialize_index(_exact_index(dim)).tobytes())
    rows = 0
    with atomic_write(path) as handle:
        handle.write(header)
        for block in blocks:
            refuse_bad_vectors(block, f"the vectors for {path.name}", rows)
            handle.write(np.ascontiguousarray(block, np.float16).tobytes())
            rows += len(block)
        header[ROWS_AT] = np.int64(rows).tobytes()
        header[BYTES_AT] = np.uint64(rows * dim * 2).tobytes()
        handle.seek(0)
        handle.write(header)
    return rows


def _exact_index(dim: int) -> Any:
    return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def refuse_bad_vectors(vectors: np.ndarray, what: str, before: int = 0) -> None:
    """Refuse NaN and infinity, which every comparison would get wrong without a word.

    Raises:
        ClipkitError: with the first such row, counted from `before`.
    """
    # The sum is finite only where every number is, and costs no array of booleans as large as the vectors.
    if not np.isfinite(vectors.sum(dtype=np.float64)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        raise ClipkitError(f"{what} hold NaN or infinity, first in row {before + int(bad[0]):,}")


class Vectors:
    """Stored vectors, memory-mapped. Reading and searching change nothing, so threads may share them.

    Args:
        path: of a file that `write_vectors` wrote.
        rows, dim: what must be in it.

    Raises:
        ClipkitError: where it is missing, cut or holds something else.
    """

    def __init__(self, path: Path, rows: int, dim: int):
        self.path = path
        try:
            size = path.stat().st_size
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, OSError) as error:
            raise ClipkitError(f"{path} is missing, cut or altered; build the index again") from error
        held = (self._index.ntotal, self._index.d)
        kind = getattr(getattr(self._index, "sq", None), "qtype", None)
        if held != (rows, dim) or kind != faiss.ScalarQuantizer.QT_fp16:
            raise ClipkitError(
                f"{path} holds {held[0]:,} vectors of dimension {held[1]} where {rows:,} of {dim} are expected; it was "
                "altered, build the index again"
            )
        try:
            self.rows = np.memmap(path, np.float16, "r", size - rows * dim * 2, (rows, dim)) if rows else _none(dim)
            """float16 ``[rows, dim]``."""
        except OSError as error:  # a change may clear it away at this moment
            raise ClipkitError(f"{path} is missing; build the index again") from error

    def search(self, queries: np.ndarray, k: int, selector: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """The best k of all rows, or of those that a FAISS selector lets pass, by inner product.

        Returns:
            float32 scores and int64 rows ``[queries, k]``, best first; -1 where there are fewer than k.
        """
        return self._index.search(queries, k, params=parameters(self._index, Effort(), selector))

    def refining(self, codes: Any) -> Any:
        """A FAISS index that finds by codes of these vectors and scores what they find again by the vectors."""
        # FAISS wants one metric for both, and a graph's codes are compared by distance. Nobody shares them yet.
        metric, codes.metric_type = codes.metric_type, faiss.METRIC_INNER_PRODUCT
        refined = faiss.IndexRefine(codes, self._index)
        codes.metric_type = metric
        return refined

    def search_among(self, queries: np.ndarray, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best k of some rows: only they are read.

        Args:
            queries: float32 ``[queries, dim]``.
            k: how many.
            rows: int64, rising.
        """
        heap = faiss.ResultHeap(len(queries), k, keep_max=True)
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            block = self.rows[part].astype(np.float32)
            scores, at = faiss.knn(queries, block, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(np.ascontiguousarray(scores), np.ascontiguousarray(part[at]))
        heap.finalize()
        heap.I[~np.isfinite(heap.D)] = -1
        return heap.D, heap.I

    def scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The inner products of each query with rows of its own, the same whichever others are asked for.

        Args:
            queries: float32 ``[queries, dim]``.
            rows: int64 ``[queries, candidates]``; -1 for none.

        Returns:
            float32 ``[queries, candidates]``, -inf where the row is -1. Exact on the grid of `clipkit.metrics.products`
            before that, where FAISS's products differ in the last digits with the number of questions and of threads.
        """
        products = np.empty(rows.shape, np.float32)
        at_once = max(1, AT_ONCE // max(1, rows.shape[1]))
        for start in range(0, len(queries), at_once):
            chunk = slice(start, start + at_once)
            products[chunk] = paired_products(self.rows[np.maximum(rows[chunk], 0)], queries[chunk, None])[..., 0]
        products[rows < 0] = -np.inf
        return products


def _none(dim: int) -> np.ndarray:
    return np.zeros((0, dim), np.float16)
