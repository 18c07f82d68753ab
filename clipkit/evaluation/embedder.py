"""Embedding that ranks divide: each does some blocks of a source's rows and of the texts, and all of them get all.

What is embedded together does not depend on how many ranks there are, so neither does what comes of it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from clipkit.core import ClipkitError, Gather, gathering, together
from clipkit.data.sources import Source
from clipkit.embedding import Embedded, EncodeOptions, cached_images, cached_texts
from clipkit.models import LazyModel, ModelFacts
from clipkit.storage import Cache, digest

__all__ = ["SharedImages", "SharedWork", "nothing_usable", "samples_hash"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Towers:
    """How images and texts are embedded."""

    images: Callable[[Source, range, int, str | None], Embedded]
    """Some rows of a source, so many at a time, under a progress bar of this title."""
    texts: Callable[[Sequence[str], int], np.ndarray]
    """Texts, so many at a time; float32 ``[n, dim]``, unit norm."""


def _towers_of(model: Any, cache: Cache, threads: int | None) -> _Towers:
    """How a model embeds; see `SharedWork`."""
    if isinstance(model, LazyModel):
        lazy = model

        def cached(source: Source, rows: range, batch_size: int, show: str | None) -> Embedded:
            options = EncodeOptions(("image",), batch_size, "exact", threads)
            return cached_images(source, lazy, cache, options, rows=rows, show=show)

        return _Towers(cached, lambda texts, batch_size: cached_texts(texts, lazy, cache, batch_size))

    from clipkit.embedding import embed_source
    from clipkit.models import evaluating

    def images(source: Source, rows: range, batch_size: int, show: str | None) -> Embedded:
        options = EncodeOptions(("image",), batch_size, "exact", threads)
        return embed_source(source, model, options, rows=rows, show=show)

    def texts(some: Sequence[str], batch_size: int) -> np.ndarray:
        with evaluating(model):
            return model.embed_texts(some, batch_size)

    return _Towers(images, texts)


@dataclass(frozen=True)
class SharedWork:
    """A model at work for an evaluation: how it embeds, which rank does what, and the exchange of what was done."""

    model: Any
    """A `DualEncoder`, which is used as it is, or a `LazyModel`; in the precision that is wanted, the same on all
    ranks. None where nothing is to be embedded."""
    batch_size: int = 64
    """Images at a time; texts go four times as many at a time."""
    threads: int | None = None
    """That decode images, see `clipkit.embedding.embed_source`."""
    show: str | None = None
    """Title of a progress bar."""
    cache: Cache = field(default_factory=lambda: Cache(None))
    """Of results, and for a `LazyModel` of what was embedded before. Where ranks do not share it, it must hold the same
    for each."""
    rank: int = 0
    """Whose part of the work to do."""
    world_size: int = 1
    gather: Gather | None = None
    """Brings the ranks' parts together; `gather_objects` where not given and there are several."""

    @functools.cached_property
    def _towers(self) -> _Towers:
        return _towers_of(self.model, self.cache, self.threads)

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """What is known of the model: its fingerprint, and the scale of its probabilities."""
        return (self.model if isinstance(self.model, LazyModel) else LazyModel.of(self.model)).facts

    def own(self, count: int, block: int) -> range:
        """This rank's part of so many items, in whole blocks; the ranks' parts follow each other."""
        blocks = -(-count // block)
        first, last = (min(blocks * r // self.world_size * block, count) for r in (self.rank, self.rank + 1))
        return range(first, last)

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """See the function of this name."""
        return together(work, gathering(self.world_size, self.gather))

    def by_the_first(self, work: Callable[[], Value]) -> Value:
        """What the work gives on rank 0: processors that differ might differ in a last digit."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def images(self, source: Source) -> "SharedImages":
        """Embed all images of a source."""

        def work() -> SharedImages:
            rows = self.own(len(source), self.batch_size)
            found = self._towers.images(source, rows, self.batch_size, self.show)
            return SharedImages(found.image, found.rows, [s.captions for s in found.samples], found.ledger())

        parts = self.together(work)
        return SharedImages(
            np.concatenate([part.vectors for part in parts]),
            [row for part in parts for row in part.rows],
            [captions for part in parts for captions in part.captions],
            [*source.problems, *(line for part in parts for line in part.left_out)],
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed all texts, float32 ``[n, dim]``; each once, however often it is there, among others of like length."""
        place = {text: at for at, text in enumerate(sorted(dict.fromkeys(texts), key=len))}
        each, at_once = list(place), 4 * self.batch_size
        own = self.own(len(place), at_once)
        found = np.concatenate(self.together(lambda: self._towers.texts(each[own.start : own.stop], at_once)))
        return found[[place[text] for text in texts]]


@dataclass
class SharedImages:
    """Of all ranks, in source order."""

    vectors: np.ndarray
    """float32 ``[images, dim]``."""
    rows: list[int]
    """Of the source."""
    captions: list[tuple[str, ...]]
    """Of each image."""
    left_out: list[dict[str, Any]]
    """Ledger lines of what could not be used; with ``unread``, true, of what might be read another time."""


def samples_hash(source: Source, images: SharedImages, *more: Any) -> str:
    """A hash of which samples were used, by their keys; not of where they are, so that results can be carried about."""
    plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in more]
    return digest([[source.key(row) for row in images.rows], plain])


def nothing_usable(source: Source, left_out: list[dict[str, Any]], reason: str) -> ClipkitError:
    """The error where nothing of a source is left: it names the first that was left out."""
    first = left_out[0] if left_out else {"key": source.spec, "reason": reason}
    return ClipkitError(f"nothing in {source.spec} can be evaluated; the first: {first['key']}: {first['reason']}")
