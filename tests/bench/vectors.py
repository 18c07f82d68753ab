"""Cross-modal vectors without a model: images and texts around shared topics, and a gap between the two.

``image = unit(topic + noise + offset)`` and ``text = unit(topic + noise' - offset)``, each with its own noise. Topics
are many and unlike in size (a few make up most images, as in the world), noise has as much power as the topic, and the
offset is constant, as Liang et al. 2022 found between the modalities of CLIP. Any block can be made by itself.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

TOPICS = 20_000
NOISE = 1.0  # power of a vector's own part to that of its topic
GAP = 1.0  # power of the constant offset to that of the topic
BLOCK = 50_000


class World:
    """Topics and the offset of a dimension, by seed."""

    def __init__(self, dim: int, seed: int = 0):
        rng = np.random.default_rng([seed, dim])
        # Embeddings fill a space of far fewer dimensions than they have: powers fall off over the axes.
        self.axes = (1 + np.arange(dim, dtype=np.float32) / 32) ** -0.75
        self.axes /= np.sqrt((self.axes**2).sum())
        self.topics = rng.standard_normal((TOPICS, dim), dtype=np.float32) * self.axes
        self.offset = rng.standard_normal(dim, dtype=np.float32) * self.axes
        share = 1 / np.arange(1, TOPICS + 1) ** 0.7
        self.share = np.cumsum(share / share.sum())
        self.seed, self.dim = seed, dim

    def block(self, side: str, number: int, rows: int = BLOCK) -> np.ndarray:
        """Block `number` of a side, float16 ``[rows, dim]``, unit norm; rows of both sides belong together."""
        topic = np.searchsorted(self.share, np.random.default_rng([self.seed, 1, number]).random(rows))
        own = np.random.default_rng([self.seed, 2 if side == "image" else 3, number])
        sign = 1 if side == "image" else -1
        vectors = own.standard_normal((rows, self.dim), dtype=np.float32)
        vectors *= self.axes * np.float32(NOISE**0.5)
        vectors += self.topics[np.minimum(topic, TOPICS - 1)] + np.float32(sign * GAP**0.5) * self.offset
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors.astype(np.float16)

    def blocks(self, side: str, rows: int) -> Iterator[np.ndarray]:
        """So many rows of a side, block by block."""
        for number, start in enumerate(range(0, rows, BLOCK)):
            yield self.block(side, number)[: rows - start]


def write_embeddings(folder: Path, rows: int, dim: int, queries: int, seed: int = 0) -> None:
    """An embeddings artifact of images, and of captions for the first few; metadata are a number and a width."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clipkit.embedding.store import table_path, vectors_path
    from clipkit.storage import Stage

    world = World(dim, seed)
    stage = Stage(folder, "embeddings", {"rows": rows, "dim": dim, "queries": queries, "seed": seed}, overwrite=True)
    if stage.done:
        return
    parts = []
    for number, images in enumerate(world.blocks("image", rows)):
        name, start = f"{number:04d}", number * BLOCK
        ids = np.arange(start, start + len(images))
        table = {
            "id": ids,
            "key": [f"{i:09d}.jpg" for i in ids],
            "image_path": [f"{i:09d}.jpg" for i in ids],
            "caption": pa.nulls(len(ids), pa.string()),
            "width": ids % 1000,
        }
        for path, writes in (
            (table_path(folder, "image", name), lambda p, table=table: pq.write_table(pa.table(table), p)),
            (vectors_path(folder, "image", name), lambda p, images=images: np.save(p, images)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            writes(path)
        count = min(len(ids), max(0, queries - start))
        if count:
            own = {
                "caption": [f"caption {i}" for i in ids[:count]],
                "image_id": ids[:count],
                "image_row": np.arange(count),
            }
            for path in (table_path(folder, "text", name), vectors_path(folder, "text", name)):
                path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(own), table_path(folder, "text", name))
            np.save(vectors_path(folder, "text", name), world.block("text", number)[:count])
        parts.append({"name": name, "images": len(ids), "captions": count})
    stage.commit(
        model={"fingerprint": "made-up" + "0" * 57},
        source="tests/bench/vectors.py",
        sides=["image", "text"],
        dim=dim,
        dtype="float16",
        counts={"images": rows, "captions": queries, "left_out": 0, "parts": len(parts)},
        parts=parts,
    )
