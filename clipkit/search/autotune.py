"""Which kind of index: several are built, of a sample of the vectors where these are many, and measured."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import ClipkitError, give_back_freed_memory, note
from clipkit.search.index_types import INDEX_TYPES, TUNED_FOR, Effort, Kind, lists_for
from clipkit.search.quantize import (
    Coding,
    can_be_built,
    encode,
    learn_lists,
    lies_on_disk,
    read_codes,
    sample_rows,
    train_coding,
)
from clipkit.search.recall import Queries, Truth, seconds_per_query, tune_and_measure
from clipkit.search.vector_file import Vectors, write_vectors

__all__ = ["Goal", "IndexChoice", "Tried", "allowed", "choose"]

PILOT = 200_000  # vectors on which kinds are compared before the best is built on all
SMALL = 20_000_000  # numbers (vectors times dimensions) that are compared in full in a few milliseconds
BLOCK = 8192  # vectors at a time that are copied


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
class IndexChoice:
    """The kind that was chosen and everything that was tried."""

    kind: Kind
    effort: Effort
    recall: float
    tried: list[Tried]
    why: str
    others: tuple[Kind, ...] = ()
    """What comes next, should this one not keep on all vectors what it promised on some."""


@dataclass(frozen=True)
class Goal:
    """What an index is to reach, and within what."""

    recall: float
    """At 10, a fraction."""
    memory: int
    """Bytes that building may use."""
    serve_memory: int | None = None
    """Bytes that the index may hold in memory while it is served; None for as much as it wants."""


@dataclass(frozen=True)
class Trial:
    """What kinds are compared on: all vectors, or a sample of them where they are many."""

    vectors: Vectors
    truth: Truth
    """Half of its queries are tuned with, half measured with."""
    lists: np.ndarray
    """See `train_coding`."""
    rows: int
    """How many vectors there are in all, for which the memory is told."""
    goal: Goal


def try_kind(kind: Kind, trial: Trial, folder: Path, *, least: int = 1) -> Tried:
    """Build one kind in a folder and measure it.

    Args:
        kind: to try.
        trial: what it is built of and measured with.
        folder: where ``coding.faiss`` and ``codes.faiss`` go.
        least: see `tune`.
    """
    vectors, memory = trial.vectors, trial.goal.memory
    count, dim = vectors.rows.shape
    bytes_each = kind.bytes_per_vector(dim)
    began = time.perf_counter()
    on_disk = lies_on_disk(kind, trial.rows, dim, memory)  # where all of them will; so are the codes then
    coding_path, codes_path = folder / "coding.faiss", folder / "codes.faiss"
    train_coding(vectors, kind, coding_path, rows=count, memory=memory, on_disk=on_disk, lists=trial.lists)
    encode(Coding(coding_path), kind, vectors, codes_path, memory=memory)
    seconds = time.perf_counter() - began
    codes = read_codes(codes_path, count)
    effort, recall, speed = tune_and_measure(codes, vectors, trial.truth, trial.goal.recall, least)
    factory = kind.filled(count, dim, on_disk=on_disk)
    return Tried(kind.name, factory, count, bytes_each, bytes_each * trial.rows, effort, recall, speed, seconds)


def try_flat(vectors: Vectors, queries: Queries, rows: int) -> Tried:
    """What the exact search costs; its recall is 1 by definition."""
    count, dim = vectors.rows.shape
    speed = count / rows / seconds_per_query(lambda query: vectors.search(query, min(TUNED_FOR, count)), queries)
    bytes_each = INDEX_TYPES["Flat"].bytes_per_vector(dim)
    return Tried("Flat", "", count, bytes_each, bytes_each * rows, Effort(), 1.0, speed, 0.0)


def choose(vectors: Vectors, queries: Queries, goal: Goal, kinds: Sequence[Kind], scratch: Path) -> IndexChoice:
    """The fastest kind whose recall reaches the goal within its memory.

    Where there are many vectors, kinds are compared on a sample of them, and what looks best is what is then built.

    Args:
        vectors: all of them.
        queries: to measure with.
        goal: recall and memory.
        kinds: to compare.
        scratch: a folder for the sample and its indexes, emptied afterwards.

    Raises:
        ClipkitError: where no kind fits into the memory.
    """
    rows, dim = vectors.rows.shape
    fitting = _fitting(kinds, rows, dim, goal)
    if [k.name for k in fitting] == ["Flat"] or (rows * dim <= SMALL and any(k.is_flat for k in fitting)):
        why = "few enough to compare in full" if rows * dim <= SMALL else "the only kind that was to be tried"
        return IndexChoice(INDEX_TYPES["Flat"], Effort(), 1.0, [try_flat(vectors, queries, rows)], why)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as made:
        sample, sample_queries = vectors, queries
        if rows > PILOT:
            sample, sample_queries = _sample(vectors, queries, Path(made) / "sample.faiss")
        lists = learn_lists(sample, lists_for(len(sample.rows)), goal.memory)
        tried = _try_all(fitting, Trial(sample, Truth(sample, sample_queries), lists, rows, goal), Path(made))
    good = sorted((t for t in tried if t.recall >= goal.recall), key=lambda each: -each.queries_per_second)
    if good:
        why = f"the fastest with recall@10 of {goal.recall:g} or more"
    else:
        good = [max(tried, key=lambda each: each.recall)]
        why = f"none reached a recall@10 of {goal.recall:g}; the one that found most"
    best, *others = good
    next_best = tuple(INDEX_TYPES[each.kind] for each in others)
    return IndexChoice(INDEX_TYPES[best.kind], best.effort, best.recall, tried, why, next_best)


def _fitting(kinds: Sequence[Kind], rows: int, dim: int, goal: Goal) -> list[Kind]:
    fitting = allowed(kinds, rows, dim, goal.serve_memory)
    fitting = [kind for kind in fitting if can_be_built(kind, rows, dim, goal.memory)]
    if not fitting:
        least = min(kinds, key=lambda kind: kind.bytes_per_vector(dim))
        smallest = rows * least.bytes_per_vector(dim) / 2**30
        raise ClipkitError(
            f"{rows:,} vectors take {smallest:.2f} GiB as {least.name}, the smallest, "
            f"and {(goal.serve_memory or 0) / 2**30:.2f} are allowed; give --serve-memory more"
        )
    return fitting


def _try_all(kinds: Sequence[Kind], trial: Trial, scratch: Path) -> list[Tried]:
    tried: list[Tried] = []
    least = 1
    for kind in kinds:
        folder = scratch / kind.name
        folder.mkdir()
        if kind.is_flat:
            each = try_flat(trial.vectors, trial.truth.queries, trial.rows)
        else:
            each = try_kind(kind, trial, folder, least=least)
        shutil.rmtree(folder)  # the disk need not hold the codes of all kinds at once
        if kind.has_lists:
            # All kinds have the same lists. The first, whose codes lose next to nothing, needs the fewest of them.
            least = max(least, each.effort.lists // 2)
        if trial.rows > PILOT:
            each.note = f"on a sample of {each.vectors:,}"
        note(f"{each.kind}: recall@10 {each.recall:.3f}, {each.queries_per_second:,.0f} queries/s on one thread")
        tried.append(each)
        give_back_freed_memory()
    return tried


def allowed(kinds: Sequence[Kind], rows: int, dim: int, serve_memory: int | None) -> list[Kind]:
    """Those that the memory which an index is served from holds, in bytes; None for as much as they want."""
    return [kind for kind in kinds if serve_memory is None or rows * kind.bytes_per_vector(dim) <= serve_memory]


def _sample(vectors: Vectors, queries: Queries, path: Path) -> tuple[Vectors, Queries]:
    rows, dim = vectors.rows.shape
    chosen = sample_rows(rows, PILOT)
    own = queries.own
    if own is not None:  # the queries' own rows must be in it
        chosen = np.union1d(chosen[: PILOT - len(own)], own)
        own = np.searchsorted(chosen, own)
    blocks = (vectors.rows[part] for part in np.array_split(chosen, max(1, len(chosen) // BLOCK)))
    count = write_vectors(path, blocks, dim)
    return Vectors(path, count, dim), Queries(queries.vectors, queries.told, own)
