"""The kinds of index that are tried, what each holds in memory, and how FAISS is asked without changing it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from clipkit.core import ClipkitError

__all__ = ["INDEX_TYPES", "TUNED_FOR", "Effort", "Kind", "lists_for", "parameters", "reranking", "selector_of"]

TUNED_FOR = 10  # results: efforts are chosen by recall at so many
MANY_LISTS = 2**15  # from here on the nearest lists are found by a graph and not by looking at all


@dataclass(frozen=True)
class Effort:
    """How hard a search looks. More of anything finds more and takes longer."""

    lists: int = 1
    """Inverted lists that are read (``nprobe``)."""
    breadth: int = 16
    """Candidates that a walk through a graph keeps (``efSearch``)."""
    rerank: int = 10
    """How many of the best by code are scored again by the stored vectors."""

    def for_results(self, k: int) -> "Effort":
        """What it takes to find k results as surely as `TUNED_FOR`: as much deeper, and by the root of it wider."""
        more = max(1.0, k / TUNED_FOR)
        rerank = max(k, round(self.rerank * more))
        return Effort(round(self.lists * more**0.5), max(round(self.breadth * more**0.5), rerank), rerank)

    def doubled(self) -> "Effort":
        """Twice as hard, up to where harder would be in vain."""
        return Effort(min(2 * self.lists, 2**20), min(2 * self.breadth, 4096), min(2 * self.rerank, 4096))

    def as_json(self) -> dict[str, int]:
        """Plain values, for the index's state."""
        return asdict(self)


@dataclass(frozen=True)
class Kind:
    """A way to find candidates."""

    name: str
    """As the command and the tables call it."""
    factory: str
    """For FAISS, with ``{lists}``, ``{parts}`` and ``{dim}`` to be filled in; empty where every vector is looked at.

    ``RR`` turns the vectors at random first, so that no dimension holds more than another: a bit or two for each are
    then worth the same. Without it one bit found 70 and with it 97 of 100 neighbours among 100 candidates (512
    dimensions whose powers fall off, as those of embeddings do).
    """
    told: str
    """What it is."""

    @property
    def is_flat(self) -> bool:
        """Whether every vector is looked at."""
        return not self.factory

    @property
    def has_lists(self) -> bool:
        """Whether vectors are in inverted lists; these can be built piece by piece and lie on the disk."""
        return "IVF" in self.factory

    def filled(self, rows: int, dim: int, *, on_disk: bool = False) -> str:
        """The factory string for so many vectors; `on_disk`: with codes that FAISS can keep in lists on the disk."""
        lists = lists_for(rows)
        graph = "_HNSW32" if lists >= MANY_LISTS else ""
        filled = self.factory.format(lists=f"{lists}{graph}", parts=_parts(dim), dim=dim)
        if on_disk:  # codes for the processor's registers stand in blocks, which cannot; these take as many bytes
            filled = filled.replace(f"PQ{_parts(dim)}x4fsr", f"PQ{_parts(dim, 8)}x8").replace(
                f"OPQ{_parts(dim)}", f"OPQ{_parts(dim, 8)}"
            )
        return filled

    def bytes_per_vector(self, dim: int) -> float:
        """What a vector takes in memory while the index is served; stored vectors are on the disk and not counted."""
        if self.is_flat:
            return 2.0 * dim  # they are all read for every question: a Flat index that is not in memory is no use
        numbered = 8 if self.has_lists else 0
        if "SQfp16" in self.factory:
            return 2 * dim + numbered
        if "SQ8" in self.factory:
            return dim + numbered + (2 * 32 * 4 + 12 if "HNSW" in self.factory else 0)
        if "RaBitQ" in self.factory:
            return dim / 8 + 8 + numbered  # with two factors of its own
        return _parts(dim) / 2 + numbered


INDEX_TYPES = {
    kind.name: kind
    for kind in (
        Kind("Flat", "", "every vector is compared: exact"),
        Kind("IVF-Flat", "IVF{lists},SQfp16", "lists of whole vectors"),
        Kind("IVF-SQ8", "IVF{lists},SQ8", "lists of one byte per dimension, re-ranked"),
        Kind("IVF-PQ", "RR{dim},IVF{lists},PQ{parts}x4fsr", "lists of 4 bits per 4 dimensions, re-ranked"),
        Kind("OPQ", "OPQ{parts},IVF{lists},PQ{parts}x4fsr", "IVF-PQ after a rotation that was learned"),
        Kind("RaBitQ", "RR{dim},IVF{lists},RaBitQ", "lists of 1 bit per dimension (Gao & Long 2024), re-ranked"),
        Kind("HNSW", "HNSW32,SQ8", "a graph over one byte per dimension (Malkov & Yashunin 2018), re-ranked"),
    )
}


def lists_for(rows: int) -> int:
    """How many inverted lists: about twice the root of the rows, a power of two, with 40 rows to each at least."""
    return 2 ** round(math.log2(max(1.0, min(2 * rows**0.5, rows / 40))))


def _parts(dim: int, each: int = 4) -> int:
    # So many dimensions to a part where that goes; FAISS wants the parts to divide the dimension.
    wanted = max(1, dim // each)
    return next(parts for parts in range(wanted, 0, -1) if dim % parts == 0)


# FAISS's constructors take any attribute by name and keep what they are given alive; its signatures do not say so.
_made: Any = faiss


def selector_of(passing: Any) -> Any:
    """For FAISS: only rows where this bool ``[rows]`` is true."""
    return _made.IDSelectorBitmap(np.packbits(passing, bitorder="little"))


def parameters(index: Any, effort: Effort, selector: Any = None) -> Any:
    """What one search is to do, in FAISS's words. Nothing is ever set on the index itself, which threads share."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(faiss.downcast_index(index.index), effort, selector)
        return _made.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexScalarQuantizer):
        return _made.SearchParameters(sel=selector)
    if isinstance(index, faiss.IndexHNSW):
        return _made.SearchParametersHNSW(efSearch=max(effort.breadth, 1), sel=selector)
    if isinstance(index, faiss.IndexIVF):
        lists = min(max(effort.lists, 1), index.nlist)
        kind = _made.IVFRaBitQSearchParameters if "RaBitQ" in type(index).__name__ else _made.SearchParametersIVF
        coarse = _made.SearchParametersHNSW(efSearch=max(64, 2 * lists)) if _is_graph(index.quantizer) else None
        return kind(nprobe=lists, sel=selector, quantizer_params=coarse)
    raise ClipkitError(f"an index of FAISS's {type(index).__name__} is not one of clipkit's; build it again")


def reranking(index: Any, effort: Effort, k: int, selector: Any = None) -> Any:
    """As `parameters`, for an index that scores `effort.rerank` candidates again to give the best k of them."""
    deep = max(k, effort.rerank)
    base = parameters(faiss.downcast_index(index.base_index), effort, selector)
    # FAISS rounds k times this factor down.
    return _made.IndexRefineSearchParameters(k_factor=(deep + 0.5) / k, base_index_params=base)


def _is_graph(index: Any) -> bool:
    return isinstance(faiss.downcast_index(index), faiss.IndexHNSW)
