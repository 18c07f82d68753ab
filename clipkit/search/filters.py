"""Conditions on metadata, such as ``width > 512 and lang == "en"``, as masks over a table's rows.

The language is the part of Python's expressions that compares columns with values. Nothing is ever evaluated as
Python: the text is parsed, and each node becomes one of Arrow's functions over whole columns.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.core import ClipkitError, did_you_mean

__all__ = ["Filter"]

COMPARED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
RECKONED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: lambda a, b: pc.divide(pc.cast(a, pa.float64()), pc.cast(b, pa.float64())),
}
CALLED: dict[str, tuple[int, Callable[..., Any]]] = {
    "lower": (1, lambda column: pc.utf8_lower(column)),
    "length": (1, lambda column: pc.utf8_length(column)),
    "startswith": (2, lambda column, text: pc.starts_with(column, text)),
    "endswith": (2, lambda column, text: pc.ends_with(column, text)),
    "matches": (2, lambda column, pattern: pc.match_substring_regex(column, pattern)),
}
TOLD = (
    'compare columns with values, as in width > 512 and lang == "en"; there are and, or, not, in, is None, + - * /, '
    f'"text" in column, {", ".join(CALLED)}, and column("a name") for names with spaces'
)


class Filter:
    """A condition on the columns of a table.

    Args:
        text: such as ``width > 512 and lang in ["en", "de"] and "dog" in caption``.

    Raises:
        ClipkitError: for what is no such condition.
    """

    def __init__(self, text: str):
        self.text = text if len(text) < 200 else f"{text[:180]}..."
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply or holds a NUL"
            raise ClipkitError(f"the filter {self.text!r} cannot be read ({reason}); {TOLD}") from error

    def rows(self, table: pa.Table) -> np.ndarray:
        """Which rows the condition holds for, bool ``[rows]``.

        A comparison with a missing value is neither true nor false (as in SQL), and a row passes only what is true:
        neither ``width > 5`` nor ``not width > 5`` finds a row without a width; ``width is None`` does.

        Raises:
            ClipkitError: for a column that is not there, or kinds that cannot be compared.
        """
        try:
            mask = self._value(self._tree, table)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
            used = self.columns(table.column_names)
            kinds = ", ".join(f"{name}: {_kind(table.schema.field(name).type)}" for name in used)
            reason = str(error).splitlines()[0]
            raise ClipkitError(f"the filter {self.text!r} does not fit the columns ({kinds}): {reason}") from error
        except RecursionError as error:
            raise ClipkitError(f"the filter {self.text!r} is nested too deeply") from error
        if isinstance(mask, pa.Scalar) and pa.types.is_boolean(mask.type):
            return np.full(table.num_rows, mask.as_py() is True)
        if not isinstance(mask, pa.ChunkedArray | pa.Array) or not pa.types.is_boolean(mask.type):
            raise ClipkitError(f"the filter {self.text!r} is no condition; {TOLD}")
        return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)

    def columns(self, known: Sequence[str]) -> list[str]:
        """Those of these columns that it looks at."""
        names = []
        for node in ast.walk(self._tree):
            match node:
                case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)]) | ast.Name(id=name):
                    names.append(name)
        return [name for name in dict.fromkeys(names) if name in known]

    def _value(self, node: ast.expr, table: pa.Table) -> Any:
        match node:
            case ast.Constant(value=None):
                raise ClipkitError(f"the filter {self.text!r} compares with None; write `column is None`")
            case ast.Constant(value=bool() | int() | float() | str() as value):
                try:
                    return pa.scalar(value)
                except (OverflowError, UnicodeEncodeError):  # beyond 64 bits; half a character
                    shown = str(value).encode("utf-8", "backslashreplace").decode()
                    raise ClipkitError(f"the filter {self.text!r}: no column can hold {shown}") from None
            case ast.Name(id=name):
                return self._column(name, table)
            case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)], keywords=[]):
                return self._column(name, table)
            case ast.BoolOp(op=op, values=values):
                both = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                found = self._value(values[0], table)
                for value in values[1:]:
                    found = both(found, self._value(value, table))
                return found
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self._value(operand, table))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self._value(operand, table))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in RECKONED:
                return RECKONED[type(op)](self._value(left, table), self._value(right, table))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                parts = [
                    self._compared(a, op, b, table) for a, op, b in zip([left, *rights], ops, rights, strict=False)
                ]
                found = parts[0]
                for part in parts[1:]:
                    found = pc.and_kleene(found, part)
                return found
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in CALLED:
                count, function = CALLED[name]
                if len(args) != count:
                    raise ClipkitError(f"the filter {self.text!r}: {name} takes {count} of what stands in brackets")
                values = [self._value(args[0], table), *(self._text(arg) for arg in args[1:])]
                return function(*values)
        raise ClipkitError(f"the filter {self.text!r} has a part that means nothing here; {TOLD}")

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr, table: pa.Table) -> Any:
        if isinstance(op, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
            mask = pc.is_null(self._value(left, table), nan_is_null=True)
            return pc.invert(mask) if isinstance(op, ast.IsNot) else mask
        if isinstance(op, ast.In | ast.NotIn):
            mask = self._contained(left, right, table)
            return pc.invert(mask) if isinstance(op, ast.NotIn) else mask
        if type(op) not in COMPARED:
            raise ClipkitError(f"the filter {self.text!r}: `is` goes with None; write ==")
        return COMPARED[type(op)](*_alike(self._value(left, table), self._value(right, table)))

    def _contained(self, left: ast.expr, right: ast.expr, table: pa.Table) -> Any:
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            column = self._value(left, table)
            values = [self._value(item, table) for item in right.elts]
            if not all(isinstance(value, pa.Scalar) for value in values):
                raise ClipkitError(f"the filter {self.text!r}: what `in` looks through is a list of values")
            mask: Any = pa.scalar(False)
            for value in values:
                mask = pc.or_kleene(mask, pc.equal(*_alike(column, value)))
            # A missing value is in no list, and it is not known to be in none either.
            return pc.if_else(pc.is_null(column), pa.scalar(None, pa.bool_()), mask)
        return pc.match_substring(self._value(right, table), self._text(left))

    def _text(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise ClipkitError(f"the filter {self.text!r} needs a text in quotes there; {TOLD}")

    def _column(self, name: str, table: pa.Table) -> Any:
        if name not in table.column_names:
            near = did_you_mean(name, table.column_names)
            raise ClipkitError(
                f"the filter {self.text!r}: no column {name!r}{near}; there are {', '.join(table.column_names)}"
            )
        return table[name]


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Two values to compare; a text in quotes beside a date or a time is read as one (ISO 8601, UTC)."""
    for text, other, in_order in ((left, right, True), (right, left, False)):
        if isinstance(text, pa.Scalar) and pa.types.is_string(text.type) and pa.types.is_temporal(other.type):
            kind = other.type
            plain = pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind
            read = text.cast(plain).cast(kind)
            return (read, other) if in_order else (other, read)
    return left, right


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "number" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else str(kind)
