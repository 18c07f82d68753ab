"""Images to be classified: one door to whatever holds them, be it files, embeddings or an index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.data.sources import Globs, Sample, Source, open_source
from clipkit.embedding import Embeddings, EncodeOptions, cached_images, stored_kind
from clipkit.models import LazyModel, refuse_another, spec_of
from clipkit.storage import Cache

if TYPE_CHECKING:
    from clipkit.search import Index

__all__ = ["ImageOptions", "Images", "OpenedImages", "open_images"]


@dataclass(frozen=True)
class ImageOptions:
    """Which images of a source, and how they are read and embedded."""

    where: str | None = None
    """A condition on an index's metadata, as in search."""
    globs: Globs = field(default_factory=Globs)
    """Which images, by path; a source that is given opened has its own."""
    image_column: str | None = None
    """Of a list, see `clipkit.data.sources.open_source`."""
    caption_column: str | None = None
    """Likewise."""
    image_root: str | None = None
    """Where the relative paths of a list start, and those of embeddings and an index."""
    batch_size: int = 64
    """Images at a time."""
    device: str | None = None
    """For models that are given by name, as is `precision`; see `LazyModel`."""
    precision: str = "auto"
    show: str | None = None
    """Title of a progress bar."""


@dataclass(frozen=True)
class Images:
    """Embeddings of images by one or several models, how each image is called, and the way to its bytes."""

    paths: Sequence[str]
    """Of the images, relative to the source."""
    block: Callable[[int, slice], np.ndarray]
    """Unit-norm embeddings by the model of this number, of these images, float16 or float32 ``[n, dim]``."""
    unreadable: Sequence[dict[str, Any]] = ()
    """Ledger lines of what has no embedding: ``row``, ``key``, ``reason``."""
    rows: Sequence[int] | None = None
    """The source's row of each image; None where they stand in the order of their paths."""
    source: Source | None = None
    """That has these rows; None for images of embeddings and an index."""
    root: Path = Path()
    """Where the paths of the latter start."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, at: int) -> bytes:
        """The bytes of image number `at`.

        Raises:
            BadSample: where it cannot be read.
        """
        if self.source is None or self.rows is None:
            return Sample("", self.root / self.paths[at], "").read()
        return self.source[self.rows[at]].read()

    def place(self, at: int) -> Path | str | None:
        """The file or URL of image number `at`; None where it has none of its own."""
        if self.source is None or self.rows is None:
            return self.root / self.paths[at]
        return self.source.place(self.rows[at])

    def size(self, at: int) -> int | None:
        """Bytes of image number `at`; None where they are not known, as of a file that is not at hand."""
        if self.source is not None and self.rows is not None:
            return self.source.size(self.rows[at]) or None  # a server may not tell
        try:
            return (self.root / self.paths[at]).stat().st_size
        except OSError:
            return None


@dataclass(frozen=True)
class OpenedImages:
    """A source of images and the models that see them; nothing is embedded yet."""

    models: list[LazyModel]
    cache: Cache
    options: ImageOptions
    data: "Source | Embeddings | Index"
    """Of embeddings and an index the vectors are there, made by the one model."""

    @property
    def files(self) -> Source | None:
        """Images that are to be embedded; None where they were."""
        return self.data if isinstance(self.data, Source) else None

    def embed(self) -> Images:
        """Embed the images by each model, or take what the cache or the artifact holds.

        Raises:
            ClipkitError: where the vectors are of another model, or the source was changed meanwhile.
        """
        data, model = self.data, self.models[0]
        if isinstance(data, Source):
            return self._of_files(data)
        refuse_another(data.manifest, data.folder, model.spec, model.facts.fingerprint)
        return self._of_embeddings(data) if isinstance(data, Embeddings) else self._of_index(data)

    def _of_files(self, source: Source) -> Images:
        encoding, show = EncodeOptions(("image",), self.options.batch_size, "fast"), self.options.show
        embedded = [cached_images(source, model, self.cache, encoding, show=show) for model in self.models]
        first = embedded[0]
        for other in embedded[1:]:
            if other.rows != first.rows:
                raise ClipkitError(f"{source.spec} was changed while it was read; run this again")
        unreadable = [*source.problems, *first.left_out]
        vectors = [each.image for each in embedded]
        paths = [str(sample.columns.get("path", sample.key)) for sample in first.samples]
        return Images(paths, lambda number, at: vectors[number][at], unreadable, first.rows, source)

    def _of_embeddings(self, embeddings: Embeddings) -> Images:
        if "image" not in embeddings.sides:
            raise ClipkitError(f"{embeddings.folder} has no image embeddings; it has {' and '.join(embeddings.sides)}")
        paths = [path for table in embeddings.tables() for path in table["image_path"].to_pylist()]
        vectors = np.concatenate(list(embeddings.blocks("image")))
        embeddings.refuse_changed()
        ledger = embeddings.ledger()
        if globs := self.options.globs:
            kept = [at for at, path in enumerate(paths) if globs.passes(path)]
            paths, vectors = [paths[at] for at in kept], vectors[kept]
            ledger = [line for line in ledger if globs.passes(line["key"])]
        return Images(paths, lambda _, at: vectors[at], ledger, root=self._root)

    def _of_index(self, index: "Index") -> Images:
        positions = index.positions("image", self.options.where)
        paths = [str(path) for path in index.column("image_path", positions)]
        if globs := self.options.globs:
            kept = [at for at, path in enumerate(paths) if globs.passes(path)]
            positions, paths = positions[kept], [paths[at] for at in kept]
        return Images(paths, lambda _, at: index.vectors(positions[at]), root=self._root)

    @property
    def _root(self) -> Path:
        return Path(self.options.image_root or "")


def open_images(
    source: str | Path | Source | Embeddings,
    models: Sequence[str | Path | LazyModel],
    cache: Cache,
    options: ImageOptions | None = None,
    *,
    open_files: Callable[..., Source] = open_source,
) -> OpenedImages:
    """Open whatever it is: a folder, a list, shards, embeddings or an index.

    Args:
        source: by name, or opened.
        models: that see the images, by name or lazy. Embeddings and an index have been embedded by one, which is taken
            where none is given, and refused unless it is that.
        cache: of what was embedded before.
        options: which images, and how.
        open_files: opens what is neither embeddings nor an index; takes what `clipkit.data.sources.open_source` does.

    Raises:
        ClipkitError: where it cannot be opened, or no model is given for images that are to be embedded.
    """
    options = options or ImageOptions()
    vectors = source if isinstance(source, Embeddings) else _open_vectors(source)
    if not models and vectors is not None:
        models = [spec_of(vectors.manifest, vectors.folder)]
    if not models:
        raise ClipkitError("name the model to classify with: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    lazy = [
        model
        if isinstance(model, LazyModel)
        else LazyModel(model, cache, device=options.device, precision=options.precision)
        for model in models
    ]
    if options.where is not None and (vectors is None or isinstance(vectors, Embeddings)):
        raise ClipkitError(f"--where is a condition on what an index says of its images; {source} is none")
    if vectors is not None and len(lazy) > 1:
        raise ClipkitError(f"{source} was embedded by one model; several need the images themselves")
    if vectors is not None:
        return OpenedImages(lazy, cache, options, vectors)
    if isinstance(source, str | Path):
        columns = {name: getattr(options, name) for name in ("image_column", "caption_column", "image_root")}
        source = open_files(source, **columns, globs=options.globs)
    return OpenedImages(lazy, cache, options, source)


def _open_vectors(source: str | Path | Source) -> "Embeddings | Index | None":
    kind = stored_kind(source) if isinstance(source, str | Path) else None
    if kind == "embeddings":
        return Embeddings.open(source)  # type: ignore[arg-type]
    if kind == "index":
        from clipkit.search import Index

        return Index.open(source)  # type: ignore[arg-type]
    return None
