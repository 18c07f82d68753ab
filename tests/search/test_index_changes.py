"""Changes of an index: what it answers after them, and what may happen in between."""

import contextlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.core import ClipkitError
from clipkit.embedding import Embeddings
from clipkit.search import (
    Index,
    SearchOptions,
    Wanted,
    ask,
    build_index,
    compact_index,
    delete_rows,
    go_back,
    update_index,
)
from clipkit.search.index_types import INDEX_TYPES, Effort
from clipkit.search.query import QueryPart
from clipkit.storage import hold
from tests.indexes import DIM, brute_force, make_embeddings, recall, unit, with_column


class Model:
    """The slow twin of a changing index: a dictionary of what should be found."""

    def __init__(self):
        self.versions = {}

    def vectors(self, tmp_path):
        """All rows that should be found, as embeddings of their own."""
        vectors, names = [], []
        for version in sorted(set(self.versions.values())):
            numbers = [n for n, v in self.versions.items() if v == version]
            made = make_embeddings(
                tmp_path / f"twin-{version}-{len(list(tmp_path.iterdir()))}", numbers, version=version
            )
            vectors.append(made.vectors())
            names += [f"{n:05d}.jpg" for n in numbers]
        return np.concatenate(vectors), np.array(names)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "replace", "sync", "delete", "where", "compact", "reopen", "back"]),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=6,
)


QUICK = ("Flat", "IVF-SQ8", "RaBitQ", "HNSW")  # one of each sort; each example builds some indexes


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in INDEX_TYPES])
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
def test_after_any_changes_it_answers_as_a_rebuild_does(kind, operations, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("changes")
    folder = tmp_path / "index"
    (tmp_path / "twins").mkdir()
    first = make_embeddings(tmp_path / "first", range(600))
    build_index([first], folder, Wanted(kind=kind, recall=0.9))
    state = Model()
    state.versions = dict.fromkeys(range(600), 0)
    history = [dict(state.versions)]
    for step, (what, seed) in enumerate(operations):
        rng = np.random.default_rng(seed)
        before = dict(state.versions)
        if what in ("add", "replace", "sync"):
            start = 600 if what == "add" else 0
            numbers = np.unique(rng.integers(start, start + 700, 150)).tolist()
            version = int(rng.integers(3))
            given_ = make_embeddings(tmp_path / f"e{step}", numbers, version=version)
            changed = update_index(folder, [given_], gone=what == "sync")
            if what == "sync":
                state.versions = {}
            state.versions |= dict.fromkeys(numbers, version)
            assert changed.added == len(set(numbers) - set(before))
            assert changed.replaced == sum(before.get(n, version) != version for n in numbers)
        elif what == "delete" and state.versions:
            opened = Index.open(folder)
            numbers = rng.choice(list(state.versions), min(len(state.versions), 40), replace=False).tolist()
            ids = {row["key"]: row["id"] for row in opened.rows(np.flatnonzero(_alive(opened)))}
            delete_rows(folder, [ids[f"{n:05d}.jpg"] for n in numbers])
            state.versions = {n: v for n, v in state.versions.items() if n not in numbers}
        elif what == "where":
            delete_rows(folder, where="odd and width < 300")
            state.versions = {n: v for n, v in state.versions.items() if not (n % 2 and n % 1000 < 300)}
        elif what == "compact":
            compact_index(folder)
        elif what == "back" and Index.open(folder).state.before is not None:
            go_back(folder)
            state.versions = history[-2] if len(history) > 1 else state.versions
        if state.versions != before or what == "compact":
            history.append(dict(state.versions))
        check(folder, state, tmp_path / "twins", kind)


def _alive(opened, side="image"):
    return np.concatenate([np.ones(s.rows, bool) if p is None else p.rows for s, p in opened.passing(side, None)])


def check(folder, state, twins, kind):
    opened = Index.open(folder)
    assert opened.count("image") == opened.count("text") == len(state.versions)
    if not state.versions:
        return
    vectors, names = state.vectors(twins)
    questions = unit(np.random.default_rng(3).normal(size=(20, DIM))).astype(np.float32)
    exact = opened.search(questions, 10, exact=True)
    wanted = -np.sort(-(questions @ vectors.T), axis=1)[:, :10]
    assert np.allclose(exact.scores, wanted, atol=1e-5)
    found = opened.search(questions, 10)
    seen = {row["key"] for row in opened.rows(found.positions.ravel())}
    assert seen <= set(names.tolist())
    share = (found.scores >= wanted[:, -1:] - 1e-5).mean()
    assert share == 1 if kind == "Flat" else share >= 0.6  # of random questions; the floor is of captions


def two(tmp_path, kind):
    """An index and embeddings that change half of it."""
    build_index([make_embeddings(tmp_path / "a", range(400))], tmp_path / "i", Wanted(kind=kind))
    return tmp_path / "i", make_embeddings(tmp_path / "b", range(200, 600), version=1)


def answers(folder, questions):
    opened = Index.open(folder)
    found = opened.search(questions, 10, exact=True)
    return [[row["caption"] for row in opened.rows(positions)] for positions in found.positions]


@pytest.mark.parametrize("kind", ["Flat", "IVF-SQ8"])
@pytest.mark.parametrize("moment", range(0, 30, 5))
def test_killed_in_the_middle_of_a_change_it_is_as_before_or_after(tmp_path, monkeypatch, kind, moment):
    """At each file that comes into place, or, later than all of them, not at all."""
    folder, newer = two(tmp_path, kind)
    questions = unit(np.random.default_rng(5).normal(size=(8, DIM))).astype(np.float32)
    before = answers(folder, questions)
    shutil.copytree(folder, tmp_path / "after")
    update_index(tmp_path / "after", [newer])
    after = answers(tmp_path / "after", questions)
    assert before != after
    moments = iter(range(moment + 1))
    rename = Path.replace

    def dies(self, target):
        if next(moments, None) is None:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with contextlib.suppress(KeyboardInterrupt):
            update_index(folder, [newer])
    assert answers(folder, questions) in (before, after)
    update_index(folder, [newer])
    assert answers(folder, questions) == after
    assert sorted(p.name for p in (folder / "segments").iterdir()) == ["000001", "000002"]


def test_a_change_that_changes_nothing_makes_no_generation(tmp_path):
    folder, newer = two(tmp_path, "Flat")
    assert update_index(folder, [newer]).generation == 2
    again = update_index(folder, [newer])
    assert again.nothing
    assert (again.generation, again.unchanged) == (2, 400)
    assert compact_index(folder).generation == 3
    assert compact_index(folder).generation == 3


def test_captions_and_metadata_are_changes_too(tmp_path):
    build_index([make_embeddings(tmp_path / "a", range(50), captions=2)], tmp_path / "i", Wanted(kind="Flat"))
    changed = update_index(tmp_path / "i", [make_embeddings(tmp_path / "b", range(50), captions=3)])
    assert (changed.replaced, changed.unchanged) == (50, 0)
    assert Index.open(tmp_path / "i").count("text") == 150
    table = make_embeddings(tmp_path / "c", range(50), captions=3)
    path = table.folder / "metadata" / "metadata_0000.parquet"
    rows = pq.read_table(path)
    widths = rows["width"].to_pylist()
    widths[7] = 12345
    pq.write_table(rows.set_column(rows.schema.get_field_index("width"), "width", pa.array(widths)), path)
    changed = update_index(tmp_path / "i", [Embeddings.open(table.folder)])
    assert (changed.replaced, changed.unchanged) == (1, 49)
    assert Index.open(tmp_path / "i").count("text", "width == 12345") == 3


def test_the_generation_before_can_be_gone_back_to_once(tmp_path):
    folder, newer = two(tmp_path, "RaBitQ")
    questions = unit(np.random.default_rng(5).normal(size=(8, DIM))).astype(np.float32)
    before = answers(folder, questions)
    update_index(folder, [newer], gone=True)
    assert answers(folder, questions) != before
    go_back(folder)
    assert answers(folder, questions) == before
    with pytest.raises(ClipkitError, match="no generation before"):
        go_back(folder)


def test_embeddings_that_are_exchanged_while_they_are_read_are_noticed(tmp_path):
    opened = make_embeddings(tmp_path / "emb", range(50))
    index = tmp_path / "index"
    build_index([opened], index)
    before = (index / "current.json").read_text()
    shutil.move(tmp_path / "emb", tmp_path / "old")
    make_embeddings(tmp_path / "emb", range(50), version=1)  # as long, so that every file fits
    with pytest.raises(ClipkitError, match=r"emb was changed while it was read; run this again"):
        build_index([opened], tmp_path / "other")
    with pytest.raises(ClipkitError, match=r"emb was changed while it was read; run this again"):
        update_index(index, [opened])
    assert (index / "current.json").read_text() == before
    assert update_index(index, [Embeddings.open(tmp_path / "emb")]).replaced == 50


def test_who_searches_is_not_disturbed_by_who_changes(tmp_path):
    """Sixteen threads ask with settings of their own while the index changes and is put together again."""
    folder, newer = two(tmp_path, "IVF-SQ8")
    questions = unit(np.random.default_rng(6).normal(size=(16, DIM))).astype(np.float32)
    opened = Index.open(folder)
    wanted = [brute_force(opened, questions, 5 + n, where="odd" if n % 2 else None)[0] for n in range(16)]
    stop, wrong = threading.Event(), []

    def asks(n):
        while not stop.is_set():
            where = "odd" if n % 2 else None
            mine = opened.search(questions, 5 + n, where=where, exact=n % 3 == 0, effort=Effort(16, 64, 200))
            if n % 3 == 0 and not np.allclose(mine.scores, wanted[n], atol=1e-5):
                wrong.append((n, "exact"))
            if (mine.scores >= wanted[n][:, -1:] - 1e-5).mean() < 0.9:
                wrong.append((n, "found too little"))
            newest = Index.open(folder)
            captions = [row["caption"] for row in newest.rows(newest.search(questions[:1], 5).positions[0])]
            if len(captions) != 5:
                wrong.append((n, captions))

    threads = [threading.Thread(target=asks, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for version in range(3):
        update_index(folder, [make_embeddings(tmp_path / f"v{version}", range(100, 300), version=version + 2)])
        delete_rows(folder, where="width < 20")
        compact_index(folder)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert newer.manifest["counts"]["images"] == 400


def test_two_do_not_change_it_at_once(tmp_path):
    folder, newer = two(tmp_path, "Flat")
    held = hold(folder, "changes")
    with pytest.raises(ClipkitError, match="another process changes"):
        update_index(folder, [newer])
    held.release()
    assert update_index(folder, [newer]).added == 200


def test_what_cannot_be_changed(tmp_path, refused, run):
    folder, newer = two(tmp_path, "Flat")
    with pytest.raises(ClipkitError, match="holds no image of id 5"):
        delete_rows(folder, [5])
    with pytest.raises(ClipkitError, match=f"no image of id {10**30}"):
        delete_rows(folder, [5, 10**30])
    with pytest.raises(ClipkitError, match="no column 'size'"):
        delete_rows(folder, where="size > 3")
    with pytest.raises(ClipkitError, match="more than once"):
        update_index(folder, [newer, newer])
    assert "name EMBEDDINGS, or one of" in refused("update", folder)
    assert "not in the EMBEDDINGS" in refused("update", folder, "--gone", "--compact")
    other = make_embeddings(tmp_path / "o", range(3))
    manifest = json.loads((other.folder / "manifest.json").read_text())
    manifest["model"]["fingerprint"] = "e" * 64
    (other.folder / "manifest.json").write_text(json.dumps(manifest))
    assert "of model ffffffffffff" in refused("update", folder, other.folder)
    assert run("update", folder, newer.folder, "--gone").status == 0
    assert "0 images" not in run("update", folder, "--delete-where", "odd").err
    assert run("update", folder, "--compact").status == 0
    assert run("update", folder, "--back").status == 0
    assert len(Index.open(folder)) == 200


def test_everything_taken_away(tmp_path):
    folder, newer = two(tmp_path, "IVF-SQ8")
    delete_rows(folder, where="True")
    opened = Index.open(folder)
    assert len(opened) == 0
    assert opened.search(np.ones((2, DIM)), 5).positions.shape == (2, 0)
    for fusion in ("early", "score", "rank"):
        parts = [QueryPart(np.ones(DIM)), QueryPart(np.arange(DIM))]
        assert ask(opened, parts, SearchOptions(5, fusion=fusion, collapse=0.9)).positions.shape == (1, 0)
    update_index(folder, [newer])
    assert len(Index.open(folder)) == 400


def test_columns_that_only_some_segments_have_are_missing_in_the_others(tmp_path, run):
    folder = tmp_path / "i"
    build_index([make_embeddings(tmp_path / "a", range(20))], folder, Wanted(kind="Flat"))
    newer = with_column(make_embeddings(tmp_path / "b", range(20, 30)), "my lang", ["en", None] * 5)
    update_index(folder, [with_column(newer, "width", [n + 0.5 for n in range(10)])])
    for _ in range(2):  # as it was changed, and put together
        opened = Index.open(folder)
        assert opened.positions(where='column("my lang") == "en"').tolist() == [20, 22, 24, 26, 28]
        assert opened.positions(where='column("my lang") is None and width > 8').tolist() == [*range(9, 20), 29]
        assert opened.count("text", '"e" in column("my lang")') == 5
        with pytest.raises(ClipkitError, match=r"no column 'size'; there are .*my lang"):
            opened.count("image", "size > 3")
        assert opened.rows([3])[0] == {**opened.rows([3, 29])[0], "my lang": None, "width": 3.0}
        compact_index(folder)
    vectors = "\n".join(json.dumps({"vector": row.tolist()}) for row in opened.vectors([3, 29]))
    (tmp_path / "q.jsonl").write_text(vectors)
    found = run("search", folder, "--file", tmp_path / "q.jsonl", "-k", 1, "--format", "csv")
    assert (found.status, found.out.count("\n")) == (0, 3)


def test_what_is_the_same_in_another_type_is_no_change(tmp_path):
    """Folders whose columns differ in type are kept as one type, and the same folders change nothing."""
    whole = make_embeddings(tmp_path / "a", range(20))
    halves = with_column(make_embeddings(tmp_path / "b", range(20, 40)), "width", [n + 0.5 for n in range(20)])
    texts = with_column(make_embeddings(tmp_path / "c", range(40, 60)), "odd", ["yes"] * 20)
    texts = with_column(texts, "width", [2**60 + n for n in range(20)])
    folder, sets = tmp_path / "i", [whole, halves, texts]
    build_index(sets, folder, Wanted(kind="Flat"))
    assert update_index(folder, sets).unchanged == 60
    assert update_index(folder, [whole]).nothing
    changed = with_column(make_embeddings(tmp_path / "d", range(20)), "width", [*range(19), 99])
    assert (update_index(folder, [changed]).replaced, update_index(folder, [changed, halves]).replaced) == (1, 0)


def test_an_index_of_images_is_not_changed_by_captions(tmp_path):
    folder, both = tmp_path / "i", make_embeddings(tmp_path / "b", range(20))
    build_index([make_embeddings(tmp_path / "a", range(20), sides=("image",))], folder, Wanted(kind="Flat"))
    assert update_index(folder, [both]).nothing
    with pytest.raises(ClipkitError, match="holds text vectors only"):
        update_index(folder, [make_embeddings(tmp_path / "c", range(20, 30), sides=("text",))])


def test_killed_with_lists_on_the_disk_a_change_goes_on_with_more_memory(tmp_path, monkeypatch):
    folder, newer = two(tmp_path, "IVF-SQ8")

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clipkit.search.quantize.lies_on_disk", lambda *_: True)
        patch.setattr("clipkit.search.update._measured", dies)
        with pytest.raises(KeyboardInterrupt):
            update_index(folder, [newer])
    assert list((folder / "segments" / "000002").glob("*.lists"))
    assert update_index(folder, [newer]).added == 200
    assert recall(Index.open(folder), newer.vectors("text")[::9], exact=True) == 1


@pytest.mark.parametrize("name", ["generations/000001.json", "segments/000001/image.vectors.faiss"])
def test_who_opens_it_while_it_changes_twice_gets_the_newest(tmp_path, monkeypatch, name):
    """At the moment before a file of the state that was read is opened, two changes have cleared it away."""
    folder, newer = two(tmp_path, "Flat")
    late = [newer]
    is_json = name.endswith(".json")
    read_file = Path.read_text if is_json else np.memmap

    def reads(path, *args, **options):
        if Path(path) == folder / name and late:
            update_index(folder, [late.pop()], gone=True)
            compact_index(folder)
            delete_rows(folder, where="width == 599")
            assert not (folder / name).exists()
        return read_file(path, *args, **options)

    monkeypatch.setattr(*((Path, "read_text") if is_json else (np, "memmap")), reads)
    assert len(Index.open(folder)) == 399
    assert not late


@pytest.mark.parametrize("keep", [0, 100])
def test_a_cut_array_of_a_changed_index_is_named(tmp_path, keep):
    folder, newer = two(tmp_path, "IVF-SQ8")
    delete_rows(folder, where="width < 10")
    for name, used in {
        "dead/000002-000001-image.npy": lambda: Index.open(folder),
        "queries/image.npy": lambda: update_index(folder, [newer]),
        "codings/000001/image.mean.npy": lambda: update_index(folder, [newer]),
    }.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:keep])
        with pytest.raises(ClipkitError, match=rf"{name} is .*cut or|{name} is missing or altered"):
            used()
        (folder / name).write_bytes(whole)
    assert update_index(folder, [newer]).added == 200


@pytest.mark.parametrize("sides", [("image",), ("image", "text")])
def test_after_a_change_the_recall_is_kept_with_captions_and_without(tmp_path, sides, capsys):
    folder = tmp_path / "i"
    build_index([make_embeddings(tmp_path / "a", range(2000), sides=sides)], folder, Wanted(kind="IVF-SQ8"))
    path = folder / "generations" / "000001.json"
    state = json.loads(path.read_text())
    state["efforts"]["image"] |= {"lists": 1, "rerank": 10}  # as if what is asked for had moved away
    path.write_text(json.dumps(state))
    asked = make_embeddings(tmp_path / "q", range(0, 2000, 9), version=1).vectors(sides[-1])
    assert recall(Index.open(folder), asked) < 0.8
    update_index(folder, [make_embeddings(tmp_path / "b", range(2000, 2100), sides=sides)])
    opened = Index.open(folder)
    assert opened.state.recall["image"] >= 0.95
    assert recall(opened, asked) >= 0.9
    assert "warning" not in capsys.readouterr().err
