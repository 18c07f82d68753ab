"""Which kind of index, and how hard it looks: chosen by measurement, with the questions that people ask.

Codes that find images by images may miss them by text: text vectors lie elsewhere. So what is measured is the recall
of held-out text queries against the exact search, and the time of one query at a time on one thread.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipkit.errors import ClipkitError
from clipkit.heap import give_back_freed_memory
from clipkit.log import note
from clipkit.search.coding import (
    Coding,
    can_be_built,
    encode,
    learn_lists,
    lies_on_disk,
    read_codes,
    sample_rows,
    train_coding,
)
from clipkit.search.kinds import KINDS, TUNED_FOR, Effort, Kind, lists_for, parameters, reranking
from clipkit.search.vectors import Vectors, write_vectors

__all__ = ["Choice", "Queries", "Tried", "Truth", "choose", "measure", "share_found", "tune", "tune_and_measure"]

PILOT = 200_000  # vectors on which kinds are compared before the best is built on all
SMALL = 20_000_000  # numbers (vectors times dimensions) that are compared in full in a few milliseconds
DEEPEST = 1000  # candidates that are scored again at the most
TIE = np.float32(1e-5)  # scores that differ by less are equal: sums in another order
TIMED = 64  # queries, one after another
BLOCK = 8192  # vectors at a time in the exact search: 16 MiB at 512 dimensions
TIED = 20  # rows beyond the k best that may share the k-th best score: copies of one image, mostly
FEW = 40  # queries: not to be divided any more


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
        if len(self.vectors) < FEW:
            return self
        return Queries(self.vectors[which::2], self.told, None if self.own is None else self.own[which::2])


@dataclass
class Tried:
    """What was found out about one kind."""

    kind: str
    factory: str
    vectors: int
    bytes_per_vector: float
    memory: float
    """Bytes in memory for all vectors, while it is served."""
    effort: Effort
    recall: float
    """At 10, of queries that nothing was tuned with."""
    queries_per_second: float
    """On one thread, one query at a time."""
    build_seconds: float
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return {**vars(self), "effort": self.effort.as_json()}


@dataclass(frozen=True)
class Choice:
    """The kind that was chosen and everything that was tried."""

    kind: Kind
    effort: Effort
    recall: float
    tried: list[Tried]
    why: str
    others: tuple[Kind, ...] = ()
    """What comes next, should this one not keep on all vectors what it promised on some."""


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
        scores = _without_self(heap.D, heap.I, queries.own)
        self.worst = -np.sort(-scores, axis=1)[:, self.k - 1 : self.k]
        self._good = np.sort(np.where(scores >= self.worst - TIE, heap.I, -1), axis=1)

    def half(self, which: int) -> "Truth":
        """Of every other query: one half is tuned with, the other says what that is worth."""
        found = copy.copy(self)
        if len(self.worst) >= FEW:
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
    return float((scores[:, :k] >= worst - TIE).sum() / (len(scores) * k))


def _without_self(scores: np.ndarray, rows: np.ndarray, own: np.ndarray | None) -> np.ndarray:
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
        seconds = _seconds(lambda q, e=effort: _searched(refined, Queries(q, ""), e), queries)
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
    return -np.sort(-_without_self(scores, rows, queries.own), axis=1)


def _seconds(search: Callable[[np.ndarray], object], queries: Queries) -> float:
    """The median time of one query, float32 ``[1, dim]``, on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        spent = []
        for query in queries.vectors[:TIMED]:
            began = time.perf_counter()
            search(query[None])
            spent.append(time.perf_counter() - began)
    finally:
        faiss.omp_set_num_threads(threads)
    return float(np.median(spent))


def measure(codes: Any, vectors: Vectors, truth: Truth, effort: Effort) -> tuple[float, float]:
    """Recall at 10 against the exact search, and queries per second on one thread."""
    refined = vectors.refining(codes)
    found = _searched(refined, truth.queries, effort)
    return truth.recall(found), 1 / _seconds(lambda q: _searched(refined, Queries(q, ""), effort), truth.queries)


def tune_and_measure(
    codes: Any, vectors: Vectors, truth: Truth, floor: float, least: int = 1
) -> tuple[Effort, float, float]:
    """Tune with one half of the queries and measure with the other, which must reach the floor as well.

    Returns:
        The effort, and what `measure` says of it.
    """
    wanted = floor
    while True:
        effort, reached = tune(codes, vectors, truth.half(0), wanted, least)
        recall, speed = measure(codes, vectors, truth.half(1), effort)
        if recall >= floor or reached < wanted:  # or there is no more to be had
            return effort, recall, speed
        wanted = max(wanted, reached) + (floor - recall)
        if wanted > 1:
            return effort, recall, speed


def try_kind(
    kind: Kind,
    vectors: Vectors,
    truth: Truth,
    folder: Path,
    *,
    floor: float,
    rows: int,
    memory: int,
    lists: np.ndarray,
    least: int = 1,
) -> Tried:
    """Build one kind in a folder and measure it.

    Args:
        kind: to try.
        vectors: to build of.
        truth: half of its queries to tune with, half to measure with.
        folder: where ``coding.faiss`` and ``codes.faiss`` go.
        floor: recall to tune for.
        rows: for how many vectors the memory is told.
        memory: bytes that building may use.
        lists: see `train_coding`.
        least: see `tune`.
    """
    held, dim = vectors.rows.shape
    each = kind.bytes_per_vector(dim)
    began = time.perf_counter()
    on_disk = lies_on_disk(kind, rows, dim, memory)  # where all of them will; so are the codes then
    train_coding(vectors, kind, folder / "coding.faiss", rows=held, memory=memory, on_disk=on_disk, lists=lists)
    encode(Coding(folder / "coding.faiss"), kind, vectors, folder / "codes.faiss", memory=memory)
    seconds = time.perf_counter() - began
    codes = read_codes(folder / "codes.faiss", held)
    effort, recall, speed = tune_and_measure(codes, vectors, truth, floor, least)
    return Tried(
        kind.name, kind.filled(held, dim, on_disk=on_disk), held, each, each * rows, effort, recall, speed, seconds
    )


def flat(vectors: Vectors, queries: Queries, rows: int) -> Tried:
    """What the exact search costs; its recall is 1 by definition."""
    held, dim = vectors.rows.shape
    speed = held / rows / _seconds(lambda query: vectors.search(query, min(TUNED_FOR, held)), queries)
    each = KINDS["Flat"].bytes_per_vector(dim)
    return Tried("Flat", "", held, each, each * rows, Effort(), 1.0, speed, 0.0)


def choose(
    vectors: Vectors,
    queries: Queries,
    *,
    floor: float,
    memory: int,
    serve_memory: int | None,
    kinds: Sequence[Kind],
    scratch: Path,
) -> Choice:
    """The fastest kind whose recall reaches the floor within the memory.

    Where there are many vectors, kinds are compared on a sample of them, and what looks best is what is then built.

    Args:
        vectors: all of them.
        queries: to measure with.
        floor: recall at 10, a fraction.
        memory: bytes that building may use.
        serve_memory: bytes that the index may hold in memory while it is served; None for as much as it wants.
        kinds: to compare.
        scratch: a folder for the sample and its indexes, emptied afterwards.

    Raises:
        ClipkitError: where no kind fits into the memory.
    """
    rows, dim = vectors.rows.shape
    fitting = [k for k in kinds if serve_memory is None or rows * k.bytes_per_vector(dim) <= serve_memory]
    fitting = [k for k in fitting if can_be_built(k, rows, dim, memory)]
    if not fitting:
        least = min(kinds, key=lambda kind: kind.bytes_per_vector(dim))
        smallest = rows * least.bytes_per_vector(dim) / 2**30
        raise ClipkitError(
            f"{rows:,} vectors take {smallest:.2f} GiB as {least.name}, the smallest, "
            f"and {(serve_memory or 0) / 2**30:.2f} are allowed; give --serve-memory more"
        )
    if [k.name for k in fitting] == ["Flat"] or (rows * dim <= SMALL and any(k.is_flat for k in fitting)):
        why = "few enough to compare in full" if rows * dim <= SMALL else "the only kind that was to be tried"
        return Choice(KINDS["Flat"], Effort(), 1.0, [flat(vectors, queries, rows)], why)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as made:
        sample, asked = vectors, queries
        if rows > PILOT:
            sample, asked = _sample(vectors, queries, Path(made) / "sample.faiss")
        tried, least = [], 1
        truth, lists = Truth(sample, asked), learn_lists(sample, lists_for(len(sample.rows)), memory)
        how: dict[str, Any] = {"floor": floor, "rows": rows, "memory": memory, "lists": lists}
        for kind in fitting:
            folder = Path(made) / kind.name
            folder.mkdir()
            each = (
                flat(sample, asked, rows) if kind.is_flat else try_kind(kind, sample, truth, folder, least=least, **how)
            )
            if kind.has_lists:
                # All kinds have the same lists. The first, whose codes lose next to nothing, needs the fewest of them.
                least = max(least, each.effort.lists // 2)
            if rows > PILOT:
                each.note = f"on a sample of {each.vectors:,}"
            note(f"{each.kind}: recall@10 {each.recall:.3f}, {each.queries_per_second:,.0f} queries/s on one thread")
            tried.append(each)
            give_back_freed_memory()
    good = sorted((t for t in tried if t.recall >= floor), key=lambda each: -each.queries_per_second)
    if good:
        why = f"the fastest with recall@10 of {floor:g} or more"
    else:
        good = [max(tried, key=lambda each: each.recall)]
        why = f"none reached a recall@10 of {floor:g}; the one that found most"
    best, *others = good
    return Choice(KINDS[best.kind], best.effort, best.recall, tried, why, tuple(KINDS[each.kind] for each in others))


def _sample(vectors: Vectors, queries: Queries, path: Path) -> tuple[Vectors, Queries]:
    rows, dim = vectors.rows.shape
    chosen = sample_rows(rows, PILOT)
    own = queries.own
    if own is not None:  # the queries' own rows must be in it
        chosen = np.union1d(chosen[: PILOT - len(own)], own)
        own = np.searchsorted(chosen, own)
    blocks = (vectors.rows[part] for part in np.array_split(chosen, max(1, len(chosen) // BLOCK)))
    held = write_vectors(path, blocks, dim)
    return Vectors(path, held, dim), Queries(queries.vectors, queries.told, own)
