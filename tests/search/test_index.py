"""The index under all its kinds: codes and re-ranking, filters, copies and pages."""

import json

import faiss
import numpy as np
import pyarrow as pa
import pytest

from clipkit.core import ClipkitError
from clipkit.search import Index, SearchOptions, Wanted, ask, build, build_index
from clipkit.search.index_types import INDEX_TYPES
from clipkit.search.query import QueryPart
from clipkit.search.vector_file import Vectors, write_vectors
from tests.indexes import DIM, brute_force, make_embeddings, recall, unit, with_column


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
EVERY = [pytest.param(kind, marks=pytest.mark.slow) if kind == "OPQ" else kind for kind in INDEX_TYPES]


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
    assert f"[{'|'.join(['auto', *INDEX_TYPES])}]" in offered


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


@pytest.mark.parametrize("where", [None, "width < 30", "width < 35 or odd"])
def test_copies_come_in_their_order_on_every_page(tmp_path, where, monkeypatch):
    """Few different vectors, many times each: whatever k is, the same rows lead, and none is on two pages."""
    monkeypatch.setattr("clipkit.search.segments.FEW_ROWS", 30)
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
    pages = [
        ask(opened, [QueryPart(questions[0])], SearchOptions(4, where=where, offset=at)).positions[0]
        for at in range(0, 60, 4)
    ]
    assert np.concatenate(pages).tolist() == wanted[0].tolist()


def test_copies_are_twins_and_what_has_no_value_is_none(tmp_path):
    made = make_embeddings(tmp_path / "e", range(40), dim=96)
    path = made.folder / "img_emb" / "img_emb_0000.npy"
    np.save(path, np.load(path)[np.arange(40) // 2])
    build_index([with_column(made, "tag", [None, "None", "a", "a"] * 10)], tmp_path / "i", Wanted(kind="Flat"))
    opened, parts = Index.open(tmp_path / "i"), [QueryPart(np.ones(96))]
    assert sorted(ask(opened, parts, SearchOptions(40, collapse=1.0)).positions[0].tolist()) == list(range(0, 40, 2))
    tags = [row["tag"] for row in ask(opened, parts, SearchOptions(40, collapse="tag")).rows[0]]
    assert (tags.count(None), tags.count("None"), tags.count("a")) == (10, 1, 1)


def test_a_build_leaves_the_memory_pool_of_arrow_as_it_was(tmp_path, monkeypatch):
    before, within = pa.default_memory_pool(), []
    write = build._write_first

    def writing(*args):
        within.append(pa.default_memory_pool().backend_name)
        return write(*args)

    monkeypatch.setattr(build, "_write_first", writing)
    made = make_embeddings(tmp_path / "e", range(4))
    build_index([made], tmp_path / "i", Wanted(kind="Flat"))
    assert within == ["system", "system"]
    assert pa.default_memory_pool().backend_name == before.backend_name
    with pytest.raises(ClipkitError, match="more than once"):
        build_index([made, made], tmp_path / "j", Wanted(kind="Flat"))
    assert pa.default_memory_pool().backend_name == before.backend_name


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
