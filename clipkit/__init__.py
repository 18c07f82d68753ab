"""CLIP-style contrastive pretraining, embedding, search and zero-shot classification in one tool.

The face for notebooks; each name is imported when it is first asked for, so that ``import clipkit`` is quick:

>>> import clipkit
>>> model = clipkit.load_model("run/")                              # doctest: +SKIP
>>> hits = clipkit.Index.open("index/").search(model.embed_texts(["a red heart"]), k=5)  # doctest: +SKIP
>>> rows = clipkit.classify("photos/", ["cat", "dog"], model)       # doctest: +SKIP
>>> clipkit.Embeddings.open("emb/").vectors("image").shape          # doctest: +SKIP
(5382, 192)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipkit.classification import classify
    from clipkit.embeddings import Embeddings
    from clipkit.errors import ClipkitError
    from clipkit.search import Index
    from clipkit.towers import load_model

__version__ = "0.1.0"
__all__ = ["ClipkitError", "Embeddings", "Index", "__version__", "classify", "load_model"]

_HOMES = {
    "ClipkitError": "clipkit.errors",
    "Embeddings": "clipkit.embeddings",
    "Index": "clipkit.search",
    "classify": "clipkit.classification",
    "load_model": "clipkit.towers",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
