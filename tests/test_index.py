"""The index under all its kinds: codes and re-ranking, filters, changes, and what may happen in between."""

import contextlib
import json
import shutil
import threading
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.artifact import Stage, hold
from clipkit.embeddings import Embedded, Embeddings, write_part
from clipkit.errors import ClipkitError
from clipkit.search import KINDS, Effort, Index, Part, Wanted, ask, build_index
from clipkit.search.update import compact_index, delete_rows, go_back, update_index
from clipkit.search.vectors import Vectors, write_vectors
from clipkit.sources import Sample

DIM = 32


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_embeddings(folder, numbers, *, version=0, captions=1, dim=DIM, sides=("image", "text")):
    """Embeddings of made-up images around shared topics, texts a constant offset away; the version moves them."""
    topics = np.random.default_rng(0).normal(size=(40, dim))
    image, text, samples, told, owner = [], [], [], [], []
    for row, number in enumerate(numbers):
        rng = np.random.default_rng([number, version])
        topic = topics[number % 40]
        image.append(topic + 1.2 * rng.normal(size=dim) + 3)
        samples.append(
            Sample(
                f"{number:05d}.jpg",
                None,
                "jpg",
                (f"picture {number} {version}",),
                {"width": number % 1000, "odd": number % 2 == 1},
            )
        )
        for which in range(captions):
            text.append(topic + 1.2 * rng.normal(size=dim) - 3)
            told.append(f"picture {number} {version} {which}")
            owner.append(row)
    found = Embedded(
        unit(np.array(image).reshape(-1, dim)),
        unit(np.array(text).reshape(-1, dim)),
        samples,
        told,
        np.array(owner, np.int64),
    )
    stage = Stage(
        folder, "embeddings", {"numbers": [int(n) for n in numbers], "version": version, "captions": captions}
    )
    write_part(folder, "0000", found, sides)
    stage.commit(
        model={"fingerprint": "f" * 64},
        source="made up",
        sides=list(sides),
        dim=dim,
        dtype="float16",
        counts={"images": len(samples), "captions": len(told), "left_out": 0, "parts": 1},
        parts=[{"name": "0000", "images": len(samples), "captions": len(told)}],
    )
    return Embeddings.open(folder)


def brute_force(opened, queries, k, side="image", where=None):
    """The slow twin: all vectors of all rows that may be found, one product, one sort."""
    rows = []
    start = 0
    for segment, passing in opened.passing(side, where):
        chosen = np.arange(segment.rows) if passing is None else passing.numbers
        rows.append(chosen + start)
        start += segment.rows
    rows = np.concatenate(rows)
    scores = queries @ opened.vectors(rows, side).astype(np.float32).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), rows[order]


def recall(opened, queries, k=10, side="image", where=None, **how):
    found = opened.search(queries, k, side, where=where, **how)
    exact, _ = brute_force(opened, queries, k, side, where)
    return (
        (found.scores[:, : exact.shape[1]] >= exact[:, -1:] - 1e-5).mean()
        * min(k, found.scores.shape[1])
        / max(1, exact.shape[1])
    )


@pytest.fixture(scope="module")
def thousands(tmp_path_factory):
    return make_embeddings(tmp_path_factory.mktemp("many") / "emb", range(6000))


@pytest.fixture(scope="module")
def indexes(thousands, tmp_path_factory):
    """Gives an index of a kind over the same 6,000 images; each is built once."""
    folder = tmp_path_factory.mktemp("kinds")

    def of(kind):
        if not (folder / kind).exists():
            build_index([thousands], folder / kind, Wanted(kind=kind, recall=0.95))
        return folder / kind

    return of


# A rotation that is learned takes its time.
EVERY = [pytest.param(kind, marks=pytest.mark.slow) if kind == "OPQ" else kind for kind in KINDS]


@pytest.fixture(scope="module")
def questions(thousands):
    return thousands.vectors("text")[::61]


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_finds_what_was_wanted(indexes, questions, kind):
    opened = Index.open(indexes(kind))
    assert opened.state.kinds == {"image": kind, "text": kind}
    found = recall(opened, questions)
    assert found == 1 if kind == "Flat" else found >= 0.93
    assert recall(opened, questions, exact=True) == 1
    told = json.loads((indexes(kind) / "manifest.json").read_text())["chosen"]["image"]
    assert told["recall"] >= 0.93


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("where", ["width == 7", "width < 10", "odd", "width >= 0", "width > 99999"])
def test_filtered_it_finds_what_brute_force_finds(indexes, questions, kind, where):
    opened = Index.open(indexes(kind))
    found = opened.search(questions, 10, where=where)
    allowed = np.concatenate([p.rows for _, p in opened.passing("image", where)])
    assert allowed[found.positions[found.positions >= 0]].all()
    exact, rows = brute_force(opened, questions, 10, where=where)
    if not rows.size:
        assert (found.positions == -1).all()
        return
    count = min(10, int(allowed.sum()))
    assert (found.positions[:, :count] >= 0).all()
    share = (found.scores[:, :count] >= exact[:, count - 1 : count] - 1e-5).mean()
    assert share == 1 if kind == "Flat" or allowed.mean() < 0.1 else share >= 0.93


def test_the_command_offers_every_kind(run):
    offered = "".join(run("build", "--help").out.split())
    assert f"[{'|'.join(['auto', *KINDS])}]" in offered


@pytest.mark.parametrize("k", [1, 10, 100, 6001])
def test_more_results_are_found_as_surely(indexes, questions, k):
    opened = Index.open(indexes("RaBitQ"))
    found = opened.search(questions, k)
    assert found.scores.shape == (len(questions), min(k, 6000))
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert all(len(set(row)) == len(row) for row in found.positions.tolist())
    assert recall(opened, questions, k) >= 0.93


def test_the_vectors_file_is_what_faiss_writes(tmp_path):
    rows = unit(np.random.default_rng(1).normal(size=(77, 24)).astype(np.float32)).astype(np.float16)
    assert write_vectors(tmp_path / "a", iter([rows[:30], rows[30:30], rows[30:]]), 24) == 77
    twin = faiss.IndexScalarQuantizer(24, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    twin.add(rows.astype(np.float32))
    faiss.write_index(twin, str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.array_equal(Vectors(tmp_path / "a", 77, 24).rows, rows)
    with pytest.raises(ClipkitError, match="77 vectors of dimension 24 where 78"):
        Vectors(tmp_path / "a", 78, 24)
    rows[50, 3] = np.inf
    with pytest.raises(ClipkitError, match="first in row 50"):
        write_vectors(tmp_path / "c", iter([rows[:30], rows[30:]]), 24)
    assert not (tmp_path / "c").exists()


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


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
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
        parts = [Part(np.ones(DIM)), Part(np.arange(DIM))]
        assert ask(opened, parts, 5, fusion=fusion, collapse=0.9).positions.shape == (1, 0)
    update_index(folder, [newer])
    assert len(Index.open(folder)) == 400


@pytest.mark.parametrize("where", [None, "width < 30", "width < 35 or odd"])
def test_copies_come_in_their_order_on_every_page(tmp_path, where, monkeypatch):
    """Few different vectors, many times each: whatever k is, the same rows lead, and none is on two pages."""
    monkeypatch.setattr("clipkit.search.segments.FEW", 30)
    made = make_embeddings(tmp_path / "e", range(60))
    path = made.folder / "img_emb" / "img_emb_0000.npy"
    np.save(path, np.load(path)[np.random.default_rng(0).integers(0, 6, 60)])
    build_index([made], tmp_path / "i", Wanted(kind="Flat"))
    opened = Index.open(tmp_path / "i")
    questions = unit(np.random.default_rng(7).normal(size=(9, DIM))).astype(np.float32)
    chosen = opened.positions(where=where)
    scores = questions.astype(np.float64) @ opened.vectors(chosen).astype(np.float64).T
    wanted = chosen[np.argsort(-scores.round(9), axis=1, kind="stable")]  # a product differs in its last digit
    for k in (1, 3, 10, 25, wanted.shape[1]):
        assert np.array_equal(opened.search(questions, k, where=where).positions, wanted[:, :k]), k
    pages = [ask(opened, [Part(questions[0])], 4, where=where, offset=at).positions[0] for at in range(0, 60, 4)]
    assert np.concatenate(pages).tolist() == wanted[0].tolist()


def with_column(made, name, values):
    """Embeddings whose images have a column more, or another one of this name."""
    path = made.folder / "metadata" / "metadata_0000.parquet"
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns([name])
    pq.write_table(table.append_column(name, pa.array(values)), path)
    return Embeddings.open(made.folder)


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
        patch.setattr("clipkit.search.coding.lies_on_disk", lambda *_: True)
        patch.setattr("clipkit.search.update._measured", dies)
        with pytest.raises(KeyboardInterrupt):
            update_index(folder, [newer])
    assert list((folder / "segments" / "000002").glob("*.lists"))
    assert update_index(folder, [newer]).added == 200
    assert recall(Index.open(folder), newer.vectors("text")[::9], exact=True) == 1


def test_copies_are_twins_and_what_has_no_value_is_none(tmp_path):
    made = make_embeddings(tmp_path / "e", range(40), dim=96)
    path = made.folder / "img_emb" / "img_emb_0000.npy"
    np.save(path, np.load(path)[np.arange(40) // 2])
    build_index([with_column(made, "tag", [None, "None", "a", "a"] * 10)], tmp_path / "i", Wanted(kind="Flat"))
    opened, parts = Index.open(tmp_path / "i"), [Part(np.ones(96))]
    assert sorted(ask(opened, parts, 40, collapse=1.0).positions[0].tolist()) == list(range(0, 40, 2))
    tags = [row["tag"] for row in ask(opened, parts, 40, collapse="tag").rows[0]]
    assert (tags.count(None), tags.count("None"), tags.count("a")) == (10, 1, 1)


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


@pytest.mark.parametrize("fmt", ["json", "jsonl"])
def test_what_is_written_as_json_is_json(tmp_path, run, fmt):
    made = with_column(make_embeddings(tmp_path / "e", range(4)), "share", [np.inf, -np.inf, np.nan, 0.5])
    build_index([made], tmp_path / "i", Wanted(kind="Flat"))
    assert Index.open(tmp_path / "i").positions(where="share > 0").tolist() == [0, 3]
    np.save(tmp_path / "q.npy", np.ones(DIM))
    out = run("search", tmp_path / "i", "--vector", tmp_path / "q.npy", "--format", fmt).out
    lines = [out] if fmt == "json" else out.splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    rows = found[0] if fmt == "json" else found
    assert {row["key"]: row["share"] for row in rows}["00003.jpg"] == 0.5
    assert [row["share"] for row in rows].count(None) == 3
