"""Recall as an index serves it: whether a query's own item is among the answers that a user would get."""

from collections.abc import Iterator, Sequence

import numpy as np

from clipkit.core import ClipkitError, Side
from clipkit.evaluation.stored import Stored

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
    own = {"image": stored.image_of_text, "text": np.flatnonzero(np.bincount(stored.image_of_text))}
    sides: list[tuple[Side, Array, Array]] = [
        ("image", image_at, np.arange(len(image_at))),
        ("text", text_at, stored.image_of_text),
    ]
    found = {}
    for side, positions, owners in sides:
        # Which image a position belongs to; the index may hold more than was asked about.
        owner_at = np.full(int(index.positions(side).max()) + 1, -1)
        owner_at[positions] = owners
        asking = _blocks(stored.text, None) if side == "image" else _blocks(stored.image, own["text"])
        places, asked = [], 0
        for vectors in asking:
            wanted = own[side][asked : asked + len(vectors), None]
            answers = index.search(vectors, max(ks), side).positions
            hits = (owner_at[np.maximum(answers, 0)] == wanted) & (answers >= 0)
            places.append(np.where(hits.any(axis=1), hits.argmax(axis=1), max(ks)))
            asked += len(vectors)
        first = np.concatenate(places)
        found |= {f"served_{side}_retrieval_recall@{k}": (first < k).astype(np.uint8) for k in ks}
    return found


def _blocks(parts: Sequence[Array], wanted: Array | None) -> Iterator[Array]:
    """Some vectors at a time: all of the parts, or those of some rows, which rise."""
    start = 0
    for part in parts:
        here = np.arange(len(part))
        if wanted is not None:
            here = wanted[(wanted >= start) & (wanted < start + len(part))] - start
        for at in range(0, len(here), AT_ONCE):
            yield part[here[at : at + AT_ONCE]].astype(np.float32)
        start += len(part)
