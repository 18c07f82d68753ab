"""From the bytes of an image to the pixels that a tower is shown.

`decode` gives upright RGB as a person sees it, `Preprocess` the resizing and cropping that a model wants,
`Augmentation` the random changes of training, `shrink` smaller files for packing. `shown` puts decoding and
preprocessing together for embedding, and the GPU decodes JPEGs where there is one.

The first image that is opened here switches off, for the process, Pillow's own limit of pixels and its warnings of odd
metadata, and loads all of its plugins (`decoding.settle_pillow`); importing changes nothing.

Read `decoding.py` first, then `model_input.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
