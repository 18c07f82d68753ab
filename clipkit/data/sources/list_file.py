"""A list file: a table with an image per row."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError
from clipkit.data.shards import well_formed
from clipkit.data.sources.files import Files, extension_of
from clipkit.data.sources.sample import Sample, Stamp, own_columns, utf8_name
from clipkit.data.sources.tables import read_rows
from clipkit.storage import digest, hash_of, is_remote, stamp

__all__ = ["ListSource"]

IMAGE_COLUMNS = (
    "path",
    "image",
    "image_path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "file",
    "img",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "alt_text", "description")


class ListSource:
    """A table with an image per row; rows that name one image are one sample with several captions.

    Args:
        spec: path or URL of the list.
        image_column, caption_column, image_root, captions_required: see `clipkit.data.sources.open_source`.
    """

    def __init__(
        self,
        spec: str,
        image_column: str | None,
        caption_column: str | None,
        image_root: str | Path | None,
        captions_required: bool,
    ):
        self.spec = spec
        rows = read_rows(spec)
        if not rows:
            raise ClipkitError(f"{spec} has no rows")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        self._image = _find_column(spec, columns, image_column, IMAGE_COLUMNS, "image", True) or ""
        self._caption = _find_column(spec, columns, caption_column, CAPTION_COLUMNS, "caption", captions_required)
        self.has_captions = self._caption is not None
        groups: dict[str, list[dict[str, Any]]] = {}
        self.problems: list[dict[str, Any]] = []
        for number, row in enumerate(rows, 1):
            name = row.get(self._image)
            if isinstance(name, str) and name.strip():
                # One image under two spellings of its path is one sample.
                groups.setdefault(name if is_remote(name) else os.path.normpath(name), []).append(row)
            else:
                reason = f"names no image in column {self._image!r}"
                self.problems.append({"key": f"row {number} below the header", "reason": reason})
        if not groups:
            raise ClipkitError(f"{spec}: no row names an image in column {self._image!r}")
        self._names = list(groups)
        self._rows = list(groups.values())
        home = spec.partition("?")[0].rpartition("/")[0] if is_remote(spec) else Path(spec).parent
        self._files = Files(image_root or home, self._names)
        self.remote = self._files.remote

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return utf8_name(self._names[i])

    def name(self, i: int) -> str:
        return self._names[i]

    def place(self, i: int) -> Path | str:
        return self._files.at(i)

    def size(self, i: int) -> int:
        return self._files.size(i)

    def __getitem__(self, i: int) -> Sample:
        name, rows = self._names[i], self._rows[i]
        listed: list[Any] = []
        for row in rows if self._caption else []:
            value = row.get(self._caption or "")
            listed += value if isinstance(value, list) else [value]
        captions = [well_formed(text.strip()) if isinstance(text, str) else "" for text in listed]
        empty = [f"caption {k} of {len(captions)} is empty" for k, text in enumerate(captions, 1) if not text]
        columns = {}
        for column in dict.fromkeys(name for row in rows for name in row):
            if column not in (self._image, self._caption):
                values = [row.get(column) for row in rows]
                alike = all(value == values[0] for value in values[1:])
                columns[column] = values[0] if alike else values
        all_columns = {"path": self.key(i), **own_columns(columns)}
        kept = tuple(text for text in captions if text)
        return Sample(self.key(i), self._files.at(i), extension_of(name), kept, all_columns, left_out=tuple(empty))

    def without_image(self, i: int) -> Sample:
        return self[i]

    def stamp(self, i: int) -> Stamp:
        image = self._files.stamp(i)
        words = hash_of(self._names[i], self._image, self._caption, self._rows[i])
        return Stamp(image and hash_of(image), words)

    def identity(self) -> str:
        if is_remote(self.spec):
            listed = stamp(self.spec)
            if " " not in listed:  # of a size alone, which another list may have; the rows are here anyway
                listed += f" {hash_of(self._rows).hex()}"
        else:
            listed = hashlib.blake2b(Path(self.spec).read_bytes(), digest_size=16).hexdigest()
        return digest([listed, [self._image, self._caption], self._files.stamps()])


def _find_column(
    spec: str, columns: list[str], wanted: str | None, usual: Sequence[str], what: str, required: bool
) -> str | None:
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise ClipkitError(
            f"{spec} has no column {wanted!r}; its columns are {', '.join(columns)}; name one with --{what}-column"
        )
    by_lower = {column.lower(): column for column in reversed(columns)}
    chosen = next((by_lower[name] for name in usual if name in by_lower), None)
    if chosen is None and required:
        raise ClipkitError(
            f"{spec} has no {what} column; its columns are {', '.join(columns)}; name it with --{what}-column"
        )
    return chosen
