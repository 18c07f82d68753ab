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
from clipkit.storage import content_hash, hash_of

__all__ = ["TEST_SHARE", "Part", "ProbeTask", "is_of_test", "open_probe"]

TEST_SHARE = 0.25


class Part(NamedTuple):
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
    train: Part
    test: Part
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

    def __iter__(self) -> Iterator[Part]:
        return iter((self.train, self.test))


class _Row(NamedTuple):
    """A sample with a label."""

    row: int
    key: str
    label: str
    texts: tuple[str, ...]
    group: str


@dataclass
class _Opened:
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
    *,
    train: str | None = None,
    split: str = "test",
    train_split: str = "train",
    test_share: float | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    group_column: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    **columns: Any,
) -> ProbeTask:
    """Open labelled data.

    Args:
        source: the test, or what is divided: a folder with a sub-folder of images per class, a dataset in
            CLIP_benchmark's layout, or a list or shards with a column of labels.
        train: the training, likewise; where it is not given, the `train_split` of a dataset, else a part of the source.
        split, train_split: of datasets in CLIP_benchmark's layout.
        test_share: of the source, where it is divided (`is_of_test`); 0.25 when not given.
        label_column: of the classes' names.
        text_column: of what is fused with the images; none when not given.
        group_column: of what goes together: into the training or into the test.
        shots: so many training samples of each class, or all of them.
        seed: of their choice.
        columns: of a list, see `open_source`.

    Raises:
        ClipkitError: where something is missing, or there are no two classes to learn.
    """
    if train is not None and test_share is not None:
        raise ClipkitError("--test-share divides one source; with --train the test is all of the other one")
    if test_share is not None and not 0 < test_share < 1:
        raise ClipkitError(f"--test-share {test_share:g} leaves nothing to train on, or to test; 0.25 is usual")
    names = (label_column, text_column, group_column)
    test = _open(source, split, names, columns)
    left_out, told = test.left_out, []
    if train is None and is_benchmark(Path(source)) and test_share is None:
        train, split = source, train_split
    elif train is not None and is_benchmark(Path(train)):
        split = train_split
    if train is None:
        share = TEST_SHARE if test_share is None else test_share
        of_test = [is_of_test(row.group, share) for row in test.rows]
        other = _Opened(test.source, [r for r, t in zip(test.rows, of_test, strict=True) if not t], test.classes, [])
        test.rows = [row for row, tested in zip(test.rows, of_test, strict=True) if tested]
        by = "group" if group_column else "key"
        told.append(
            f"{source}: {len(test.rows):,} samples, by a hash of the {by}, are the test; {len(other.rows):,} train"
        )
    else:
        other = _open(train, split, names, columns)
        left_out = other.left_out + left_out
    learned = _apart(other, test, group_column is not None)
    shared = len(other.rows) - len(learned)
    if shared:
        same = "image or group" if group_column else "image"
        told.append(f"{shared:,} training samples are left out: the test has their {same}")
    if shots is not None:
        learned = _few(learned, shots, seed)
    met = {row.label for row in learned}
    if len(met) < 2:
        held = f"only {min(met)!r}" if met else "no class at all"
        raise ClipkitError(f"the training on {other.source.spec} has {held}; a probe needs two classes or more")
    if not test.rows:
        raise ClipkitError(f"the test on {test.source.spec} has no labelled sample; give another, or --test-share")
    unmet = {row.label for row in test.rows} - met
    if unmet:
        told.append(
            f"{len(unmet)} classes of the test have no training sample, such as {min(unmet)!r}; they count as wrong"
        )
    for line in told:
        note(line)
    classes = list(other.classes) or sorted(met | unmet)
    classes += sorted(unmet - set(classes))
    number = {group: at for at, group in enumerate(dict.fromkeys(row.group for row in [*learned, *test.rows]))}
    return ProbeTask(
        classes,
        _part(other.source, learned, classes, number),
        _part(test.source, test.rows, classes, number),
        text_column is not None,
        group_column is not None,
        shared,
        left_out,
    )


def _part(source: Source, rows: Sequence[_Row], classes: Sequence[str], number: dict[str, int]) -> Part:
    place = {name: at for at, name in enumerate(classes)}
    return Part(
        Selected(source, [row.row for row in rows], problems=()),  # which are the whole source's
        np.array([place[row.label] for row in rows], np.int64),
        [row.texts for row in rows],
        np.array([number[row.group] for row in rows], np.int64),
    )


def _open(spec: str, split: str, names: tuple[str | None, ...], columns: dict[str, Any]) -> _Opened:
    label_column, text_column, group_column = names
    classes: list[str] = []
    if label_column is None and is_benchmark(Path(spec)):
        benchmark = open_benchmark(Path(spec), split)
        if benchmark.kind != "classification":
            raise ClipkitError(f"{spec} is a dataset for {benchmark.kind}; a probe needs one class per image")
        source, classes, truth = benchmark.source, benchmark.classes, benchmark.truth()
    else:
        source = open_source(spec, **columns)
        if label_column is not None:
            truth = None
        elif isinstance(source, FolderSource):
            classes, truth = class_folders(source)
        else:
            raise ClipkitError(f"{spec} has no folder per class; name the column of its labels: --label-column")
    wanted = [name for name in names if name is not None]
    opened = _Opened(source, [], classes, list(source.problems))
    seen: set[str] = set()
    met: set[str] = set()
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
            seen |= set(sample.columns)
            for name in wanted:
                found = _values(sample, name, columns.get("caption_column"))
                if found is not None:
                    met.add(name)
                    values[name] = found
        if truth is not None:
            label = None if truth[row] < 0 else classes[truth[row]]
            reason = "has no class: it stands in no class's folder, or no .cls says it"
        else:
            said = values.get(label_column or "", [])
            label = said[0] if len(said) == 1 else None
            reason = f"has {len(said) or 'no'} label{'s' * (len(said) > 1)} in column {label_column!r}"
        if label is None:
            opened.left_out.append({"row": row, "key": key, "reason": reason})
            continue
        group = " | ".join(values.get(group_column or "", [])) or key
        opened.rows.append(_Row(row, key, label, tuple(values.get(text_column or "", [])), group))
    for name in wanted:
        if name not in met:
            known = sorted(seen - {"path"})
            hint = did_you_mean(name, known)
            raise ClipkitError(f"{spec} says nothing under {name!r}{hint}; beside captions it has {', '.join(known)}")
    return opened


def _values(sample: Sample, name: str, caption_column: str | None) -> list[str] | None:
    """What a column says of a sample, without what is empty or said twice; None where there is no such column."""
    columns = sample.columns
    if name in RESERVED_COLUMNS and f"{name}_" in columns:  # see `own_columns`
        found = columns[f"{name}_"]
    elif name == caption_column or (name not in columns and name.lower() in CAPTION_COLUMNS):
        found = list(sample.captions)
    elif name in columns:
        found = columns[name]
    else:
        return None
    listed = found if isinstance(found, list) else [found]
    return list(dict.fromkeys(text for value in listed if value is not None and (text := str(value).strip())))


def _apart(train: _Opened, test: _Opened, grouped: bool) -> list[_Row]:
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
