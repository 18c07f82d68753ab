"""What each prompt template does for zero-shot accuracy on images of known classes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipkit.classification import Images
from clipkit.core import ClipkitError
from clipkit.embedding import cached_texts
from clipkit.labels import LabelSet, truth_of
from clipkit.metrics import inner_products
from clipkit.models import LazyModel
from clipkit.storage import Cache
from clipkit.zeroshot import ablate, class_vectors

__all__ = ["ablate_prompts"]


def ablate_prompts(
    images: Images, labels: LabelSet, prompts: Sequence[str], models: Sequence[LazyModel], cache: Cache
) -> Iterator[dict[str, Any]]:
    """Measure every template alone, and what the others lose or gain by its absence.

    Args:
        images: that stand in folders called as their labels (see `truth_of`); others are not counted.
        labels: the classes; one with prompts of its own keeps them.
        prompts: templates.
        models: one or several, each by itself.
        cache: of texts.

    Returns:
        A row for each model and template: ``model``, ``template``, ``alone`` (accuracy with it only), ``without`` (with
        all others; None where there are none), ``adds`` (accuracy with all of them less that without it), ``images``
        (how many were counted).

    Raises:
        ClipkitError: where no image stands in such a folder.
    """
    truth = truth_of(images.paths, labels)
    if truth is None:
        raise ClipkitError(
            f"prompts are judged by images of known labels, and none stands in a folder called as one, such as "
            f"{labels.names[0]!r}"
        )
    known = np.flatnonzero(truth >= 0)
    for number, model in enumerate(models):
        vectors = images.block(number, slice(0, len(images)))[known].astype(np.float32)

        def embed(texts: Sequence[str], model: LazyModel = model) -> np.ndarray:
            return cached_texts(texts, model, cache)

        whole = class_vectors(labels, prompts, embed)
        together = float((inner_products(vectors, whole).argmax(axis=1) == truth[known]).mean())
        for each in ablate(labels, prompts, embed, vectors, truth[known]):
            single = np.isnan(each.without)
            yield {
                "model": model.spec,
                "template": each.prompt,
                "alone": each.alone,
                "without": None if single else each.without,
                "adds": None if single else together - each.without,
                "images": len(known),
            }
