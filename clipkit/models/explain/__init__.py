"""Which parts of an image speak for a text.

`explain` lays a grid over the image and says how much each patch counts, by attention and its gradients or by covering
parts; `check_texts` refuses what cannot be asked.

Read `heatmap.py` first, then `relevance.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
