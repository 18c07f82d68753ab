"""Recall as an index serves it: whether a query's own item is among the answers that a user would get."""

from collections.abc import Iterator, Sequence

import numpy as np

from clipkit.errors import ClipkitError
from clipkit.search import Index
from clipkit.stored import Stored

__all__ = ["served_hits"]

Array = np.ndarray
AT_ONCE = 256  # queries


def served_hits(stored: Stored, ks: Sequence[int]) -> dict[str, Array]:
    """Ask an index every caption for its image, and every image for its captions, as `clipkit search` would.

    Beside the exact recall it shows what the index's codes lose. ``image_retrieval_served_share@k`` then is the share
    of what the exact search finds that the index answers, too.

    Args:
        stored: of an index, with both sides.
        ks: list lengths.

    Returns:
        ``served_image_retrieval_recall@k``, 0 or 1 of each caption, and ``served_text_retrieval_recall@k``, of each
        image that has a caption, in their order: uint8.

    Raises:
        ClipkitError: where it is no index.
    """
    index, image_at, text_at = stored.index, stored.image_at, stored.text_at
    if index is None or image_at is None or text_at is None:
        raise ClipkitError(f"--through-index asks an index, and {stored.folder} is none; name one")
    owners = {"image": np.arange(len(image_at)), "text": stored.image_of_text}
    rows = {"image": stored.image_of_text, "text": np.flatnonzero(np.bincount(stored.image_of_text) > 0)}
    found = {}
    for side, positions, queries in (("image", image_at, stored.text), ("text", text_at, stored.image)):
        # Which image a position belongs to; the index may hold more than was asked about.
        owner_at = np.full(int(index.positions(side).max()) + 1, -1)
        owner_at[positions] = owners[side]
        wanted = rows[side] if side == "text" else None
        first = [
            _first_hit(index, block, side, max(ks), own, owner_at)
            for block, own in _queries(queries, rows[side], wanted)
        ]
        places = np.concatenate(first)
        found |= {f"served_{side}_retrieval_recall@{k}": (places < k).astype(np.uint8) for k in ks}
    return found


def _queries(parts: Sequence[Array], own: Array, wanted: Array | None) -> Iterator[tuple[Array, Array]]:
    """Some query vectors at a time with the image row of each; those rows of the parts that are wanted, or all."""
    start = asked = 0
    for part in parts:
        here = (
            np.arange(len(part)) if wanted is None else wanted[(wanted >= start) & (wanted < start + len(part))] - start
        )
        for at in range(0, len(here), AT_ONCE):
            some = here[at : at + AT_ONCE]
            yield part[some].astype(np.float32), own[asked : asked + len(some)]
            asked += len(some)
        start += len(part)


def _first_hit(index: Index, vectors: Array, side: str, k: int, own: Array, owner_at: Array) -> Array:
    """At which place, from 0, each query's first own item is among the answers; k where it is not."""
    positions = index.search(vectors, k, side).positions  # type: ignore[arg-type]
    hits = (owner_at[np.maximum(positions, 0)] == own[:, None]) & (positions >= 0)
    return np.where(hits.any(axis=1), hits.argmax(axis=1), k)
