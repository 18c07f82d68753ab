"""Codes: built in memory or in pieces on the disk they find the same, and a build stays within its memory."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.core import ClipkitError
from clipkit.embedding.store import part_table_path, part_vectors_path
from clipkit.search import Wanted, build_index
from clipkit.search.autotune import Goal, choose
from clipkit.search.index_types import INDEX_TYPES, Effort, lists_for, parameters
from clipkit.search.quantize import Coding, encode, learn_lists, read_codes, sample_rows, train_coding
from clipkit.search.recall import Queries, Truth, measure_recall, tune, tune_and_measure
from clipkit.search.vector_file import Vectors, write_vectors
from tests.indexes import make_embeddings

ROWS, DIM = 3000, 24
# Learning 256 centres for each part of a vector takes its time.
IN_LISTS = [
    "IVF-Flat",
    "IVF-SQ8",
    "RaBitQ",
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("IVF-PQ", "OPQ")),
]
SMALL = 100_000  # bytes: less than any kind's codes take while they are made


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.faiss"
    rng = np.random.default_rng(0)
    write_vectors(path, [unit(rng.normal(size=(ROWS, DIM)) + 2)], DIM)
    return Vectors(path, ROWS, DIM)


@pytest.fixture(scope="module")
def questions():
    return unit(np.random.default_rng(1).normal(size=(50, DIM)) - 1)


@pytest.mark.parametrize("kind", IN_LISTS)
def test_in_pieces_on_the_disk_it_is_the_same_index(vectors, questions, tmp_path, kind):
    chosen = INDEX_TYPES[kind]
    train_coding(vectors, chosen, tmp_path / "coding.faiss", rows=ROWS, memory=SMALL, on_disk=True)
    coding = Coding(tmp_path / "coding.faiss")
    for name, memory in (("small", SMALL), ("large", 2**30)):
        (tmp_path / name).mkdir()
        encode(coding, chosen, vectors, tmp_path / name / "codes.faiss", memory=memory)
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["codes.faiss", "codes.lists"]
    assert sorted(p.name for p in (tmp_path / "large").iterdir()) == ["codes.faiss"]
    shutil.move(tmp_path / "small", tmp_path / "moved")
    effort = Effort(16, 16, 100)
    found = []
    for name in ("moved", "large"):
        codes = read_codes(tmp_path / name / "codes.faiss", ROWS)
        found.append(codes.search(questions, 20, params=parameters(codes, effort)))
    # Blocks differ in size, so the last digit of a vector that was turned may decide between two codes.
    assert np.isclose(found[0][0], found[1][0], atol=1e-6).mean() > 0.99
    assert (found[0][1] == found[1][1]).mean() > 0.99  # equal scores come in the order of the lists


def test_codes_that_were_not_learned_for_the_disk_are_refused_where_the_memory_does_not_hold_them(vectors, tmp_path):
    train_coding(vectors, INDEX_TYPES["IVF-PQ"], tmp_path / "coding.faiss", rows=ROWS, memory=2**30)
    with pytest.raises(ClipkitError, match="give --memory more"):
        encode(
            Coding(tmp_path / "coding.faiss"), INDEX_TYPES["IVF-PQ"], vectors, tmp_path / "codes.faiss", memory=SMALL
        )
    assert not (tmp_path / "codes.faiss").exists()


def test_a_graph_that_does_not_fit_is_refused_with_what_it_takes(vectors, tmp_path):
    train_coding(vectors, INDEX_TYPES["HNSW"], tmp_path / "coding.faiss", rows=ROWS, memory=SMALL)
    with pytest.raises(ClipkitError, match="give --memory more, or build a kind with lists"):
        encode(Coding(tmp_path / "coding.faiss"), INDEX_TYPES["HNSW"], vectors, tmp_path / "codes.faiss", memory=SMALL)
    assert not (tmp_path / "codes.faiss").exists()


@pytest.mark.parametrize("kind", ["IVF-PQ", "OPQ", "RaBitQ"])
def test_lists_learned_once_serve_every_kind(vectors, questions, tmp_path, kind):
    """Turned with the vectors, they are the lists that the vectors fall into: those nearest are in the first lists."""
    lists = learn_lists(vectors, lists_for(ROWS), 2**30)
    train_coding(vectors, INDEX_TYPES[kind], tmp_path / "coding.faiss", rows=ROWS, memory=2**30, lists=lists)
    encode(Coding(tmp_path / "coding.faiss"), INDEX_TYPES[kind], vectors, tmp_path / "codes.faiss", memory=2**30)
    codes = read_codes(tmp_path / "codes.faiss", ROWS)
    centred = vectors.rows.astype(np.float32) - vectors.rows.astype(np.float32).mean(axis=0)
    by_hand = np.argmax(centred @ lists.T, axis=1)
    own = centred[:200]
    _, rows = codes.search(own, 2000, params=parameters(codes, Effort(1)))
    for question, found in enumerate(rows):
        assert set(by_hand[found[found >= 0]]) == {by_hand[question]}


def test_recall_is_the_share_of_the_best_that_were_found(vectors, questions):
    truth = Truth(vectors, Queries(questions, ""))
    exact = questions @ vectors.rows.astype(np.float32).T
    ordered = -np.sort(-exact, axis=1)
    assert np.allclose(truth.worst[:, 0], ordered[:, 9], atol=1e-5)
    assert truth.recall(ordered[:, :10]) == 1
    assert truth.recall(ordered[:, 5:15]) == 0.5
    assert truth.recall(ordered[:, 10:20]) == 0
    own = np.arange(0, ROWS, 60)
    alone = Truth(vectors, Queries(vectors.rows[own].astype(np.float32), "", own))
    others = vectors.rows[own].astype(np.float32) @ vectors.rows.astype(np.float32).T
    others[np.arange(len(own)), own] = -np.inf
    assert np.allclose(alone.worst[:, 0], -np.sort(-others, axis=1)[:, 9], atol=1e-5)


def test_the_least_effort_that_reaches_the_floor(vectors, questions, tmp_path):
    kind = INDEX_TYPES["IVF-SQ8"]
    train_coding(vectors, kind, tmp_path / "coding.faiss", rows=ROWS, memory=2**30)
    encode(Coding(tmp_path / "coding.faiss"), kind, vectors, tmp_path / "codes.faiss", memory=2**30)
    codes, truth = read_codes(tmp_path / "codes.faiss", ROWS), Truth(vectors, Queries(questions, ""))
    little, recall_of_little = tune(codes, vectors, truth, 0.3)
    much, recall_of_much = tune(codes, vectors, truth, 0.99)
    assert recall_of_little >= 0.3
    assert recall_of_much >= 0.99
    assert little.lists < much.lists
    assert measure_recall(codes, vectors, truth, much)[0] == pytest.approx(recall_of_much)
    told, recall, _ = tune_and_measure(codes, vectors, truth, 0.9)
    assert recall == measure_recall(codes, vectors, truth.half(1), told)[0] >= 0.9  # with queries it was not tuned with
    assert tune(codes, vectors, truth, 1.1)[1] >= recall_of_much  # which nothing reaches: the most that there is


def test_what_does_not_fit_into_the_memory_it_is_served_from_is_not_tried(vectors, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.search.autotune.SMALL", 0)
    kinds = [INDEX_TYPES[kind] for kind in ("Flat", "IVF-SQ8", "RaBitQ", "HNSW")]
    queries = Queries(questions, "")
    there = []
    monkeypatch.setattr("clipkit.search.autotune.note", lambda _: there.extend((tmp_path / "a").rglob("codes.faiss")))
    free = choose(vectors, queries, Goal(0.9, 2**30), kinds, tmp_path / "a")
    assert there == []  # each kind's goes before the next is built
    assert [each.kind for each in free.tried] == ["Flat", "IVF-SQ8", "RaBitQ", "HNSW"]
    reached = [each for each in free.tried if each.recall >= 0.9]
    assert free.kind.name == max(reached, key=lambda each: each.queries_per_second).kind
    tight = choose(vectors, queries, Goal(0.9, 2**30, 25 * ROWS), kinds, tmp_path / "b")
    assert [each.kind for each in tight.tried] == ["RaBitQ"]
    with pytest.raises(ClipkitError, match="as RaBitQ, the smallest"):
        choose(vectors, queries, Goal(0.9, 2**30, 10 * ROWS), kinds, tmp_path / "c")
    assert not list((tmp_path / "a").iterdir())


def test_kinds_are_compared_on_a_sample_of_many(vectors, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.search.autotune.SMALL", 0)
    monkeypatch.setattr("clipkit.search.autotune.PILOT", 1000)
    own = sample_rows(ROWS, 60, seed=3)
    for queries in (Queries(questions, ""), Queries(vectors.rows[own].astype(np.float32), "", own)):
        found = choose(vectors, queries, Goal(0.9, 2**30), [INDEX_TYPES["IVF-SQ8"]], tmp_path)
        (tried,) = found.tried
        assert 940 <= tried.vectors <= 1000
        assert tried.note == f"on a sample of {tried.vectors:,}"
        assert found.recall > 0.8


BUILD = """
import sys
from clipkit.cli import main
main(["build", *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["auto", "IVF-SQ8", "RaBitQ"])
def test_a_build_of_a_million_stays_within_a_third_of_its_data(tmp_path, kind):
    """Measured from outside, beyond an empty process with the same imports; the vectors themselves are 256 MB."""
    rows, dim = 1_000_000, 128
    make_embeddings(tmp_path / "emb", [0], dim=dim)
    grow(tmp_path / "emb", rows, dim)
    memory = rows * dim * 2 // 3
    idle = peak([sys.executable, "-c", "import clipkit.search.build, clipkit.core.figures, faiss, matplotlib.pyplot"])
    flags = ["--memory", str(memory), "--kind", kind, "--out", str(tmp_path / "index")]
    used = peak([sys.executable, "-c", BUILD, str(tmp_path / "emb"), *flags])
    assert used - idle < memory, (used, idle, memory)
    assert (tmp_path / "index" / "manifest.json").is_file()


def grow(folder, rows, dim, part=50_000):
    """Make an embeddings folder hold so many images."""
    rng = np.random.default_rng(0)
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = [{"name": f"{n:04d}", "images": part, "captions": 0} for n in range(rows // part)]
    for number, each in enumerate(parts):
        vectors = unit(rng.normal(size=(part, dim)) + 1).astype(np.float16)
        np.save(part_vectors_path(folder, "image", each["name"]), vectors)
        ids = np.arange(number * part, (number + 1) * part)
        names = ids.astype(str)
        table = {"id": ids, "key": names, "image_path": names, "caption": pa.nulls(part, pa.string())}
        pq.write_table(pa.table(table), part_table_path(folder, "image", each["name"]))
    manifest |= {"sides": ["image"], "parts": parts, "counts": {**manifest["counts"], "images": rows, "captions": 0}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def peak(command):
    """The most anonymous memory of a process, in bytes."""
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, stderr=subprocess.DEVNULL)
    most = 0
    try:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            most = max([most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.01)
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
    return most


@pytest.mark.parametrize("kind", ["IVF-PQ", "OPQ", "RaBitQ"])
@pytest.mark.parametrize("rows", [2, 17])
def test_of_fewer_vectors_than_dimensions_every_kind_can_be_built(vectors, tmp_path, kind, rows):
    dim = vectors.rows.shape[1]
    few = Vectors(tmp_path / "v", write_vectors(tmp_path / "v", [vectors.rows[:rows]], dim), dim)
    train_coding(few, INDEX_TYPES[kind], tmp_path / "coding.faiss", rows=rows, memory=2**30)
    encode(Coding(tmp_path / "coding.faiss"), INDEX_TYPES[kind], few, tmp_path / "codes.faiss", memory=2**30)
    codes = read_codes(tmp_path / "codes.faiss", rows)
    _, found = codes.search(few.rows[:].astype(np.float32), rows)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(rows), (rows, 1)))


@pytest.mark.parametrize(("memory", "size"), [(2**30, 90_000), (SMALL, 1_000), (SMALL, 60_000)])
def test_where_the_disk_is_full_it_is_said_and_nothing_is_left(vectors, tmp_path, memory, size):
    """The codes take 96,000 bytes: in one file, or in pieces first and in lists then."""
    kind, codes = INDEX_TYPES["IVF-SQ8"], tmp_path / "c" / "codes.faiss"
    train_coding(vectors, kind, tmp_path / "coding.faiss", rows=ROWS, memory=2**30)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(ClipkitError, match=r"^cannot write [^\n]*$"):
            encode(Coding(tmp_path / "coding.faiss"), kind, vectors, codes, memory=memory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "c").iterdir()} <= {"codes.lists"}


@pytest.mark.parametrize(
    ("kind", "memory", "each"),
    [("Flat", 2**30, 48), ("IVF-Flat", 2**30, 48 + 56), ("IVF-Flat", 100_000, 48 + 2 * 56), ("HNSW", 2**30, 48 + 292)],
)
def test_a_disk_that_does_not_hold_an_index_is_told_before(tmp_path, monkeypatch, kind, memory, each):
    """Vectors of 2 bytes a dimension, codes with what a kind keeps beside them, and in pieces these are there twice."""
    made = make_embeddings(tmp_path / "e", range(3000), dim=24, sides=("image",))
    made.manifest["counts"]["captions"] = 0
    tables = sum(path.stat().st_size for name in ("metadata", "captions") for path in made.folder.glob(f"{name}/*"))
    usage = shutil.disk_usage(tmp_path)
    free = 3000 * each + 4 * tables
    monkeypatch.setattr("clipkit.search.build.shutil.disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(ClipkitError, match="make room"):
        build_index([made], tmp_path / "i", Wanted(kind=kind, memory=memory))
    monkeypatch.setattr("clipkit.search.build.shutil.disk_usage", lambda _: usage._replace(free=free))
    monkeypatch.setattr("clipkit.search.build._write_first", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it begins
        build_index([made], tmp_path / "i", Wanted(kind=kind, memory=memory))
