"""Retrieval evaluated: a model on a source with captions, or vectors that are stored."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clipkit.core import meter
from clipkit.data.sources import Source
from clipkit.evaluation.embedder import SharedWork, nothing_usable, samples_hash
from clipkit.evaluation.index_recall import served_hits
from clipkit.evaluation.measuring import Evaluation, Further, measure_retrieval
from clipkit.evaluation.stored import Stored

__all__ = ["RETRIEVAL_KS", "evaluate_retrieval", "evaluate_stored_retrieval"]

RETRIEVAL_KS = (1, 5, 10)


def evaluate_retrieval(
    work: SharedWork,
    source: Source,
    ks: Sequence[int] = RETRIEVAL_KS,
    *,
    intervals: bool = False,
    compat: bool = False,
) -> Evaluation:
    """Recall, reciprocal and median ranks both ways between images and captions (`clipkit.metrics.retrieval_figures`).

    Args:
        work: the model at work, alone or shared; scores are float32 whatever it embeds in.
        source: with captions.
        ks: list lengths.
        intervals: also say how far each figure may be off, and keep what pairs this model with another.
        compat: also give the figures of CLIP_benchmark's definitions.

    Raises:
        ClipkitError: where no sample can be used, on all ranks also where one of them fails.
    """
    images = work.images(source)
    captions = [caption for of_image in images.captions for caption in of_image]
    if not captions:
        raise nothing_usable(source, images.left_out, "no sample has a caption")
    text = work.texts(captions)
    image_of_text = np.repeat(np.arange(len(images.rows)), [len(of_image) for of_image in images.captions])
    further = Further(samples_hash(source, images, captions, image_of_text) if intervals else None, compat)
    found = work.by_the_first(lambda: measure_retrieval(images.vectors, text, image_of_text, ks, further))
    return replace(found, left_out=images.left_out)


def evaluate_stored_retrieval(
    work: SharedWork,
    stored: Stored,
    ks: Sequence[int] = RETRIEVAL_KS,
    *,
    through_index: bool = False,
    compat: bool = False,
) -> Evaluation:
    """As `evaluate_retrieval`, of embeddings on the disk, which are read in blocks: memory does not grow with them.

    Args:
        work: of which the first does it; no model is needed.
        stored: with both sides.
        ks: list lengths.
        through_index: of an index; also what it answers, see `clipkit.evaluation.index_recall`.
        compat: see `evaluate_retrieval`.
    """

    def measured() -> Evaluation:
        served = served_hits(stored.both(), ks) if through_index else None
        both, further = stored.both(), Further(stored.of(), compat)
        with meter(work.show or "", len(stored.image_of_text), "captions") as advance:
            progress = advance if work.show else None
            return measure_retrieval(
                both.image, both.text, both.image_of_text, ks, further, served=served, advance=progress
            )

    return replace(work.by_the_first(measured), left_out=stored.left_out)
