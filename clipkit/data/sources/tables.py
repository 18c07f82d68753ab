"""List files as rows: csv, tsv, jsonl and parquet tables that name images, and COCO's caption files."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.core import ClipkitError, warn
from clipkit.storage import is_remote, read_bytes

__all__ = ["LIST_SUFFIXES", "read_rows"]

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".json")


def read_rows(spec: str | Path) -> list[dict[str, Any]]:
    """Every row of a list, a path or a URL, as a mapping from column to value.

    Of a ``.json`` file, COCO's captions give a row per caption with ``file_name, caption, image_id`` and what else
    stands by the image, in the images' order; a plain list of objects is taken as it is.

    Raises:
        ClipkitError: naming the file and the row where it cannot be read.
    """
    suffix = Path(str(spec).partition("?")[0] if is_remote(str(spec)) else spec).suffix.lower()
    try:
        with _opened(str(spec)) as binary:
            if suffix == ".parquet":
                return pq.read_table(binary).to_pylist()
            if suffix == ".json":
                return _json_table(str(spec), binary.read())
            with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as lines:
                if suffix == ".jsonl":
                    return list(_json_rows(spec, lines))
                return list(_separated_rows(spec, lines, "\t" if suffix == ".tsv" else ","))
    except pa.ArrowInvalid as error:
        raise ClipkitError(f"{spec} is no readable parquet file: {error}") from error
    except UnicodeDecodeError as error:
        raise ClipkitError(f"{spec} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ClipkitError(f"cannot read {spec}: {error.strerror or error}") from error


def _opened(spec: str) -> BinaryIO:
    return io.BytesIO(read_bytes(spec)) if is_remote(spec) else Path(spec).open("rb")


def _json_table(name: str, data: bytes) -> list[dict[str, Any]]:
    try:
        content = json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ClipkitError(f"{name} is not valid JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return list(_coco_rows(name, content["images"], content.get("annotations") or []))
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return content
    raise ClipkitError(
        f"{name} is no list: expected COCO's captions (images with id and file_name, annotations with image_id and "
        "caption), or a list of objects"
    )


def _coco_rows(name: str, images: list[Any], annotations: list[Any]) -> Iterator[dict[str, Any]]:
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and "caption" in annotation and _plain(annotation.get("image_id")):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    # Boxes or none at all: then there is no caption column, which is an error only where captions are needed.
    captioned = bool(captions)
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not _plain(image.get("id")):
            raise ClipkitError(f"{name}: images[{number}] has no id or no file_name")
        # The picture itself tells its width and height, also when it was made smaller on the way.
        columns = {key: value for key, value in image.items() if key not in ("id", "file_name", "width", "height")}
        for caption in captions.pop(image["id"], [None]) if captioned else [None]:
            said = {"caption": caption} if captioned else {}
            yield {"file_name": image["file_name"], **said, "image_id": image["id"], **columns}
    if captions:
        warn(f"{name}: {sum(map(len, captions.values())):,} captions are of no image that it lists")


def _plain(number: Any) -> bool:
    return isinstance(number, int | str)


def _json_rows(spec: str | Path, lines: Any) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ClipkitError(f"{spec}: line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ClipkitError(f"{spec}: line {number} is no JSON object")
            yield row


def _separated_rows(spec: str | Path, lines: Any, separator: str) -> Iterator[dict[str, Any]]:
    if separator == "\t":
        # Captions begin with quotation marks more often than fields hold tabs: a lone quote must not swallow the
        # lines after it. A field that is quoted as a whole is unquoted.
        records: Iterator[list[str]] = ([_unquote(f) for f in line.rstrip("\r\n").split("\t")] for line in lines)
    else:
        csv.field_size_limit(2**31 - 1)
        records = csv.reader(lines, strict=True)
    try:
        header = next(records, [])
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise ClipkitError(f"{spec} has two columns named {twice[0]!r}; rename one")
        for number, record in enumerate(records, 2):
            if record and record != [""]:
                if len(record) != len(header):
                    raise ClipkitError(f"{spec}: row {number} has {len(record)} fields, the header has {len(header)}")
                yield dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise ClipkitError(f"{spec}: {error}; check its quotation marks") from error


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        inner = value[1:-1]
        if '"' not in inner.replace('""', ""):
            return inner.replace('""', '"')
    return value
