"""Questions of several parts (a text and an image, without another text), thresholds, pages, and twins left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipkit.core import ClipkitError, Side
from clipkit.metrics import inner_products, on_grid
from clipkit.search.index import Found, Index

__all__ = ["Fusion", "QueryPart", "SearchOptions", "ask", "fused_vector"]

Fusion = Literal["early", "score", "rank"]
RANK_OFFSET = 60  # of reciprocal rank fusion, as Cormack et al. 2009 found best
DEPTH = 100  # of each part's own list, at least, where lists are joined
SHORT = 1e-6  # a sum of vectors as short as this points nowhere, and cosines this near are the same


@dataclass(frozen=True)
class QueryPart:
    """One part of a question."""

    vector: np.ndarray
    """float ``[dim]``."""
    weight: float = 1.0
    """Negative for what is not wanted."""


def fused_vector(parts: Sequence[QueryPart]) -> np.ndarray:
    """The parts as one unit vector, ``Σ wᵢ·vᵢ/|vᵢ|`` made one long; float32 ``[dim]``.

    Raises:
        ClipkitError: where there is no part, a vector is zero, or the parts cancel each other.
    """
    if not parts:
        raise ClipkitError("a question needs a text, an image or a vector")
    total = np.zeros(len(parts[0].vector), np.float64)
    for part in parts:
        length = float(np.linalg.norm(part.vector))
        if length < SHORT:
            raise ClipkitError("a vector of length zero points nowhere; leave it out")
        total += part.weight * part.vector / length
    length = float(np.linalg.norm(total))
    if length < SHORT:
        raise ClipkitError("the parts of the question cancel each other; change a weight")
    return (total / length).astype(np.float32)


@dataclass(frozen=True)
class SearchOptions:
    """What a question asks for, whatever its parts are."""

    k: int = 10
    """How many rows."""
    side: Side = "image"
    """Whether to look among images or captions."""
    fusion: Fusion = "early"
    """Of several parts. early: one vector of all parts is searched for, and scores are cosines with it. score: each
    part is searched for, its cosines with all that any part found are brought to mean 0 and deviation 1 (images lie
    closer to images than to texts, so bare cosines would let them decide alone), and their weighted sum is the score.
    rank: reciprocal rank fusion, ``Σ w/(60 + rank)`` (Cormack et al. 2009)."""
    where: str | None = None
    """A condition on the metadata."""
    min_score: float | None = None
    """Rows of a lower score are left out."""
    offset: int = 0
    """How many of the best to pass over: pages."""
    collapse: str | float | None = None
    """A column: of rows with one value the best stays. A number: of rows whose vectors' cosine is that or more the best
    stays."""
    exact: bool = False
    """Compare in full."""


def ask(index: Index, parts: Sequence[QueryPart], options: SearchOptions | None = None) -> Found:
    """The best k rows for a question of one or several parts.

    Args:
        index: to ask.
        parts: of the question.
        options: how many rows, of which side, and which of them.

    Returns:
        Scores and positions ``[1, at most k]``, best first.

    Raises:
        ClipkitError: for what `Index.search` refuses, parts that cancel each other or are not finite, or a column that
            is not there.
    """
    options = options or SearchOptions()
    side, offset, k = options.side, options.offset, options.k
    for part in parts:
        if part.vector.shape != (index.dim,):
            raise ClipkitError(f"a vector of shape {part.vector.shape} does not fit an index of dimension {index.dim}")
        if not np.isfinite([part.weight, *part.vector]).all():
            raise ClipkitError("a vector or a weight of the question holds NaN or infinity; leave it out")
    everything = index.count(side)
    if isinstance(options.collapse, str):
        _check_column(index, side, options.collapse)
    depth = max(1, min(everything, offset + k))  # where there is nothing, that is what is found
    while True:
        scores, positions = _joined(index, parts, depth, options)
        kept = positions >= 0
        if options.min_score is not None:
            kept &= scores >= options.min_score
        # Whether another, deeper look could bring more: not where rows ran out, or have fallen below the threshold.
        ended = depth >= everything or not kept.all()
        scores, positions = scores[kept], positions[kept]
        if options.collapse is not None and len(positions):
            first = _first_of_twins(index, side, positions, options.collapse)
            scores, positions = scores[first], positions[first]
        if ended or len(positions) >= offset + k:
            page = slice(offset, offset + k)
            return index.found(scores[None, page], positions[None, page], side)
        depth = min(everything, 4 * depth)


def _joined(
    index: Index, parts: Sequence[QueryPart], depth: int, options: SearchOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The best rows as far as `depth`: their scores and positions, one list of all parts."""
    fusion, side = options.fusion, options.side
    if fusion == "early" or (len(parts) == 1 and parts[0].weight > 0):
        found = index.search(fused_vector(parts)[None], depth, side, where=options.where, exact=options.exact)
        return found.scores[0], found.positions[0]
    if not any(part.weight > 0 for part in parts):
        raise ClipkitError(f"fusion={fusion} needs a part that is wanted; with none but unwanted ones use early")
    vectors = np.stack([fused_vector([QueryPart(part.vector)]) for part in parts])
    wanted = np.array([part.weight > 0 for part in parts])
    found = index.search(vectors[wanted], max(depth, DEPTH), side, where=options.where, exact=options.exact)
    positions = np.unique(found.positions[found.positions >= 0])
    if not len(positions):
        return np.zeros(0, np.float32), positions
    cosines = inner_products(vectors, index.vectors(positions, side))
    weights = np.array([part.weight for part in parts])[:, None]
    if fusion == "rank":
        places = np.argsort(np.argsort(-cosines, axis=1, kind="stable"), axis=1, kind="stable") + 1
        of_parts = 1 / (RANK_OFFSET + places)
    else:
        spread = cosines.std(axis=1, keepdims=True)
        of_parts = (cosines - cosines.mean(axis=1, keepdims=True)) / np.maximum(spread, SHORT)
    scores = (weights * of_parts).sum(axis=0).astype(np.float32)
    order = np.lexsort((positions, -scores))[:depth]
    return scores[order], positions[order]


def _check_column(index: Index, side: Side, column: str) -> None:
    names = {name for segment in index.segments(side) for name in segment.table.column_names}
    if column not in names:
        raise ClipkitError(f"no column {column!r} to collapse by; there are {', '.join(sorted(names))}")


def _first_of_twins(index: Index, side: Side, positions: np.ndarray, collapse: str | float) -> list[int]:
    first: list[int] = []
    if isinstance(collapse, str):
        seen: set[Any] = set()
        for at, row in enumerate(index.rows(positions, side)):
            value = row.get(collapse)
            if value is None:  # is no twin of anything
                first.append(at)
            elif str(value) not in seen:
                first.append(at)
                seen.add(str(value))
        return first
    vectors = index.vectors(positions, side).astype(np.float32)
    vectors = on_grid(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    for at in range(len(positions)):
        # The cosine of a vector with its copy is 1 but for the last digits.
        if not first or (vectors[first] @ vectors[at]).max() < collapse - SHORT:
            first.append(at)
    return first
