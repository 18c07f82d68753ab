"""The whole way for notebooks: open images, classify them by names, and say so in rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.classification.classified import Classified, rows_of
from clipkit.classification.classifier import classify_images, zero_shot
from clipkit.classification.decisions import Rule
from clipkit.classification.images import ImageOptions, open_images
from clipkit.classification.labels import LabelSet, as_label_set
from clipkit.classification.prompts import PROMPTS
from clipkit.data.sources import Source
from clipkit.embedding import Embeddings
from clipkit.models import LazyModel
from clipkit.storage import Cache

if TYPE_CHECKING:
    from clipkit.models import DualEncoder

__all__ = ["classify"]


def classify(
    source: str | Path | Source | Embeddings,
    labels: Sequence[str] | LabelSet,
    model: "DualEncoder | LazyModel",
    *,
    prompts: Sequence[str] = PROMPTS["default"],
    rule: Rule | None = None,
    top: int = 5,
    batch_size: int = 64,
    cache: Cache | None = None,
    show: str | None = None,
) -> list[dict[str, Any]]:
    """Say for every image of a source which of the names fits best.

    Args:
        source: a folder, list, shards, embeddings or an index (of the last two no image is encoded again).
        labels: the class names, or all that is known of the classes.
        model: for texts and images alike.
        prompts: templates with ``{}``, see `clipkit.classification.prompt_set`.
        rule: what is sure; everything where not given.
        top: how many classes to list in ``top``.
        batch_size: images at a time.
        cache: of what was embedded before; none where not given.
        show: title of a progress bar.

    Returns:
        One row per image in source order: ``path``, ``label``, ``score`` (cosine), ``probability`` (softmax over the
        labels at the model's own scale), ``margin`` (to the second's probability), ``top`` (labels with probability),
        ``status``: ``ok``, ``unsure``, ``background`` (a label for "none of these" is first), or ``unreadable`` with
        the reason in ``reason``.

    Raises:
        ClipkitError: where the embeddings come from another model, or labels are wrong.
    """
    cache = cache or Cache(None)
    lazy = model if isinstance(model, LazyModel) else LazyModel.of(model)
    known = as_label_set(labels)
    rule = replace(rule or Rule(), background=known.background, groups=list(known.groups.values()))
    classifier = zero_shot(known, prompts, lazy, cache, several=rule.several)
    images = open_images(source, [lazy], cache, ImageOptions(batch_size=batch_size, show=show)).embed()
    return list(rows_of(Classified(images, known, classify_images(images, [classifier], rule, top=top))))
