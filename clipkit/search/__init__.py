"""The index: FAISS behind a folder of segments, and search that gives scores and metadata rows.

An index never sees a model; it takes unit-norm vectors and returns rows. It knows the fingerprint of the model whose
vectors it holds, so that a question from another model can be refused. FAISS is imported here and nowhere else.
"""

from clipkit.search.asking import Part, ask
from clipkit.search.build import Wanted, build_index
from clipkit.search.index import Found, Index
from clipkit.search.kinds import KINDS, Effort

__all__ = ["KINDS", "Effort", "Found", "Index", "Part", "Wanted", "ask", "build_index"]
