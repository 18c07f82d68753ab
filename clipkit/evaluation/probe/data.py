"""What a probe is fitted to and judged on: labelled samples of two sources, or of one that is divided by a stated rule.

No sample of the training is one of the test: not by its image's bytes, and not by its group where groups are named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipkit.classification import class_folders
from clipkit.core import BadSample, ClipkitError, UnreadSample, did_you_mean, note
from clipkit.data.sources import (
    CAPTION_COLUMNS,
    RESERVED_COLUMNS,
    FolderSource,
    Sample,
    Selected,
    Source,
    open_source,
    sample_id,
)
from clipkit.evaluation.benchmark_data import is_benchmark, open_benchmark
from clipkit.evaluation.options import ListColumns, ProbeOptions
from clipkit.storage import content_hash, hash_of

__all__ = ["TEST_SHARE", "ProbeSplit", "ProbeTask", "is_of_test", "open_probe"]

TEST_SHARE = 0.25


class ProbeSplit(NamedTuple):
    """The training or the test."""

    source: Source
    labels: np.ndarray
    """int64 ``[n]``, places in the classes."""
    texts: list[tuple[str, ...]]
    """Of each sample; empty where it has none, or no fusion is asked for."""
    groups: np.ndarray
    """int64 ``[n]``: samples with the same number go together."""


@dataclass(frozen=True)
class ProbeTask:
    """Data for a probe, opened."""

    classes: list[str]
    train: ProbeSplit
    test: ProbeSplit
    fused: bool
    """Whether texts take part."""
    grouped: bool
    """Whether groups were named; else each sample is one of its own."""
    shared: int
    """Training samples that were left out because the test has their image's bytes or their group."""
    left_out: list[dict[str, Any]]
    """Ledger lines of what has no label or cannot be read."""

    def identity(self) -> list[object]:
        """All that a result depends on, beside the model, the options and the code."""
        parts = [hash_of(p.source.identity(), p.labels.tolist(), p.texts, p.groups.tolist()).hex() for p in self]
        return [self.classes, self.fused, self.grouped, *parts]

    def __iter__(self) -> Iterator[ProbeSplit]:
        return iter((self.train, self.test))


class _Row(NamedTuple):
    """A sample with a label."""

    row: int
    key: str
    label: str
    texts: tuple[str, ...]
    group: str


@dataclass
class _LabelledSource:
    source: Source
    rows: list[_Row]
    classes: list[str]
    """In the order that the data has them, if any."""
    left_out: list[dict[str, Any]]


def is_of_test(name: str, share: float) -> bool:
    """The rule that divides one source: by a hash of the group's name, or of the sample's key.

    So it is the same whatever else the source holds, and whoever asks.
    """
    return sample_id(name) < share * 2**63


def open_probe(
    source: str,
    options: ProbeOptions = ProbeOptions(),
    *,
    split: str = "test",
    columns: ListColumns = ListColumns(),
) -> ProbeTask:
    """Open labelled data.

    Args:
        source: the test, or what is divided: a folder with a sub-folder of images per class, a dataset in
            CLIP_benchmark's layout, or a list or shards with a column of labels.
        options: where the training comes from, what labels and texts are, and how many samples are used.
        split: of a dataset in CLIP_benchmark's layout.
        columns: of a list.

    Raises:
        ClipkitError: where something is missing, or there are no two classes to learn.
    """
    share = options.test_share
    if options.train is not None and share is not None:
        raise ClipkitError("--test-share divides one source; with --train the test is all of the other one")
    if share is not None and not 0 < share < 1:
        raise ClipkitError(f"--test-share {share:g} leaves nothing to train on, or to test; 0.25 is usual")
    train, test = _train_and_test(source, options, split, columns)
    kept = _without_those_of(test, train, options.group_column is not None)
    shared = len(train.rows) - len(kept)
    if options.shots is not None:
        kept = _few(kept, options.shots, options.seed or 0)
    classes = _classes_of(train, kept, test)
    by, same = ("group", "image or group") if options.group_column else ("key", "image")
    if train.source is test.source:
        note(f"{source}: {len(test.rows):,} samples, by a hash of the {by}, are the test; {len(train.rows):,} train")
    if shared:
        note(f"{shared:,} training samples are left out: the test has their {same}")
    if unlearned := {row.label for row in test.rows} - {row.label for row in kept}:
        first = repr(min(unlearned))
        note(f"{len(unlearned)} classes of the test have no training sample, such as {first}; they count as wrong")
    number = {group: at for at, group in enumerate(dict.fromkeys(row.group for row in [*kept, *test.rows]))}
    return ProbeTask(
        classes,
        _as_split(train.source, kept, classes, number),
        _as_split(test.source, test.rows, classes, number),
        fused=options.text_column is not None,
        grouped=options.group_column is not None,
        shared=shared,
        left_out=train.left_out + test.left_out,
    )


def _train_and_test(
    source: str, options: ProbeOptions, split: str, columns: ListColumns
) -> tuple[_LabelledSource, _LabelledSource]:
    """Both sources, or both parts of the one that is divided."""
    test = _open_labelled(source, split, options, columns)
    train, train_split = options.train, options.train_split or "train"
    if train is None and is_benchmark(Path(source)) and options.test_share is None:
        train, split = source, train_split
    elif train is not None and is_benchmark(Path(train)):
        split = train_split
    if train is not None:
        return _open_labelled(train, split, options, columns), test
    share = TEST_SHARE if options.test_share is None else options.test_share
    of_test = [is_of_test(row.group, share) for row in test.rows]
    rest = [row for row, tested in zip(test.rows, of_test, strict=True) if not tested]
    test.rows = [row for row, tested in zip(test.rows, of_test, strict=True) if tested]
    return _LabelledSource(test.source, rest, test.classes, []), test


def _classes_of(train: _LabelledSource, kept: Sequence[_Row], test: _LabelledSource) -> list[str]:
    """The classes in the order that the training source has them, else sorted; those of the test alone come last.

    Raises:
        ClipkitError: where there are no two to learn, or nothing to test.
    """
    learned = {row.label for row in kept}
    if len(learned) < 2:
        has = f"only {min(learned)!r}" if learned else "no class at all"
        raise ClipkitError(f"the training on {train.source.spec} has {has}; a probe needs two classes or more")
    if not test.rows:
        raise ClipkitError(f"the test on {test.source.spec} has no labelled sample; give another, or --test-share")
    unlearned = {row.label for row in test.rows} - learned
    classes = list(train.classes) or sorted(learned | unlearned)
    return classes + sorted(unlearned - set(classes))


def _as_split(source: Source, rows: Sequence[_Row], classes: Sequence[str], number: dict[str, int]) -> ProbeSplit:
    place = {name: at for at, name in enumerate(classes)}
    return ProbeSplit(
        Selected(source, [row.row for row in rows], problems=()),  # which are the whole source's
        np.array([place[row.label] for row in rows], np.int64),
        [row.texts for row in rows],
        np.array([number[row.group] for row in rows], np.int64),
    )


def _open_labelled(spec: str, split: str, options: ProbeOptions, columns: ListColumns) -> _LabelledSource:
    """A source's samples that have a label, and ledger lines of the others."""
    source, classes, truth = _open_source(spec, split, options, columns)
    wanted = [name for name in (options.label_column, options.text_column, options.group_column) if name is not None]
    opened = _LabelledSource(source, [], classes, list(source.problems))
    existing: set[str] = set()
    used: set[str] = set()
    for row in range(len(source)):
        key = source.key(row)
        values: dict[str, list[str]] = {}
        if wanted:
            try:
                sample = source.without_image(row)
            except BadSample as error:
                unread = {"unread": True} if isinstance(error, UnreadSample) else {}
                opened.left_out.append({"row": row, "key": key, "reason": str(error), **unread})
                continue
            existing |= set(sample.columns)
            for name in wanted:
                of_column = _values(sample, name, columns.caption_column)
                if of_column is not None:
                    used.add(name)
                    values[name] = of_column
        if truth is not None:
            label = None if truth[row] < 0 else classes[truth[row]]
            reason = "has no class: it stands in no class's folder, or no .cls says it"
        else:
            labels = values.get(options.label_column or "", [])
            label = labels[0] if len(labels) == 1 else None
            reason = f"has {len(labels) or 'no'} label{'s' * (len(labels) > 1)} in column {options.label_column!r}"
        if label is None:
            opened.left_out.append({"row": row, "key": key, "reason": reason})
            continue
        group = " | ".join(values.get(options.group_column or "", [])) or key
        opened.rows.append(_Row(row, key, label, tuple(values.get(options.text_column or "", [])), group))
    for name in wanted:
        if name not in used:
            known = sorted(existing - {"path"})
            hint = did_you_mean(name, known)
            raise ClipkitError(f"{spec} says nothing under {name!r}{hint}; beside captions it has {', '.join(known)}")
    return opened


def _open_source(
    spec: str, split: str, options: ProbeOptions, columns: ListColumns
) -> tuple[Source, list[str], np.ndarray | None]:
    """A source, its classes in their order and the class of each row; of labels in a column none and None."""
    if options.label_column is None and is_benchmark(Path(spec)):
        benchmark = open_benchmark(Path(spec), split)
        if benchmark.kind != "classification":
            raise ClipkitError(f"{spec} is a dataset for {benchmark.kind}; a probe needs one class per image")
        return benchmark.source, benchmark.classes, benchmark.truth()
    source = open_source(spec, **vars(columns))
    if options.label_column is not None:
        return source, [], None
    if isinstance(source, FolderSource):
        return source, *class_folders(source)
    raise ClipkitError(f"{spec} has no folder per class; name the column of its labels: --label-column")


def _values(sample: Sample, name: str, caption_column: str | None) -> list[str] | None:
    """What a column says of a sample, without what is empty or said twice; None where there is no such column."""
    columns = sample.columns
    if name in RESERVED_COLUMNS and f"{name}_" in columns:  # see `own_columns`
        value = columns[f"{name}_"]
    elif name == caption_column or (name not in columns and name.lower() in CAPTION_COLUMNS):
        value = list(sample.captions)
    elif name in columns:
        value = columns[name]
    else:
        return None
    listed = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(text for value in listed if value is not None and (text := str(value).strip())))


def _without_those_of(test: _LabelledSource, train: _LabelledSource, grouped: bool) -> list[_Row]:
    """The training without what the test has too. Only images of a size that both have are read."""
    groups = {row.group for row in test.rows} if grouped else set()
    kept = [row for row in train.rows if row.group not in groups]
    sizes = {test.source.size(row.row) for row in test.rows} & {train.source.size(row.row) for row in kept}
    tested = {_content(test.source, row.row) for row in test.rows if test.source.size(row.row) in sizes} - {None}
    return [
        row for row in kept if train.source.size(row.row) not in sizes or _content(train.source, row.row) not in tested
    ]


def _content(source: Source, row: int) -> bytes | None:
    try:
        return content_hash(source[row].read())
    except BadSample:
        return None  # which embedding says, too


def _few(rows: Sequence[_Row], shots: int, seed: int) -> list[_Row]:
    """So many rows of each class, in their order."""
    of_class: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        of_class.setdefault(row.label, []).append(at)
    scarce = [label for label, places in of_class.items() if len(places) < shots]
    if scarce:
        note(f"{len(scarce)} classes have fewer than {shots} training samples, such as {min(scarce)!r}")
    rng = np.random.default_rng(seed)
    chosen = [at for _, places in sorted(of_class.items()) for at in rng.permutation(places)[:shots].tolist()]
    return [rows[at] for at in sorted(chosen)]
