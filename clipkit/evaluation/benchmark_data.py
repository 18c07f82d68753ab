"""Datasets for evaluation in CLIP_benchmark's layout: webdataset shards by split, class names and templates beside.

``DIR/SPLIT/*.tar`` hold an image and ``.cls`` (the number of its class), ``.npy`` (0 or 1 for every class: several may
be there) or ``.txt`` (captions, one a line; for choices the right one first) per sample. ``DIR/classnames.txt``,
``DIR/dataset_type.txt`` and
``DIR/zeroshot_classification_templates.txt`` (with ``{c}`` for the class) say the rest.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clipkit.core import BadSample, ClipkitError
from clipkit.data.sources import Sample, ShardSource, Source, Stamp

__all__ = ["Benchmark", "CaptionLines", "is_benchmark", "open_benchmark"]

CLASSES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
DATASET_TYPES = ("classification", "multilabel", "retrieval", "image_caption_selection")


@dataclass(frozen=True)
class Benchmark:
    """A split of a dataset, opened."""

    folder: Path
    split: str
    kind: Literal["classification", "multilabel", "retrieval", "choice"]
    source: Source
    """Images, with their captions where it is for retrieval or choices."""
    classes: list[str]
    """Empty for these two."""
    prompts: list[str]
    """Templates with ``{}``; empty where there are none."""

    def truth(self) -> np.ndarray:
        """What each sample shows, -1 where the shards do not say.

        Returns:
            int64 ``[rows]``, or int8 ``[rows, classes]`` of 1 and 0 where several may be there.

        Raises:
            ClipkitError: where a number is no class, or labels are other numbers than 0 and 1.
        """
        shards = self.source.shards  # type: ignore[attr-defined]
        many = self.kind == "multilabel"
        count = len(self.classes)
        found = np.full((len(shards), count), -1, np.int8) if many else np.full(len(shards), -1, np.int64)
        for row in range(len(shards)):
            data = shards.read(row, ("npy" if many else "cls",)).get("npy" if many else "cls")
            if data is None:
                continue
            try:
                value = np.load(io.BytesIO(data)) if many else int(data)
            except ValueError as error:
                raise ClipkitError(f"{self.folder}: the class of {shards.key(row)} cannot be read ({error})") from error
            if many and value.shape != (count,):
                raise ClipkitError(f"{self.folder}: {shards.key(row)} has {value.shape} labels for {count} classes")
            if many and not np.isin(value, (0, 1)).all():
                raise ClipkitError(f"{self.folder}: {shards.key(row)} has labels other than 0 and 1")
            if not many and not 0 <= value < count:
                raise ClipkitError(f"{self.folder}: {shards.key(row)} is of class {value}, and {CLASSES} has {count}")
            found[row] = value
        return found


class CaptionLines:
    """Shards in which a ``.txt`` holds several captions, one a line; otherwise as they are."""

    def __init__(self, source: ShardSource):
        self.shards = source.shards
        self._source = source
        self.spec, self.problems = source.spec, source.problems
        self.has_captions, self.remote = source.has_captions, source.remote

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Sample:
        return self._split(self._source[i])

    def without_image(self, i: int) -> Sample:
        return self._split(self._source.without_image(i))

    def key(self, i: int) -> str:
        return self._source.key(i)

    def name(self, i: int) -> str:
        return self._source.name(i)

    def place(self, i: int) -> None:
        return self._source.place(i)

    def size(self, i: int) -> int:
        return self._source.size(i)

    def stamp(self, i: int) -> Stamp:
        return self._source.stamp(i)

    def identity(self) -> str:
        return self._source.identity()

    @staticmethod
    def _split(sample: Sample) -> Sample:
        lines = tuple(line.strip() for caption in sample.captions for line in caption.splitlines() if line.strip())
        if not lines:
            raise BadSample("the sample has no caption")
        return Sample(sample.key, sample.image, sample.extension, lines, sample.columns, sample.others)


def is_benchmark(folder: Path) -> bool:
    """Whether it looks as if it were in this layout."""
    return folder.is_dir() and any((folder / name).is_file() for name in (CLASSES, TYPE))


def open_benchmark(folder: Path, split: str = "test") -> Benchmark:
    """Open a split of a dataset.

    Raises:
        ClipkitError: where something is missing or contradicts the rest.
    """
    kind = (_lines(folder / TYPE) or ["classification"])[0].lower()
    if kind not in DATASET_TYPES:
        raise ClipkitError(f"{folder / TYPE} says {kind!r}; it can be {', '.join(DATASET_TYPES)}")
    if not (folder / split).is_dir():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.tar")))
        has = f"it has {', '.join(splits)}" if splits else "it has no folder of tar files"
        raise ClipkitError(f"{folder} has no split {split!r}; {has} (--split)")
    source = ShardSource(f"{folder / split}/")
    if kind in ("retrieval", "image_caption_selection"):
        suits = "retrieval" if kind == "retrieval" else "choice"
        return Benchmark(folder, split, suits, CaptionLines(source), [], [])
    classes = _lines(folder / CLASSES)
    if len(classes) < 2:
        raise ClipkitError(f"{folder / CLASSES} is missing or names fewer than two classes, one a line")
    templates = _lines(folder / TEMPLATES)
    wrong = [template for template in templates if "{c}" not in template]
    if wrong:
        raise ClipkitError(f"{folder / TEMPLATES}: {wrong[0]!r} has no {{c}} for the class name")
    prompts = [template.replace("{c}", "{}") for template in templates]
    return Benchmark(
        folder, split, "multilabel" if kind == "multilabel" else "classification", source, classes, prompts
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ClipkitError(f"{path} is not UTF-8 text: {error}") from error
