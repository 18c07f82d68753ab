"""Metadata tables: values of any kind as columns, several tables as one, and parquet written whole."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.core import atomic_write
from clipkit.data.shards import well_formed
from clipkit.storage import Checksum, Hashed

__all__ = ["as_column", "in_schema", "joined_schema", "joined_tables", "write_parquet"]


def as_column(values: list[Any]) -> pa.Array:
    """Values as one Arrow column; lists, objects and mixed kinds as JSON text."""
    plain = [None if isinstance(v, float) and v != v else v for v in values]
    if not any(isinstance(v, list | dict | bytes) for v in plain):
        try:
            return pa.array(plain)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            pass
    return pa.array([None if v is None else _text(v) for v in plain], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, str | datetime.date | datetime.time):
        return well_formed(str(value))
    return well_formed(json.dumps(value, ensure_ascii=False, default=str))


def joined_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of several; a column whose type differs among them becomes text."""
    schema = joined_schema([table.schema for table in tables])
    return pa.concat_tables([in_schema(table, schema) for table in tables]).combine_chunks()


def joined_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all, in the order in which they come; one whose types do not go together is text."""
    kinds: dict[str, pa.DataType] = {}
    for field_ in (field_ for schema in schemas for field_ in schema):
        kinds[field_.name] = _wider(kinds.get(field_.name, pa.null()), field_.type)
    return pa.schema(list(kinds.items()))


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    try:
        either = [pa.schema([("x", kind)]) for kind in (a, b)]
        return pa.unify_schemas(either, promote_options="permissive").field("x").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns; what it has not is missing in every row."""
    columns = []
    for wanted in schema:
        if wanted.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, wanted.type))
            continue
        column = table[wanted.name]
        if pa.types.is_string(wanted.type) and not pa.types.is_null(column.type):
            values = (
                [None if v is None else _text(v) for v in column.to_pylist()] if column.type != wanted.type else None
            )
            columns.append(column if values is None else pa.array(values, pa.string()))
        else:
            # A whole number beyond 2⁵³ beside fractions is the nearest one that there is, as in JSON.
            columns.append(column.cast(wanted.type, safe=not pa.types.is_floating(wanted.type)))
    return pa.table(columns, schema=schema)


def write_parquet(path: Path, table: pa.Table, **options: Any) -> Checksum:
    """Write a parquet file atomically, with options of `pyarrow.parquet.write_table`."""
    with atomic_write(path) as handle:
        output = Hashed(handle)
        pq.write_table(table, output, **options)
    return output.checksum()
