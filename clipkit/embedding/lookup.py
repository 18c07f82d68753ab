"""A teacher's stored embeddings, looked up for the samples of a training batch.

`clipkit embed SHARDS --model TEACHER` has written them once; training on the same shards then needs no teacher in
memory. Images are found by id, captions by id among those of their image. The tables of ids are 32 bytes per image and
8 per caption; the vectors stay on the disk (memory-mapped).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from clipkit.core import SIDES, ClipkitError, Side
from clipkit.data.sources import text_id
from clipkit.embedding.store import Embeddings, part_table_path

__all__ = ["TeacherEmbeddings"]


class TeacherEmbeddings:
    """Embeddings of images and captions by their ids, as `clipkit.training.batches.Batch` has them.

    Args:
        embeddings: of both sides.

    Raises:
        ClipkitError: where one side is missing, vectors are not float16, or a file is missing or broken.
    """

    def __init__(self, embeddings: Embeddings):
        self.folder = embeddings.folder
        self.fingerprint = embeddings.fingerprint
        """Of the teacher."""
        self.dim: int = embeddings.manifest["dim"]
        """Of its vectors."""
        self._parts = embeddings.manifest["parts"]
        missing = [side for side in SIDES if side not in embeddings.sides]
        if missing:
            raise ClipkitError(
                f"{self.folder} has no {missing[0]} embeddings, a teacher needs both; embed captioned images with "
                "--sides both"
            )
        if embeddings.manifest["dtype"] != "float16":
            raise ClipkitError(f"{self.folder} holds {embeddings.manifest['dtype']}, a teacher is stored as float16")
        self._blocks = {side: list(embeddings.blocks(side)) for side in SIDES}
        self._ends = {side: np.cumsum([len(block) for block in self._blocks[side]]) for side in SIDES}
        ids, counts, self._text_ids = self._read_ids()
        self._starts = np.cumsum([0, *counts])  # of each image's captions
        self._order = np.argsort(ids)
        self._ids = ids[self._order]

    @classmethod
    def open(cls, folder: str | Path) -> "TeacherEmbeddings":
        """Open what `clipkit embed` has made of the shards that are trained on; seconds per million captions.

        Raises:
            ClipkitError: where it is missing, unfinished, of another kind, or no teacher (see the class).
        """
        return cls(Embeddings.open(folder))

    def _read_ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of the images, how many captions each has, and ids of the captions; int64, in row order."""
        ids, counts, texts = [], [], []
        for part in self._parts:
            ids.append(self._column(part, "image", "id").to_numpy())
            owners = self._column(part, "text", "image_row").to_numpy() if part["captions"] else np.zeros(0, np.int64)
            counts.append(np.bincount(owners, minlength=part["images"]))
            if part["captions"]:
                captions = self._column(part, "text", "caption").to_pylist()
                texts.append(np.fromiter(map(text_id, captions), np.int64, len(captions)))
        return np.concatenate(ids), np.concatenate(counts), np.concatenate(texts)

    def _column(self, part: dict[str, Any], side: Side, name: str) -> pa.ChunkedArray:
        path = part_table_path(self.folder, side, part["name"])
        try:
            column = pq.read_table(path, columns=[name])[name]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ClipkitError(f"{path} is missing or broken ({' '.join(str(error).split())[:200]})") from error
        rows = part["images" if side == "image" else "captions"]
        if len(column) != rows:
            raise ClipkitError(f"{path} has {len(column)} rows, the manifest says {rows}")
        return column

    def rows(self, image_ids: np.ndarray) -> np.ndarray:
        """Rows of the images, -1 where there is none; int64 ``[n]``."""
        if not len(self._ids):
            return np.full(len(image_ids), -1)
        at = np.minimum(np.searchsorted(self._ids, image_ids), len(self._ids) - 1)
        return np.where(self._ids[at] == image_ids, self._order[at], -1)

    def _caption_rows(self, rows: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """For each image's row the row of the first of its captions with this id, -1 where there is none."""
        counts = self._starts[rows + 1] - self._starts[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        candidates = self._starts[rows][owner] + within
        same = self._text_ids[candidates] == text_ids[owner]
        caption_rows = np.full(len(rows), -1)
        caption_rows[owner[same][::-1]] = candidates[same][::-1]  # of several the last that is written counts
        return caption_rows

    def lookup(
        self, image_ids: Int64[Tensor, " n"], text_ids: Int64[Tensor, " n"]
    ) -> tuple[Float32[Tensor, "n dim"], Float32[Tensor, "n dim"]]:
        """The teacher's embeddings of a batch: of each image, and of the caption that stands for it.

        They have the precision of float16, and unit norm as far as that goes. Of two captions of one image that differ
        in their case only, which have one id, the first is taken: a teacher whose tokenizer passes over case has one
        vector for both.

        Args:
            image_ids, text_ids: as in `clipkit.training.batches.Batch`, on the CPU.

        Raises:
            ClipkitError: where an image, or such a caption of it, was not embedded.
        """
        wanted, texts = image_ids.numpy(), text_ids.numpy()
        rows = self.rows(wanted)
        if (rows < 0).any():
            number = wanted[rows < 0][0]
            raise ClipkitError(f"{self.folder} has no embedding of the image with id {number}; {self.hint}")
        caption_rows = self._caption_rows(rows, texts)
        if (caption_rows < 0).any():
            at = int(np.flatnonzero(caption_rows < 0)[0])
            raise ClipkitError(
                f"{self.folder} has no embedding of the caption with id {texts[at]} of sample "
                f"{self._key(int(rows[at]))!r}; the captions were others when it was made; {self.hint}"
            )
        return self._vectors("image", rows), self._vectors("text", caption_rows)

    @property
    def hint(self) -> str:
        """What mends it where samples are missing."""
        return f"embed all of data.train: clipkit embed SHARDS --model TEACHER --out {self.folder} --overwrite"

    def _vectors(self, side: Side, rows: np.ndarray) -> Tensor:
        vectors = np.empty((len(rows), self.dim), np.float32)
        ends = self._ends[side]
        which = np.searchsorted(ends, rows, side="right")
        for number in np.unique(which):
            mine, block = which == number, self._blocks[side][number]
            vectors[mine] = block[rows[mine] - (ends[number] - len(block))]
        return torch.from_numpy(vectors)

    def _key(self, row: int) -> str:
        for part in self._parts:
            if row < part["images"]:
                return self._column(part, "image", "key")[row].as_py()
            row -= part["images"]
        raise IndexError(row)
