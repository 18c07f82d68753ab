"""What each prompt template does for zero-shot accuracy on images of known classes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipkit.classification.folder_classes import truth_of
from clipkit.classification.images import Images
from clipkit.classification.labels import LabelSet, as_label_set
from clipkit.classification.prompts import EmbedTexts, class_vectors
from clipkit.core import ClipkitError
from clipkit.embedding import cached_texts
from clipkit.metrics import inner_products
from clipkit.models import LazyModel
from clipkit.storage import Cache

__all__ = ["Ablation", "ablate", "ablate_prompts"]


class Ablation(NamedTuple):
    """What one template does."""

    prompt: str
    alone: float
    """Accuracy with this template only."""
    without: float
    """Accuracy with all others; NaN where it is the only one."""


def ablate(
    labels: LabelSet | Sequence[str],
    prompts: Sequence[str],
    embed_texts: EmbedTexts,
    images: Float[np.ndarray, "n dim"],
    truth: Int[np.ndarray, " n"],
) -> list[Ablation]:
    """For each template the accuracy with it alone and with all others. Every text is embedded once.

    Args:
        labels, prompts, embed_texts: see `class_vectors`.
        images: unit-norm image embeddings.
        truth: the class of each.
    """

    known = as_label_set(labels)
    texts = list(dict.fromkeys(text for label in known.labels for text in label.texts(prompts)))
    row = {text: at for at, text in enumerate(texts)}
    vector_of = embed_texts(texts)

    def accuracy(some: Sequence[str]) -> float:
        vectors = class_vectors(known, some, lambda wanted: vector_of[[row[text] for text in wanted]])
        return float((inner_products(images, vectors).argmax(axis=1) == truth).mean())

    ablations = []
    for at, prompt in enumerate(prompts):
        others = [*prompts[:at], *prompts[at + 1 :]]
        ablations.append(Ablation(prompt, accuracy([prompt]), accuracy(others) if others else float("nan")))
    return ablations


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
