"""List files as rows: csv, tsv, jsonl and parquet tables that name images."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import ClipkitError

__all__ = ["LIST_SUFFIXES", "read_rows"]

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a list as a mapping from column to value.

    Raises:
        ClipkitError: naming the file and the row where it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            return pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ClipkitError(f"{path} is no readable parquet file: {error}") from error
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            if suffix == ".jsonl":
                return list(_json_rows(path, handle))
            return list(_separated_rows(path, handle, "\t" if suffix == ".tsv" else ","))
    except UnicodeDecodeError as error:
        raise ClipkitError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ClipkitError(f"cannot read {path}: {error.strerror}") from error


def _json_rows(path: Path, lines: Any) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ClipkitError(f"{path}: line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ClipkitError(f"{path}: line {number} is no JSON object")
            yield row


def _separated_rows(path: Path, lines: Any, separator: str) -> Iterator[dict[str, Any]]:
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
            raise ClipkitError(f"{path} has two columns named {twice[0]!r}; rename one")
        for number, record in enumerate(records, 2):
            if record and record != [""]:
                if len(record) != len(header):
                    raise ClipkitError(f"{path}: row {number} has {len(record)} fields, the header has {len(header)}")
                yield dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise ClipkitError(f"{path}: {error}; check its quotation marks") from error


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        inner = value[1:-1]
        if '"' not in inner.replace('""', ""):
            return inner.replace('""', '"')
    return value
