"""Labelled examples: images of which the classes are known, and which of other images are the same ones."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipkit.classification.decisions import CHUNK
from clipkit.classification.folder_classes import plain_name, truth_of
from clipkit.classification.images import ImageOptions, Images, open_images
from clipkit.classification.labels import LabelSet
from clipkit.core import BadSample, ClipkitError, did_you_mean, note
from clipkit.metrics import inner_products
from clipkit.models import LazyModel
from clipkit.storage import Cache, content_hash

__all__ = ["Examples", "open_examples"]

SAME = 0.9998  # cosine of embeddings of one image, which may have been made in another precision and batch


@dataclass(frozen=True)
class Examples:
    """Images with their classes."""

    spec: str
    """Where they are from."""
    images: Images
    places: np.ndarray
    """int64 ``[n]``: which of the images are used."""
    truth: np.ndarray
    """int64 ``[n]``: the class of each that is used, a place in the labels."""
    groups: np.ndarray
    """int64 ``[n]``: those with the same number are copies of one image."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """What cannot be used: ``key`` and ``reason``."""
    _known: dict[int, set[bytes]] = field(default_factory=dict)
    """The contents by their size in bytes."""

    def __len__(self) -> int:
        return len(self.places)

    def vectors(self, number: int) -> np.ndarray:
        """Unit-norm embeddings by the model of this number, float32 ``[n, dim]``."""
        return self.images.block(number, slice(0, len(self.images)))[self.places].astype(np.float32)

    @staticmethod
    def unseen(truth: np.ndarray, among: np.ndarray) -> np.ndarray:
        """The truth of images, without those that are examples: how they are classified says nothing of others."""
        return np.where(among, -1, truth)

    def among(self, images: Images) -> np.ndarray:
        """Which of the images are examples too, whatever they are called and wherever they lie.

        The same are files of the same bytes; only those of an example's size are read. An image of embeddings or an
        index, whose file is not at hand, is the same as an example where their embeddings have a cosine of 0.9998.

        Args:
            images: that are asked for.

        Returns:
            bool ``[images]``.
        """
        found = np.zeros(len(images), bool)
        unknown = np.zeros(len(images), bool)
        for at in range(len(images)):
            size = images.size(at)
            if size is None or not self._known:
                unknown[at] = True
            elif size in self._known:
                content = _content(images, at)
                found[at] = content is not None and content_hash(content) in self._known[size]
        own = self.vectors(0) if unknown.any() else None
        for start in range(0, len(images) if own is not None else 0, CHUNK):
            some = slice(start, start + CHUNK)
            near = inner_products(images.block(0, some), own)  # type: ignore[arg-type]
            found[some] |= unknown[some] & (near.max(axis=1) >= SAME)
        return found


def open_examples(
    spec: str,
    labels: LabelSet,
    models: Sequence[LazyModel],
    cache: Cache,
    options: ImageOptions | None = None,
) -> Examples:
    """Open labelled images and embed them, or take their embeddings from the cache.

    Args:
        spec: a folder with a sub-folder per class, called as the class or an alias (see `truth_of`); or a list, shards,
            embeddings or an index whose images stand in such folders.
        labels: the classes.
        models: that embed them.
        cache: of what was embedded before.
        options: how they are opened and embedded.

    Returns:
        Copies of one image under one class share a group; under several classes none of them is used.

    Raises:
        ClipkitError: where it cannot be opened, or no image in it is of a class.
    """
    images = open_images(spec, models, cache, options).embed()
    truth = truth_of(images.paths, labels)
    if truth is None:
        above = next((path.rpartition("/")[0] for path in images.paths if "/" in path), "")
        folder = plain_name(above.rpartition("/")[2])
        held = f"no folder in {spec} is called as a label, such as {labels.names[0]!r}"
        raise ClipkitError(
            f"{held}{did_you_mean(folder, labels.names) if folder else ''}; examples lie in such folders"
        )
    left_out = [{"key": line["key"], "reason": line["reason"]} for line in images.unreadable]
    if nowhere := int((truth < 0).sum()):
        note(f"{nowhere:,} images of {spec} are no examples, as they stand in no folder that is called as a label")
    known: dict[int, set[bytes]] = defaultdict(set)
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for at in np.flatnonzero(truth >= 0).tolist():
        content = None if images.source is None else _content(images, at)
        if content is None:
            by_content[b"%d" % at].append(at)
            continue
        known[len(content)].add(content_hash(content))
        by_content[content_hash(content)].append(at)
    places, groups = [], []
    for number, copies in enumerate(by_content.values()):
        classes = sorted({labels.names[truth[at]] for at in copies})
        if len(classes) > 1:
            reason = f"is an example of {' and of '.join(classes)}"
            left_out += [{"key": images.paths[at], "reason": reason} for at in copies]
            continue
        places += copies
        groups += [number] * len(copies)
    if not places:
        raise ClipkitError(
            f"no example in {spec} can be used; the first: {left_out[0]['key']}: {left_out[0]['reason']}"
        )
    order = np.argsort(places)
    used = np.array(places, np.int64)[order]
    return Examples(spec, images, used, truth[used], np.array(groups, np.int64)[order], left_out, dict(known))


def _content(images: Images, at: int) -> bytes | None:
    try:
        return images.read(at)
    except BadSample:
        return None
