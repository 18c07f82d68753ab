"""The index: FAISS behind a folder of segments, and search that gives scores and metadata rows.

An index never sees a model; it takes unit-norm vectors and returns rows. It knows the fingerprint of the model whose
vectors it holds, so that a question from another model can be refused. FAISS is imported here and nowhere else.

Read `index.py` first, then `build.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
