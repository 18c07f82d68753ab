"""CLIP-style contrastive pretraining, embedding, search and zero-shot classification in one tool.

The face for notebooks; each name is imported when it is first asked for, so that ``import clipkit`` is quick:

>>> import clipkit
>>> model = clipkit.load_model("run/")                              # doctest: +SKIP
>>> hits = clipkit.Index.open("index/").search(model.embed_texts(["a red heart"]), k=5)  # doctest: +SKIP
>>> rows = clipkit.classify("photos/", ["cat", "dog"], model)       # doctest: +SKIP
>>> clipkit.Embeddings.open("emb/").vectors("image").shape          # doctest: +SKIP
(5382, 192)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
