"""Images to be classified, from wherever their embeddings come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.data.sources import Globs, Sample, Source, open_source
from clipkit.embedding import Embeddings, EncodeOptions, cached_images, stored_kind
from clipkit.models import LazyModel, refuse_another
from clipkit.storage import Cache

__all__ = ["Images", "open_images"]


@dataclass(frozen=True)
class Images:
    """Embeddings of images by one or several models, and how each image is called."""

    paths: Sequence[str]
    """Of the images, relative to the source."""
    block: Callable[[int, slice], np.ndarray]
    """Unit-norm embeddings by the model of this number, of these images, float16 or float32 ``[n, dim]``."""
    unreadable: Sequence[dict[str, Any]] = ()
    """Ledger lines of what has no embedding: ``row``, ``key``, ``reason``."""
    rows: Sequence[int] | None = None
    """The source's row of each image; None where they stand in the order of their paths."""

    @classmethod
    def of_source(
        cls, source: Source, models: Sequence[LazyModel], cache: Cache, *, batch_size: int = 64, show: str | None = None
    ) -> "Images":
        """Embed the images of a source with each model, or take what the cache holds."""
        options = EncodeOptions(("image",), batch_size, "fast")
        found = [cached_images(source, model, cache, options, show=show) for model in models]
        first = found[0]
        for other in found[1:]:
            if other.rows != first.rows:
                raise ClipkitError(f"{source.spec} was changed while it was read; run this again")
        unreadable = [*source.problems, *first.left_out]
        vectors = [each.image for each in found]
        return cls([_path(s) for s in first.samples], lambda number, at: vectors[number][at], unreadable, first.rows)

    @classmethod
    def of_embeddings(cls, embeddings: Embeddings, model: LazyModel, globs: Globs | None = None) -> "Images":
        """Embeddings as they are on the disk, those of images whose path passes."""
        refuse_another(embeddings.manifest, embeddings.folder, model.spec, model.facts.fingerprint)
        if "image" not in embeddings.sides:
            raise ClipkitError(f"{embeddings.folder} has no image embeddings; it has {' and '.join(embeddings.sides)}")
        paths = [path for table in embeddings.tables() for path in table["image_path"].to_pylist()]
        vectors = np.concatenate(list(embeddings.blocks("image")))
        embeddings.refuse_changed()
        ledger = embeddings.ledger()
        if globs:
            kept = [at for at, path in enumerate(paths) if globs.passes(path)]
            paths, vectors = [paths[at] for at in kept], vectors[kept]
            ledger = [line for line in ledger if globs.passes(line["key"])]
        return cls(paths, lambda _, at: vectors[at], ledger)

    @classmethod
    def of_index(
        cls, folder: str | Path, model: LazyModel, where: str | None = None, globs: Globs | None = None
    ) -> "Images":
        """The images that an index holds, or those of them that a condition holds for and whose path passes."""
        from clipkit.search import Index

        index = Index.open(folder)
        refuse_another(index.manifest, index.folder, model.spec, model.facts.fingerprint)
        positions = index.positions("image", where)
        paths = [str(path) for path in index.column("image_path", positions)]
        if globs:
            kept = [at for at, path in enumerate(paths) if globs.passes(path)]
            positions, paths = positions[kept], [paths[at] for at in kept]
        return cls(paths, lambda _, at: index.vectors(positions[at]))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, at: int, source: Any, root: Path) -> bytes:
        """The bytes of an image.

        Args:
            at: its number.
            source: that they come from, opened; of embeddings and an index it is not asked.
            root: where the paths of those start.

        Raises:
            BadSample: where it cannot be read.
        """
        return (Sample("", root / self.paths[at], "") if self.rows is None else source[self.rows[at]]).read()


def open_images(
    source: str | Path | Source | Embeddings,
    models: Sequence[LazyModel],
    cache: Cache,
    *,
    where: str | None = None,
    globs: Globs | None = None,
    batch_size: int = 64,
    show: str | None = None,
) -> Images:
    """Open whatever it is: a folder, a list, shards, embeddings or an index.

    Args:
        source: by name, or opened.
        models: that embed it; embeddings and an index have been embedded by one, which is refused unless it is that.
        cache: of what was embedded before.
        where: a condition on an index's metadata.
        globs: which images, by path; an opened source has its own.
        batch_size, show: see `cached_images`.

    Raises:
        ClipkitError: where it cannot be opened, or was made with another model.
    """
    kind = stored_kind(source) if isinstance(source, str | Path) else None
    if where is not None and kind != "index":
        raise ClipkitError(f"--where is a condition on what an index says of its images; {source} is none")
    if kind is not None or isinstance(source, Embeddings):
        if len(models) > 1:
            raise ClipkitError(f"{source} was embedded by one model; several need the images themselves")
        if kind == "index":
            return Images.of_index(source, models[0], where, globs)  # type: ignore[arg-type]
        opened = source if isinstance(source, Embeddings) else Embeddings.open(source)  # type: ignore[arg-type]
        return Images.of_embeddings(opened, models[0], globs)
    files = open_source(source, globs=globs) if isinstance(source, str | Path) else source
    return Images.of_source(files, models, cache, batch_size=batch_size, show=show)  # type: ignore[arg-type]


def _path(sample: Sample) -> str:
    return str(sample.columns.get("path", sample.key))
