"""What GPUs do of a build: they find each vector's inverted list, or the graph; the index is the CPU's all the time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

from clipkit.core import warn

__all__ = ["graph_found_on_gpu", "lists_found_on_gpus"]

# FAISS's signatures do not say all that they take, nor know what only some builds of it have.
_made: Any = faiss


@contextmanager
def lists_found_on_gpus(index: Any) -> Iterator[None]:
    """While vectors are added, let the GPUs, where there are any, find the list of each, which is most of that work.

    Args:
        index: on the CPU, where codes are made and stay; afterwards it is what it was, and more.
    """
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or not faiss.get_num_gpus():
        yield
        return
    own = faiss.downcast_index(ivf.quantizer)
    centres = faiss.IndexFlatIP(own.d)
    centres.add(own.reconstruct_n(0, own.ntotal))  # compared in full, even where the index has a graph over them
    there: Any = faiss.index_cpu_to_all_gpus(centres)
    ivf.quantizer = there
    there.thisown = True  # SWIG takes it that the index frees it now, which gets its own one back
    try:
        yield
    finally:
        ivf.quantizer = own


def graph_found_on_gpu(index: Any, rows: np.ndarray, memory: float) -> Any | None:
    """A graph over all vectors that a GPU finds by CAGRA (Ootomo et al. 2024), where this FAISS can (`faiss-gpu-cuvs`).

    Only its lowest level, which a search enters at the best of some random vectors; nothing can be added to it, and to
    a segment nothing is.

    Args:
        index: trained and empty; left as it is.
        rows: float16 ``[rows, dim]``, of length one.
        memory: bytes that may be used beside what the index itself takes; FAISS brings the vectors along in float32.

    Returns:
        An index for the CPU without codes: its ``storage`` is trained and empty, and wants the same rows in order. None
        where the index is no graph, there is no GPU, or one memory or the other is too small.
    """
    cagra: Any = getattr(faiss, "GpuIndexCagra", None)
    count, dim = rows.shape
    if cagra is None or not isinstance(index, faiss.IndexHNSW) or not faiss.get_num_gpus():
        return None
    config = _made.GpuIndexCagraConfig()
    config.graph_degree = index.hnsw.nb_neighbors(0)
    config.intermediate_graph_degree = 2 * config.graph_degree
    if count <= config.intermediate_graph_degree or 6 * dim * count > memory:
        return None
    found = _made.IndexHNSWCagra(dim, config.graph_degree // 2, faiss.METRIC_L2)
    found.base_level_only = True
    try:
        there = cagra(faiss.StandardGpuResources(), dim, faiss.METRIC_L2, config)
        there.train(np.asarray(rows), numeric_type=_made.Float16)
        there.copyTo(found)
    except RuntimeError as error:  # most likely the GPU's memory is full
        warn(f"the graph is found on the CPU: {str(error).strip().splitlines()[-1]}")
        return None
    whole, codes = found.storage, faiss.clone_index(index.storage)
    found.storage = codes
    codes.this.disown()
    whole.thisown = True  # the vectors in float32, freed here
    return found
