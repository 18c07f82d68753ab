"""Images that show none of the classes: whether a model's scores tell them from those that do.

Two scores are judged, both the higher the more like a known class: the highest probability of a class at the model's
scale (the maximum softmax probability of Hendrycks & Gimpel 2017; for CLIP Ming et al. 2022), and the highest cosine.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.data.sources import Source, open_source
from clipkit.embedding import stored_kind
from clipkit.evaluation.embedder import SharedWork, nothing_usable, samples_hash
from clipkit.evaluation.measuring import Evaluation, Further, measure_unknown
from clipkit.evaluation.stored import Stored, open_stored
from clipkit.metrics import VectorBlocks, inner_products
from clipkit.models import refuse_another

__all__ = ["EmbeddedUnknown", "UnknownImages", "class_scores", "open_unknown", "with_unknown"]

CHUNK = 4096  # images at a time


@dataclass(frozen=True)
class EmbeddedUnknown:
    """Embeddings of images that show none of the classes."""

    vectors: VectorBlocks
    of: str
    """A hash of which images they are."""
    left_out: list[dict[str, Any]]
    """Ledger lines of what could not be used."""


@dataclass(frozen=True)
class UnknownImages:
    """Images that show none of the classes, opened."""

    images: Source | Stored

    def identity(self) -> object:
        """All that a result depends on."""
        return self.images.identity()

    def sources(self) -> tuple[Source, ...]:
        """Where images come from that are embedded now."""
        return () if isinstance(self.images, Stored) else (self.images,)

    def embed(self, work: SharedWork) -> EmbeddedUnknown:
        """Embed them, or take the embeddings that there are.

        Raises:
            ClipkitError: where no image can be used, or embeddings were made with another model, on all ranks.
        """
        if isinstance(self.images, Stored):
            stored = self.images
            work.together(
                lambda: refuse_another(stored.manifest, stored.folder, str(work.model), work.facts.fingerprint)
            )
            return EmbeddedUnknown(stored.image, stored.of(), [line for line in stored.left_out if "row" in line])
        embedded = work.images(self.images)
        if not embedded.rows:
            raise nothing_usable(self.images, embedded.left_out, "no image")
        return EmbeddedUnknown(embedded.vectors, samples_hash(self.images, embedded), embedded.left_out)


def open_unknown(spec: str) -> UnknownImages:
    """Open a folder of images, a list, shards, embeddings or an index.

    Raises:
        ClipkitError: where it is none of these, or holds no images.
    """
    if not stored_kind(spec):
        return UnknownImages(open_source(spec))
    stored = open_stored(spec)
    if not sum(map(len, stored.image)):
        raise ClipkitError(f"{spec} has no image embeddings, and --unknown asks for images; name others")
    return UnknownImages(stored)


def class_scores(image: VectorBlocks, classes: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """How much each image looks like any class.

    Args:
        image: unit-norm embeddings ``[n, dim]``, see `clipkit.metrics.retrieval_ranks`.
        classes: a unit-norm vector per class.
        scale: the model's factor on cosines.

    Returns:
        float64 ``[n]``: ``unknown``, the logarithm of the highest of the probabilities ``softmax(scale * cosines)``, in
        which those near 1 stay apart; ``unknown_max_cosine``, the highest cosine.
    """
    parts = [image] if isinstance(image, np.ndarray) else image
    blocks = [part[start : start + CHUNK] for part in parts for start in range(0, len(part), CHUNK)]
    sure, highest = [], []
    for block in blocks:
        cosines = inner_products(block, classes)
        order = np.sort(cosines, axis=1)
        others = np.exp(scale * (order[:, :-1] - order[:, -1:])).sum(axis=1)
        sure.append(-np.log1p(others))
        highest.append(order[:, -1])
    return {"unknown": np.concatenate(sure), "unknown_max_cosine": np.concatenate(highest)}


def with_unknown(
    result: Evaluation, known: VectorBlocks, unknown: EmbeddedUnknown, classes: np.ndarray, scale: float, of: str | None
) -> Evaluation:
    """A zero-shot result with how well its scores tell images of the classes from those that show none.

    Args:
        result: of the images of the classes.
        known: unit-norm embeddings of these.
        unknown: of the others.
        classes: a unit-norm vector per class.
        scale: the model's factor on cosines.
        of: a hash of the images of the classes; with it intervals are worked out, and samples kept.
    """
    scores = [class_scores(images, classes, scale) for images in (known, unknown.vectors)]
    apart = measure_unknown(scores[0], scores[1], Further(None if of is None else f"{of} {unknown.of}"))
    return replace(
        result,
        figures=result.figures | apart.figures,
        chance=result.chance | apart.chance,
        counts=result.counts | apart.counts,
        intervals=result.intervals | apart.intervals,
        unknown_samples=apart.samples,
    )
