"""What GPUs do of a build, with the CPU in their place: the index is what it would have been without them."""

import faiss
import numpy as np
import pytest

from clipkit.search.gpu_build import lists_found_on_gpus
from clipkit.search.index_types import INDEX_TYPES, Effort, parameters, reranking, selector_of
from clipkit.search.quantize import Coding, encode, read_codes, train_coding
from tests.search.test_quantize import DIM, ROWS, questions, vectors

__all__ = ["questions", "vectors"]


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "RR24,IVF16,PQ6x4fsr", "IVF16_HNSW32,SQfp16"])
def test_lists_found_by_gpus_are_those_found_by_the_cpu(vectors, monkeypatch, factory):
    """With the CPU in the GPUs' place: that the index gets its own quantizer back and is what it would have been."""
    rows = vectors.rows.astype(np.float32)
    plain = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    plain.train(rows)
    helped, lent = faiss.clone_index(plain), []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: lent.append(index) or faiss.clone_index(index))
    own = type(faiss.downcast_index(faiss.extract_index_ivf(helped).quantizer))
    for part in np.array_split(rows, 3):
        plain.add(part)
        with lists_found_on_gpus(helped):
            helped.add(part)
        assert type(faiss.downcast_index(faiss.extract_index_ivf(helped).quantizer)) is own
    assert len(lent) == 3
    for found, wanted in zip(helped.search(rows[:50], 5), plain.search(rows[:50], 5), strict=True):
        assert np.array_equal(found, wanted)


class Settings:
    """In the place of FAISS's `GpuIndexCagraConfig`."""

    graph_degree = intermediate_graph_degree = 0


class Cagra:
    """In the place of FAISS's `GpuIndexCagra`: learns nothing before it is copied, and that on the CPU."""

    def __init__(self, resources, dim, metric, config):
        assert metric == faiss.METRIC_L2
        assert config.intermediate_graph_degree > config.graph_degree == 64

    def train(self, rows, numeric_type):
        assert (rows.dtype, numeric_type) == (np.float16, faiss.Float16)
        self.rows = rows.astype(np.float32)

    def copyTo(self, index):
        assert index.base_level_only
        index.base_level_only = False  # which takes what is added
        index.add(self.rows)
        index.base_level_only = True


class Full(Cagra):
    """One that has no memory left."""

    def train(self, rows, numeric_type):
        raise RuntimeError("Error in alloc\nout of memory")


@pytest.fixture
def graph(vectors, tmp_path, monkeypatch):
    """Builds an index of kind HNSW where FAISS has a class for graphs on GPUs."""
    train_coding(vectors, INDEX_TYPES["HNSW"], tmp_path / "coding.faiss", rows=ROWS, memory=2**30)

    def build(cagra, memory=2**30):
        monkeypatch.setattr(faiss, "GpuIndexCagra", cagra, raising=False)
        monkeypatch.setattr(faiss, "GpuIndexCagraConfig", Settings, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
        path = tmp_path / "codes.faiss"
        encode(Coding(tmp_path / "coding.faiss"), INDEX_TYPES["HNSW"], vectors, path, memory=memory)
        return read_codes(path, ROWS)

    return build


def test_a_graph_that_a_gpu_found_is_searched_on_the_cpu(vectors, questions, graph):
    index = graph(Cagra)
    assert isinstance(index, faiss.IndexHNSWCagra)
    assert isinstance(faiss.downcast_index(index.storage), faiss.IndexScalarQuantizer)  # codes, not whole vectors
    effort = Effort(breadth=200, rerank=50)
    refined = vectors.refining(index)
    even = np.arange(ROWS) % 2 == 0
    for passing in (None, even):
        selector = None if passing is None else selector_of(passing)
        wanted = vectors.search(questions, 10, selector)[1]
        _, found = refined.search(questions, 10, params=reranking(refined, effort, 10, selector))
        assert np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found, strict=True)]) > 0.95
        assert passing is None or passing[found].all()


@pytest.mark.parametrize(("cagra", "memory"), [(Full, 2**30), (Cagra, 4_000_000)])
def test_a_graph_that_no_gpu_can_find_is_found_on_the_cpu(vectors, questions, graph, cagra, memory, capsys):
    index = graph(cagra, memory)
    assert type(index) is faiss.IndexHNSWSQ
    found = index.search(questions, 10, params=parameters(index, Effort(breadth=200)))[1]
    wanted = vectors.search(questions, 10)[1]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found, strict=True)]) > 0.9
    assert ("found on the CPU: out of memory" in capsys.readouterr().err) == (cagra is Full)
