"""Embeddings of made-up images and captions, for the tests of indexes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.data.sources import Sample
from clipkit.embedding import Embedded, Embeddings
from clipkit.embedding.store import write_part
from clipkit.storage import Stage

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


def with_column(made, name, values):
    """Embeddings whose images have a column more, or another one of this name."""
    path = made.folder / "metadata" / "metadata_0000.parquet"
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns([name])
    pq.write_table(table.append_column(name, pa.array(values)), path)
    return Embeddings.open(made.folder)
