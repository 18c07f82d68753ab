"""Benchmarks of composition: each instance poses images and captions that differ in little, and asks which go together.

Three forms are read. Of a list (csv, tsv, jsonl, parquet, or JSON with a list of rows) the columns say which:
``image, caption, negative`` is an image with its caption and a false one (SugarCrepe; Hsieh et al. 2023), ``image_0,
caption_0, image_1, caption_1`` are two images and two captions that go together in this order (Winoground; Thrush et
al. 2022). A JSON as SugarCrepe ships it holds ``{"0": {"filename", "caption", "negative_caption"}, …}``. And shards in
CLIP_benchmark's layout hold an image with its captions, one a line, of which the first is the right one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.core import BadSample, ClipkitError
from clipkit.data.sources import LIST_SUFFIXES, NamedImages, Source, read_rows
from clipkit.evaluation.benchmark_data import is_benchmark, open_benchmark
from clipkit.evaluation.embedder import SharedWork, nothing_usable, samples_hash
from clipkit.evaluation.measuring import Evaluation, Further, measure_choice
from clipkit.storage import digest

__all__ = ["Instances", "evaluate_choice", "open_instances"]

IMAGE_NAMES = ("image", "path", "filename", "file_name", "image_path", "filepath")
CAPTION_NAMES = ("caption", "text", "sentence")
NEGATIVE_NAMES = ("negative", "negative_caption", "false_caption", "foil")
PAIR_COLUMNS = ("image_0", "caption_0", "image_1", "caption_1")


@dataclass(frozen=True)
class Instances:
    """Images and captions to be told apart."""

    source: Source
    """Of the images, each once."""
    images: np.ndarray
    """int64 ``[n, 1 or 2]``: rows of the source."""
    captions: list[tuple[str, ...]]
    """Of each instance; of one image the first is the right one, of two the i-th goes with the i-th."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """Ledger lines of what is no instance."""

    def identity(self) -> str:
        """A hash of all of it."""
        return digest([self.source.identity(), self.images.tolist(), self.captions])


def open_instances(
    spec: str,
    *,
    split: str = "test",
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
) -> Instances:
    """Open a benchmark in one of the forms told above.

    Args:
        spec: a list, SugarCrepe's JSON, or a folder in CLIP_benchmark's layout.
        split: of such a folder.
        image_column, caption_column: of a list with one image a row; found among the usual names when not given.
        image_root: where relative paths start; the list's folder when not given.

    Raises:
        ClipkitError: where it is none of these, or nothing in it can be used.
    """
    path = Path(spec)
    if is_benchmark(path):
        return _of_shards(path, split)
    if path.suffix.lower() not in LIST_SUFFIXES or not path.is_file():
        raise ClipkitError(
            f"{spec} poses no choices; give a list with the columns image, caption and negative, or "
            f"{', '.join(PAIR_COLUMNS)}; SugarCrepe's JSON; or shards in CLIP_benchmark's layout"
        )
    rows = _sugarcrepe(path) or read_rows(spec)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    root = image_root or path.parent
    if all(name in columns for name in PAIR_COLUMNS):
        if image_column is not None or caption_column is not None:
            raise ClipkitError(
                f"{spec} has the columns {', '.join(PAIR_COLUMNS)}; leave --image-column and --caption-column out"
            )
        return _of_rows(spec, rows, ["image_0", "image_1"], ["caption_0", "caption_1"], root)
    image = _found(spec, columns, image_column, IMAGE_NAMES, "image")
    caption = _found(spec, columns, caption_column, CAPTION_NAMES, "caption")
    negative = _found(spec, columns, None, NEGATIVE_NAMES, "negative")
    return _of_rows(spec, rows, [image], [caption, negative], root)


def _found(spec: str, columns: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    names = usual if wanted is None else [wanted]
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise ClipkitError(
            f"{spec} has no {what} column ({', '.join(names)}); its columns are {', '.join(columns)}. A choice needs "
            f"image, caption and negative, or {', '.join(PAIR_COLUMNS)}"
        )
    return found


def _sugarcrepe(path: Path) -> list[dict[str, Any]]:
    """The rows of an object of objects; none where the file is something else, which `read_rows` may know."""
    if path.suffix.lower() != ".json":
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return []  # `read_rows` says what is wrong
    if not isinstance(found, dict) or not found or not all(isinstance(row, dict) for row in found.values()):
        return []
    return list(found.values())


def _of_rows(
    spec: str, rows: Sequence[dict[str, Any]], images: Sequence[str], captions: Sequence[str], root: str | Path
) -> Instances:
    row_of: dict[str, int] = {}
    found, said, problems = [], [], []
    for number, row in enumerate(rows, 1):
        values = [row.get(name) for name in (*images, *captions)]
        texts = [value.strip() if isinstance(value, str) else "" for value in values]
        empty = [name for name, text in zip((*images, *captions), texts, strict=True) if not text]
        if empty:
            problems.append({"key": f"row {number}", "reason": f"has no {' and no '.join(empty)}"})
            continue
        found.append([row_of.setdefault(text, len(row_of)) for text in texts[: len(images)]])
        said.append(tuple(texts[len(images) :]))
    if not found:
        first = problems[0] if problems else {"key": spec, "reason": "has no row"}
        raise ClipkitError(f"nothing in {spec} can be used; the first: {first['key']}: {first['reason']}")
    return Instances(NamedImages(spec, list(row_of), root), np.array(found, np.int64), said, problems)


def _of_shards(folder: Path, split: str) -> Instances:
    opened = open_benchmark(folder, split)
    if opened.kind not in ("retrieval", "choice"):
        raise ClipkitError(f"{folder} is a dataset for zeroshot, not for choice, which needs captions")
    rows, said, problems = [], [], []
    for row in range(len(opened.source)):
        try:
            captions = opened.source.without_image(row).captions
        except BadSample as error:
            captions, reason = (), str(error)
        else:
            reason = f"has {len(captions)} captions, and a choice is between two"
        if len(captions) == 2:
            rows.append([row])
            said.append(captions)
        else:
            problems.append({"row": row, "key": opened.source.key(row), "reason": reason})
    if not rows:
        first = problems[0] if problems else {"key": folder, "reason": "has no sample"}
        raise ClipkitError(f"nothing in {folder} poses a choice; the first: {first['key']}: {first['reason']}")
    return Instances(opened.source, np.array(rows, np.int64), said, problems)


def evaluate_choice(
    work: SharedWork,
    instances: Instances,
    *,
    intervals: bool = False,
    compat: bool = False,
) -> Evaluation:
    """Whether a model tells a true caption from a false one (`clipkit.metrics.choice`).

    Args:
        work: see `evaluate_retrieval`.
        instances: images with captions to choose among; one whose image cannot be used is left out.
        intervals, compat: see `evaluate_retrieval`.

    Raises:
        ClipkitError: where no instance can be used, on all ranks also where one fails.
    """
    images = work.images(instances.source)
    place = np.full(len(instances.source), -1)
    place[images.rows] = np.arange(len(images.rows))
    at = place[instances.images]
    usable = (at >= 0).all(axis=1)
    told = {line["row"] for line in images.left_out if "row" in line}  # a sample whose words are at fault is no image
    left_out = [*images.left_out, *(line for line in instances.problems if line.get("row") not in told)]
    if not usable.any():
        raise nothing_usable(instances.source, left_out, "no instance has its images")
    captions = [instances.captions[row] for row in np.flatnonzero(usable)]
    text = work.texts([caption for of_instance in captions for caption in of_instance])
    of = samples_hash(instances.source, images, captions, at[usable]) if intervals else None
    both = images.vectors[at[usable]], text.reshape(len(captions), -1, text.shape[1])
    found = work.by_the_first(lambda: measure_choice(*both, Further(of, compat)))
    return replace(found, left_out=left_out)
