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
    _hashes: dict[int, set[bytes]] = field(default_factory=dict)
    """Of the contents, by their size in bytes."""

    def __len__(self) -> int:
        return len(self.places)

    def vectors(self, number: int) -> np.ndarray:
        """Unit-norm embeddings by the model of this number, float32 ``[n, dim]``."""
        return self.images.block(number, slice(0, len(self.images)))[self.places].astype(np.float32)

    def among(self, images: Images) -> np.ndarray:
        """Which of the images are examples too, whatever they are called and wherever they lie.

        The same are files of the same bytes; only those of an example's size are read. An image of embeddings or an
        index, whose file is not at hand, is the same as an example where their embeddings have a cosine of 0.9998.

        Args:
            images: that are asked for.

        Returns:
            bool ``[images]``.
        """
        same = np.zeros(len(images), bool)
        unknown = np.zeros(len(images), bool)
        for at in range(len(images)):
            size = images.size(at)
            if size is None or not self._hashes:
                unknown[at] = True
            elif size in self._hashes:
                content = _content(images, at)
                same[at] = content is not None and content_hash(content) in self._hashes[size]
        if not unknown.any():
            return same
        own = self.vectors(0)
        for start in range(0, len(images), CHUNK):
            rows = slice(start, start + CHUNK)
            near = inner_products(images.block(0, rows), own)
            same[rows] |= unknown[rows] & (near.max(axis=1) >= SAME)
        return same


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
        raise ClipkitError(_no_folder(spec, images, labels))
    if nowhere := int((truth < 0).sum()):
        note(f"{nowhere:,} images of {spec} are no examples, as they stand in no folder that is called as a label")
    left_out = [{"key": line["key"], "reason": line["reason"]} for line in images.unreadable]
    copies_of, hashes = _by_content(images, np.flatnonzero(truth >= 0).tolist())
    places, groups = [], []
    for number, copies in enumerate(copies_of):
        classes = sorted({labels.names[truth[at]] for at in copies})
        if len(classes) > 1:
            reason = f"is an example of {' and of '.join(classes)}"
            left_out += [{"key": images.paths[at], "reason": reason} for at in copies]
            continue
        places += copies
        groups += [number] * len(copies)
    if not places:
        first = left_out[0]
        raise ClipkitError(f"no example in {spec} can be used; the first: {first['key']}: {first['reason']}")
    order = np.argsort(places)
    used = np.array(places, np.int64)[order]
    return Examples(spec, images, used, truth[used], np.array(groups, np.int64)[order], left_out, hashes)


def _no_folder(spec: str, images: Images, labels: LabelSet) -> str:
    above = next((path.rpartition("/")[0] for path in images.paths if "/" in path), "")
    folder = plain_name(above.rpartition("/")[2])
    hint = did_you_mean(folder, labels.names) if folder else ""
    return f"no folder in {spec} is called as a label, such as {labels.names[0]!r}{hint}; examples lie in such folders"


def _by_content(images: Images, places: Sequence[int]) -> tuple[list[list[int]], dict[int, set[bytes]]]:
    """The images that are copies of each other, and the hashes of all contents by their size in bytes.

    Of embeddings and an index no file is read: each image is one of its own.
    """
    copies: dict[bytes, list[int]] = defaultdict(list)
    hashes: dict[int, set[bytes]] = defaultdict(set)
    for at in places:
        content = None if images.source is None else _content(images, at)
        if content is None:
            copies[b"%d" % at].append(at)
            continue
        digest = content_hash(content)
        hashes[len(content)].add(digest)
        copies[digest].append(at)
    return list(copies.values()), dict(hashes)


def _content(images: Images, at: int) -> bytes | None:
    try:
        return images.read(at)
    except BadSample:
        return None
