"""From samples to vectors: encoded by a model, kept on disk, taken over where nothing has changed.

`embed` makes the embeddings artifact part by part and survives a kill; `Embeddings` opens one; `embed_source` encodes
in memory, `cached_images` and `cached_texts` through the user's cache; `TeacherEmbeddings` looks the samples of a
training batch up in an artifact. What can be chosen is an `EmbedOptions`, or `EncodeOptions` for one pass in memory.

Read `store.py` first, then `pipeline.py` and `encode.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
