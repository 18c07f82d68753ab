"""Image and text towers behind one class, `DualEncoder`, whichever library they come from.

`load_model` takes a run, a folder, or a name of open_clip's or Hugging Face's; `create_model` makes what training
starts from; `LazyModel` stands for a model that is loaded only when it has to compute. What is fastest without learning
(`cast_for_inference`, `compiled_image_tower`) is here, too; the sub-package `explain` says what a tower looks at.
open_clip and transformers are imported here and nowhere else, and only when a model is made or loaded.

Read `loading.py` first, then `dual_encoder.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
