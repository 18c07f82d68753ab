"""How well an index finds, how fast, and how hard it must look: measured with the questions that people ask.

Codes that find images by images may miss them by text: text vectors lie elsewhere. So what is measured is the recall
of held-out text queries against the exact search, and the time of one query at a time on one thread.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from clipkit.search.index_types import TUNED_FOR, Effort, parameters, reranking
from clipkit.search.vector_file import Vectors

__all__ = [
    "Queries",
    "Truth",
    "measure_recall",
    "seconds_per_query",
    "share_found",
    "tune",
    "tune_and_measure",
    "without_self",
]

DEEPEST = 1000  # candidates that are scored again at the most
SCORE_TIE = np.float32(1e-5)  # scores that differ by less are equal: sums in another order
TIMED_QUERIES = 64  # queries, one after another
BLOCK = 8192  # vectors at a time in the exact search: 16 MiB at 512 dimensions
TIED = 20  # rows beyond the k best that may share the k-th best score: copies of one image, mostly
TOO_FEW_TO_HALVE = 40  # queries: not to be divided any more


@dataclass(frozen=True)
class Queries:
    """Questions that an index is measured with."""

    vectors: np.ndarray
    """float32 ``[queries, dim]``."""
    told: str
    """Whose they are, such as "1,000 captions"."""
    own: np.ndarray | None = None
    """The row of each query where queries are vectors of the index itself, which then are no answers to themselves."""

    def half(self, which: int) -> "Queries":
        """Every other one; of a few, all."""
        if len(self.vectors) < TOO_FEW_TO_HALVE:
            return self
        return Queries(self.vectors[which::2], self.told, None if self.own is None else self.own[which::2])


class Truth:
    """The exact scores of the best rows for some queries.

    Args:
        vectors: all of them; they are read once, block by block.
        queries: that are asked.
    """

    def __init__(self, vectors: Vectors, queries: Queries):
        self.queries = queries
        self.k = min(TUNED_FOR, len(vectors.rows) - (queries.own is not None))
        deep = min(self.k + TIED, len(vectors.rows))
        heap = faiss.ResultHeap(len(queries.vectors), deep, keep_max=True)
        for start in range(0, len(vectors.rows), BLOCK):
            block = vectors.rows[start : start + BLOCK].astype(np.float32)
            k = min(deep, len(block))
            if faiss.get_num_gpus():
                gpu = faiss.StandardGpuResources()
                found = faiss.knn_gpu(gpu, queries.vectors, block, k, metric=faiss.METRIC_INNER_PRODUCT)
            else:
                found = faiss.knn(queries.vectors, block, k, metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(np.ascontiguousarray(found[0]), np.ascontiguousarray(found[1] + start))
        heap.finalize()
        scores = without_self(heap.D, heap.I, queries.own)
        self.worst = -np.sort(-scores, axis=1)[:, self.k - 1 : self.k]
        self._good = np.sort(np.where(scores >= self.worst - SCORE_TIE, heap.I, -1), axis=1)

    def half(self, which: int) -> "Truth":
        """Of every other query: one half is tuned with, the other says what that is worth."""
        found = copy.copy(self)
        if len(self.worst) >= TOO_FEW_TO_HALVE:
            found.queries, found.worst = self.queries.half(which), self.worst[which::2]
            found._good = self._good[which::2]
        return found

    def recall(self, scores: np.ndarray) -> float:
        """See `share_found`."""
        return share_found(scores, self.worst, self.k)

    def shares(self, rows: np.ndarray, depths: Sequence[int]) -> np.ndarray:
        """Each query's share of the k best among so many of the first rows found, ``[queries, depths]``.

        No vector is read. Where more than a few rows have the very score of the k-th best, others count as not found.

        Args:
            rows: int64 ``[queries, rows]``, in the order of the codes.
            depths: how many are scored again.
        """
        hits = np.stack([np.isin(row, good[good >= 0]) for row, good in zip(rows, self._good, strict=True)])
        return np.minimum(hits.cumsum(axis=1)[:, np.subtract(depths, 1)], self.k) / self.k


def share_found(scores: np.ndarray, worst: np.ndarray, k: int) -> float:
    """Recall at k: the share of the k best that were found; equal scores are equally good.

    Args:
        scores: of what was found, exact and best first, float32 ``[queries, found]``.
        worst: the k-th best score that there is, ``[queries, 1]``.
        k: how many.
    """
    return float((scores[:, :k] >= worst - SCORE_TIE).sum() / (len(scores) * k))


def without_self(scores: np.ndarray, rows: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    """The scores, -inf where a row is the query's own."""
    return scores if own is None else np.where(rows == own[:, None], -np.inf, scores)


def tune(codes: Any, vectors: Vectors, truth: Truth, floor: float, least: int = 1) -> tuple[Effort, float]:
    """The least effort whose recall at 10 reaches a floor, or the most that there is.

    It is to reach it by a standard error, as other queries are to reach it, too.

    Args:
        codes: the FAISS index.
        vectors: that it was made of.
        truth: the queries to tune with and what the exact search finds.
        floor: recall to reach, a fraction.
        least: lists that are known to be needed, where the index has lists.

    Returns:
        The effort and its recall on these queries.
    """
    queries, rows, refined = truth.queries, len(vectors.rows), vectors.refining(codes)
    depths = [d for d in (10, 20, 50, 100, 200, 500, DEEPEST) if d < rows] or [min(rows, DEEPEST)]
    best: tuple[float, Effort, float] | None = None
    fallback, recall_of_fallback = Effort(), -1.0
    reached = 0
    is_graph = faiss.try_extract_index_ivf(codes) is None
    for width in _widths(codes, least):
        # A walk with so many candidates gives no more than these; lists give as many as are asked for.
        within = [d for d in depths if d <= width] or depths[:1] if is_graph else depths
        _, found = codes.search(queries.vectors, within[-1], params=parameters(codes, Effort(width, width, within[-1])))
        shares = truth.shares(found, within)
        recalls = shares.mean(axis=0)
        sure = recalls - shares.std(axis=0) / len(shares) ** 0.5
        if recalls[-1] > recall_of_fallback:
            fallback, recall_of_fallback = Effort(width, width, within[-1]), recalls[-1]
        enough = [(d, r) for d, r, s in zip(within, recalls, sure, strict=True) if s >= floor]
        if not enough:
            continue
        effort = Effort(width, width, enough[0][0])
        seconds = seconds_per_query(lambda q, e=effort: _searched(refined, Queries(q, ""), e), queries)
        if best is None or seconds < best[0]:
            best = (seconds, effort, enough[0][1])
        reached += 1
        if reached == 3:  # somewhat wider, with fewer scored again, may still be faster; more is not
            break
    if best is None:
        return fallback, recall_of_fallback
    return best[1], best[2]


def _widths(codes: Any, least: int) -> list[int]:
    """Powers of two and, of lists, which cost what they hold, what lies half-way."""
    ivf = faiss.try_extract_index_ivf(codes)
    if ivf is None:
        return [2**i for i in range(4, 11)]
    steps = sorted({step for i in range(ivf.nlist.bit_length()) for step in (2**i, 3 * 2**i // 2)})
    return [step for step in steps if min(least, ivf.nlist) <= step <= ivf.nlist]


def _searched(refined: Any, queries: Queries, effort: Effort) -> np.ndarray:
    """The exact scores of the best that are found, best first."""
    k = min(TUNED_FOR + (queries.own is not None), effort.rerank, refined.ntotal)
    scores, rows = refined.search(queries.vectors, k, params=reranking(refined, effort, k))
    scores = np.where(rows < 0, -np.inf, scores)
    return -np.sort(-without_self(scores, rows, queries.own), axis=1)


def seconds_per_query(search: Callable[[np.ndarray], object], queries: Queries) -> float:
    """The median time of one query, float32 ``[1, dim]``, on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        spent = []
        for query in queries.vectors[:TIMED_QUERIES]:
            began = time.perf_counter()
            search(query[None])
            spent.append(time.perf_counter() - began)
    finally:
        faiss.omp_set_num_threads(threads)
    return float(np.median(spent))


def measure_recall(codes: Any, vectors: Vectors, truth: Truth, effort: Effort) -> tuple[float, float]:
    """Recall at 10 against the exact search, and queries per second on one thread."""
    refined = vectors.refining(codes)
    scores = _searched(refined, truth.queries, effort)
    return truth.recall(scores), 1 / seconds_per_query(
        lambda q: _searched(refined, Queries(q, ""), effort), truth.queries
    )


def tune_and_measure(
    codes: Any, vectors: Vectors, truth: Truth, floor: float, least: int = 1
) -> tuple[Effort, float, float]:
    """Tune with one half of the queries and measure_recall with the other, which must reach the floor as well.

    Returns:
        The effort, and what `measure_recall` says of it.
    """
    wanted = floor
    while True:
        effort, reached = tune(codes, vectors, truth.half(0), wanted, least)
        recall, speed = measure_recall(codes, vectors, truth.half(1), effort)
        if recall >= floor or reached < wanted:  # or there is no more to be had
            return effort, recall, speed
        wanted = max(wanted, reached) + (floor - recall)
        if wanted > 1:
            return effort, recall, speed
