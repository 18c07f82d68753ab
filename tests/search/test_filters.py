"""Conditions on metadata mean what Python's comparisons mean, row by row, and nothing of them is ever run."""

import datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.search.filters import Filter

TABLE = pa.table(
    {
        "width": [1, 600, None, 900],
        "lang": ["en", "de", None, "en"],
        "the caption": ["a dog", "Dog", "x", "cat"],
        "share": [1.0, float("nan"), None, 2.0],
        "good": [True, False, None, True],
    }
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("width > 512", [1, 3]),
        ("not width > 512", [0]),
        ("width is None", [2]),
        ("width is not None and share is not None", [0, 3]),
        ("share is None", [1, 2]),
        ('lang in ["en", "fr"]', [0, 3]),
        ('lang not in ["en"]', [1]),
        ('width > 5 and lang == "en"', [3]),
        ('lang == "de" or width is None', [1, 2]),
        ('"og" in column("the caption")', [0, 1]),
        ('lower(column("the caption")) == "dog"', [1]),
        ('length(column("the caption")) <= 3', [1, 2, 3]),
        ('startswith(lang, "d") or endswith(lang, "n")', [0, 1, 3]),
        ('matches(column("the caption"), "^[a-c]")', [0, 3]),
        ("1 < width < 700", [1]),
        ("width / 2 == 450", [3]),
        ("width * 2 - 1 == 1 + 0", [0]),
        ("-width < -500", [1, 3]),
        ("good", [0, 3]),
        ("not good", [1]),
        ("good == False", [1]),
        ("width in (1, 900)", [0, 3]),
        ("width in []", []),
        ("True", [0, 1, 2, 3]),
    ],
)
def test_conditions(condition, rows):
    assert Filter(condition).rows(TABLE).nonzero()[0].tolist() == rows


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_dates_and_times(zone):
    utc = datetime.UTC if zone else None
    days = [datetime.datetime(2020, 1, 1, tzinfo=utc), datetime.datetime(2020, 5, 1, 12, 30, tzinfo=utc), None]
    table = pa.table({"day": pa.array(days, pa.date32()), "at": pa.array(days, pa.timestamp("us", zone))})
    for condition, rows in {
        'day >= "2020-01-02"': [1],
        '"2020-01-01" == day': [0],
        'day in ["2020-05-01", "1999-01-01"]': [1],
        'not day < "2020-05-01"': [1],
        'at > "2020-01-01"': [1],
        'at < "2020-05-01 12:30:01" and at > "2020-05-01T12:29"': [1],
        "at is None and day is None": [2],
    }.items():
        assert Filter(condition).rows(table).nonzero()[0].tolist() == rows, condition
    with pytest.raises(ClipkitError, match=r"does not fit the columns \(day: date32.*soon"):
        Filter('day > "soon"').rows(table)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("widht > 3", "no column 'widht' (did you mean 'width'?); there are width, lang"),
        ('width > "x"', "does not fit the columns (width: number)"),
        ("lang + width > 3", "width: number"),
        ("lang", "is no condition"),
        ("width =", "cannot be read"),
        ("", "cannot be read"),
        ("width == None", "write `column is None`"),
        ("width is 3", "write =="),
        ('__import__("os").system("x")', "means nothing here"),
        ("width.__class__", "means nothing here"),
        ("[w for w in width]", "means nothing here"),
        ("(lambda: 1)()", "means nothing here"),
        ("width ** 9", "means nothing here"),
        ("width in lang", "needs a text in quotes"),
        ("width in [lang]", "a list of values"),
        ("lower(lang, 2)", "lower takes 1"),
        ('matches(lang, "(")', "Invalid regular expression"),
        ("not " * 3000 + "good", "deep"),
        ("\x00", "cannot be read"),
        (f"width < {10**30}", f"no column can hold {10**30}"),
        ('lang == "\\ud800"', r"no column can hold \ud800"),
    ],
)
def test_what_is_no_condition_is_told_in_one_line(condition, said):
    with pytest.raises(ClipkitError) as told:
        Filter(condition).rows(TABLE)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


NUMBERS = st.one_of(st.none(), st.integers(-3, 3))
TEXTS = st.one_of(st.none(), st.sampled_from(["a", "b", "ab"]))
LEAVES = st.one_of(
    st.tuples(st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), st.integers(-3, 3)).map(
        lambda p: f"n {p[0]} {p[1]}"
    ),
    st.sampled_from(['t == "a"', 't in ["a", "b"]', 't not in ["b"]', '"a" in t', "n is None", "t is not None"]),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda c: f"not ({c})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
    ),
    max_leaves=5,
)


class Missing(Exception):
    pass


def by_hand(condition, row):
    """The slow twin: Python's own words over one row, three-valued where something is missing."""
    import ast

    def value(node):
        match node:
            case ast.BoolOp(op=op, values=values):
                found = [value(each) for each in values]
                decides = isinstance(op, ast.Or)
                if decides in found:
                    return decides
                return None if None in found else not decides
            case ast.UnaryOp(operand=operand):
                inner = value(operand)
                return None if inner is None else not inner
            case ast.Compare(ops=[op]):
                source = ast.unparse(node)
                if isinstance(op, ast.Is | ast.IsNot):
                    return eval(source, {}, row)
                names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
                return None if any(row[name] is None for name in names) else eval(source, {}, row)

    return value(ast.parse(condition, mode="eval").body) is True


@settings(max_examples=150, deadline=None)
@given(condition=CONDITIONS, rows=st.lists(st.tuples(NUMBERS, TEXTS), min_size=1, max_size=8))
def test_any_condition_is_what_it_says_row_by_row(condition, rows):
    table = pa.table(
        {"n": pa.array([n for n, _ in rows], pa.int64()), "t": pa.array([t for _, t in rows], pa.string())}
    )
    wanted = [by_hand(condition, {"n": n, "t": t}) for n, t in rows]
    assert Filter(condition).rows(table).tolist() == wanted
