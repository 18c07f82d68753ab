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
from clipkit.search.index_types import KINDS, TUNED_FOR, Effort, Kind, lists_for
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

__all__ = ["Choice", "Tried", "allowed", "choose"]

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
class Choice:
    """The kind that was chosen and everything that was tried."""

    kind: Kind
    effort: Effort
    recall: float
    tried: list[Tried]
    why: str
    others: tuple[Kind, ...] = ()
    """What comes next, should this one not keep on all vectors what it promised on some."""


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
    speed = held / rows / seconds_per_query(lambda query: vectors.search(query, min(TUNED_FOR, held)), queries)
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
    fitting = allowed(kinds, rows, dim, serve_memory)
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
            shutil.rmtree(folder)  # the disk need not hold the codes of all kinds at once
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
    held = write_vectors(path, blocks, dim)
    return Vectors(path, held, dim), Queries(queries.vectors, queries.told, own)
