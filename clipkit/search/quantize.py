"""Codes: what is learned from a sample of the vectors, and a segment's vectors turned into them within some memory.

Codes are of the vectors less their mean. ⟨q, x - μ⟩ is ⟨q, x⟩ less a number that only the question decides, so the
order of the answers stays, while what images have in common, which is most of a CLIP embedding and the reason why
questions lie far from all of them (Liang et al. 2022, "Mind the Gap"), costs the codes nothing.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.ondisk import merge_ondisk

from clipkit.core import ClipkitError, atomic_write, give_back_freed_memory
from clipkit.search.gpu_build import graph_found_on_gpu, lists_found_on_gpus
from clipkit.search.index_types import Kind, lists_for
from clipkit.search.vector_file import Vectors

__all__ = [
    "Coding",
    "can_be_built",
    "encode",
    "learn_lists",
    "lies_on_disk",
    "read_codes",
    "sample_rows",
    "train_coding",
]

BLOCK = 8192  # vectors in float32 at a time: 16 MiB at 512 dimensions
PER_LIST = 64  # sampled vectors per inverted list; FAISS asks for 39 at least and looks at 256 at most
KMEANS_ROUNDS = (
    6  # of k-means. Twice as many, of twice as many vectors, take four times as long and find 1 % more at best
)
OPQ_SAMPLE = 20_000  # vectors that a rotation is learned from
FEWEST_TO_TRAIN = 16 * 39  # vectors: so many FAISS asks for to tell 16 values of a code apart
LIST_GROWTH = 2.2  # lists grow by doubling, and for a moment stand there twice


class Coding:
    """A trained FAISS index without vectors, and the mean that is taken off them; new segments are coded with it.

    Args:
        path: of the FAISS file; the mean stands beside it.

    Raises:
        ClipkitError: where it is missing or altered.
    """

    def __init__(self, path: Path):
        self.path = path
        mean = path.with_suffix(".mean.npy")
        try:
            self.mean: np.ndarray = np.load(mean)
        except (OSError, ValueError, EOFError) as error:
            raise ClipkitError(f"{mean} is missing or altered; build the index again") from error

    def empty(self) -> Any:
        """A FAISS index of its own, trained and empty."""
        return read_codes(self.path, 0)


def read_codes(path: Path, rows: int) -> Any:
    """A FAISS index of so many vectors; lists on the disk stay there and are memory-mapped.

    Raises:
        ClipkitError: where it is missing, cut, altered or of another length.
    """
    lists = path.with_suffix(".lists")
    try:
        index = _with_lists(path, lists) if lists.is_file() else faiss.read_index(str(path))
    except (RuntimeError, OSError) as error:
        raise ClipkitError(f"{path} is missing, cut or altered ({_reason(error)}); build the index again") from error
    if index.ntotal != rows:
        raise ClipkitError(f"{path} holds {index.ntotal:,} vectors where {rows:,} are expected; build the index again")
    return index


def _with_lists(path: Path, lists: Path) -> Any:
    """FAISS keeps where the lists are, and the folder may have been moved since: they are beside the file.

    FAISS's own flag for that prints a line to where results go. The file is small, as it holds no codes.
    """
    kept, now = (len(name).to_bytes(8, "little") + name for name in (lists.name.encode(), os.fsencode(lists.resolve())))
    data = path.read_bytes()
    if data.count(kept) != 1:
        raise OSError(f"it does not name {lists.name}")
    return faiss.deserialize_index(np.frombuffer(data.replace(kept, now), np.uint8))


def sample_rows(rows: int, wanted: int, seed: int = 0) -> np.ndarray:
    """Rows to learn from, rising, without repetition; all of them where there are fewer."""
    if rows <= wanted:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, wanted, replace=False))


def learn_lists(vectors: Vectors, count: int, memory: int) -> np.ndarray:
    """The centres of inverted lists by k-means, float32 ``[count, dim]``, of vectors less their mean.

    They are most of what training costs, and the same for every kind, so they are learned once.
    """
    sample, _ = _sample(vectors, PER_LIST * count, memory)
    dim = sample.shape[1]
    means = faiss.Kmeans(
        dim,
        count,
        niter=KMEANS_ROUNDS,
        spherical=True,
        seed=1234,
        min_points_per_centroid=1,
        gpu=bool(faiss.get_num_gpus()),
    )
    means.train(sample)
    centres = np.asarray(means.centroids)
    # These have length one, and vectors less their mean are shorter: what codes keep, the rest of a vector beside its
    # centre, is least where centres are as long as vectors reach along them. All by one factor: the nearest stay so.
    reach, _ = means.index.search(sample[:: max(1, len(sample) // 10_000)], 1)
    del sample
    give_back_freed_memory()
    return centres * reach.mean()


def _sample(vectors: Vectors, wanted: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from less their mean, float32, within an eighth of the memory, as training turns and
    copies it; and the mean."""
    count, dim = vectors.rows.shape
    chosen = sample_rows(count, min(max(wanted, 2**16), max(1024, memory // 8 // (4 * dim))))
    sample = vectors.rows[chosen].astype(np.float32)
    mean = sample.mean(axis=0)
    sample -= mean
    return sample, mean


def train_coding(
    vectors: Vectors,
    kind: Kind,
    path: Path,
    *,
    rows: int,
    memory: int,
    on_disk: bool = False,
    lists: np.ndarray | None = None,
) -> None:
    """Learn a coding from a sample of stored vectors and write it.

    Args:
        vectors: to learn from.
        kind: of the index.
        path: where the trained index goes.
        rows: for how many vectors it is meant, which decides how many lists there are.
        memory: bytes that may be used; the sample takes an eighth of them at most.
        on_disk: learn codes that lists on the disk can hold (see `lies_on_disk`); those for lists in memory are faster.
        lists: as `learn_lists` gives them for so many; learned where not given.
    """
    dim = vectors.rows.shape[1]
    factory = kind.filled(rows, dim, on_disk=on_disk)
    # A graph leads along short ways, so it is of distances, and of the vectors as they are: all have length one, where
    # the nearest is the one of the greatest product.
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT if kind.has_lists else faiss.METRIC_L2)
    if kind.has_lists and lists is None:
        lists = learn_lists(vectors, lists_for(rows), memory)
    sample, mean = _sample(vectors, 0, memory)
    if not kind.has_lists:
        sample += mean
        mean = np.zeros_like(mean)
    if kind.has_lists and len(sample) < (least := max(dim, FEWEST_TO_TRAIN)):
        sample = np.resize(sample, (least, dim))  # again and again; FAISS learns a rotation beyond the end of fewer
    if isinstance(index, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        if isinstance(rotation, faiss.OPQMatrix):
            inner: Any = faiss.downcast_index(index.index)
            quantizer = faiss.ProductQuantizer(dim, inner.pq.M, inner.pq.nbits)  # it would learn for 8 bits otherwise
            rotation.pq, rotation.niter, rotation.niter_pq_0 = quantizer, 8, 8  # of 50 and 40: it is slow
        # Learning one turns, codes and decodes the sample again and again, each time into new memory.
        rotation.train(sample[: min(OPQ_SAMPLE, max(1024, dim, memory // 16 // (4 * dim)))])
        lists = rotation.apply(lists)  # type: ignore[call-overload]  # a rotation takes centres to centres
    if kind.has_lists and lists is not None:
        faiss.downcast_index(faiss.extract_index_ivf(index).quantizer).add(lists)  # which leaves no k-means to be done
    index.train(sample)
    with atomic_write(path.with_suffix(".mean.npy")) as handle:
        np.save(handle, mean)
    _write(index, path)
    give_back_freed_memory()


def can_be_built(kind: Kind, rows: int, dim: int, memory: int) -> bool:
    """Whether the memory, in bytes, holds what must be in it while a kind is built; lists may lie on the disk."""
    return kind.has_lists or kind.is_flat or _takes(kind, rows, dim) <= memory


def _takes(kind: Kind, rows: int, dim: int) -> float:
    """Bytes of memory to code so many vectors at once, beside what was read and learned."""
    return 2 * rows * kind.bytes_per_vector(dim) * LIST_GROWTH


def lies_on_disk(kind: Kind, rows: int, dim: int, memory: int) -> bool:
    """Whether `encode` keeps the lists of so many vectors on the disk."""
    return kind.has_lists and rows > _room(kind, dim, memory)


def _room(kind: Kind, dim: int, memory: int) -> int:
    """How many vectors are coded in memory before they are written to the disk."""
    return int(memory / 5 / (kind.bytes_per_vector(dim) * LIST_GROWTH))


def encode(coding: Coding, kind: Kind, vectors: Vectors, path: Path, *, memory: int) -> None:
    """Code a segment's vectors, in pieces with lists on the disk where the memory does not hold them all.

    Args:
        coding: what was learned.
        kind: of it.
        vectors: the segment's.
        path: where the FAISS index goes; lists on the disk go beside it.
        memory: bytes that may be used.

    Raises:
        ClipkitError: where the memory does not hold what this kind must keep in it, or the disk is full.
    """
    rows, dim = vectors.rows.shape
    pieces = path.with_name(f".{path.name}.pieces")
    # What another kind left, or a run that was killed and had less memory: codes in memory have none of it beside them.
    path.with_suffix(".lists").unlink(missing_ok=True)
    shutil.rmtree(pieces, ignore_errors=True)
    index = coding.empty()
    in_memory = not lies_on_disk(kind, rows, dim, memory)
    if not in_memory and isinstance(faiss.downcast_index(faiss.extract_index_ivf(index)), faiss.IndexIVFFastScan):
        in_memory = True  # its lists cannot lie on the disk
    takes = _takes(kind, rows, dim)
    if in_memory and takes > memory:
        raise ClipkitError(
            f"{kind.name} of {rows:,} vectors takes about {takes / 2**30:.1f} GiB while it is built, and "
            f"{memory / 2**30:.1f} are allowed; give --memory more, or build a kind with lists (IVF-SQ8, RaBitQ)"
        )
    if in_memory:
        graph = graph_found_on_gpu(index, vectors.rows, memory - takes)
        codes = index if graph is None else faiss.downcast_index(graph.storage)
        with lists_found_on_gpus(codes):
            for block in _blocks(vectors, coding.mean, 0, rows):
                codes.add(block)
        index = graph or index
        _write(index, path)
        return
    pieces.mkdir(parents=True)
    try:
        _on_disk(coding, vectors, path, pieces, _room(kind, dim, memory))
    finally:
        shutil.rmtree(pieces, ignore_errors=True)


def _on_disk(coding: Coding, vectors: Vectors, path: Path, pieces: Path, room: int) -> None:
    rows = len(vectors.rows)
    made = []
    for start in range(0, rows, room):
        index = coding.empty()
        with lists_found_on_gpus(index):
            for block in _blocks(vectors, coding.mean, start, min(start + room, rows)):
                first = start + index.ntotal
                index.add_with_ids(block, np.arange(first, first + len(block)))
        made.append(str(pieces / f"{len(made)}.faiss"))
        _write(index, Path(made[-1]))
        del index
        give_back_freed_memory()
    whole = coding.empty()
    lists = path.with_suffix(".lists")
    try:
        merge_ondisk(whole, made, str(lists))
    except RuntimeError as error:
        raise ClipkitError(f"cannot write {lists}: {_reason(error)}") from error
    made_lists: Any = faiss.extract_index_ivf(whole).invlists
    faiss.downcast_InvertedLists(made_lists).filename = lists.name
    _write(whole, path)


def _write(index: Any, path: Path) -> None:
    with atomic_write(path) as handle:
        try:
            faiss.write_index(index, handle.name)
        except RuntimeError as error:  # so FAISS says that the disk is full
            raise OSError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[-160:]


def _blocks(vectors: Vectors, mean: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
    for at in range(start, stop, BLOCK):
        yield vectors.rows[at : min(at + BLOCK, stop)].astype(np.float32) - mean
