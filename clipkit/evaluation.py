"""Evaluations of a model on a source: one function for training, the command and notebooks, so that figures agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.embed import embed_source
from clipkit.errors import ClipkitError
from clipkit.metrics import retrieval_chance, retrieval_recall
from clipkit.sources import Source
from clipkit.towers import DualEncoder

__all__ = ["Retrieval", "evaluate_retrieval"]


@dataclass
class Retrieval:
    """Figures of a retrieval evaluation, and what they were measured on."""

    figures: dict[str, float]
    """As `clipkit.metrics.retrieval_recall` names them."""
    chance: dict[str, float]
    """What guessing scores, under the same names."""
    images: int
    captions: int
    left_out: list[dict[str, Any]]
    """Ledger lines of samples that could not be used."""


def evaluate_retrieval(
    model: DualEncoder,
    source: Source,
    ks: Sequence[int] = (1, 5, 10),
    *,
    batch_size: int = 64,
    show: str | None = None,
) -> Retrieval:
    """Recall at k in both directions between a source's images and captions.

    Args:
        model: in the precision that is wanted; scores are float32.
        source: with captions.
        ks: list lengths.
        batch_size: images at a time.
        show: title of a progress bar.

    Raises:
        ClipkitError: where no sample can be used.
    """
    found = embed_source(source, model, batch_size=batch_size, show=show)
    if not found.captions:
        first = found.left_out[0] if found.left_out else {"key": source.spec, "reason": "no sample has a caption"}
        raise ClipkitError(f"nothing in {source.spec} can be evaluated; the first: {first['key']}: {first['reason']}")
    return Retrieval(
        retrieval_recall(found.image, found.text, found.image_of_text, ks),
        retrieval_chance(len(found.image), found.image_of_text, ks),
        len(found.image),
        len(found.captions),
        found.left_out,
    )
