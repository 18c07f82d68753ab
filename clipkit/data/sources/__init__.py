"""Sources of samples, all named by one string: a folder of images, shards, or a list file, here or at a URL.

A sample is one image with its captions, one or several. A source knows how many samples it has and gives any one of
them; it opens no image before it is asked to, and a sample that turns out unusable raises `BadSample` then.

Read `sample.py` first, then `opening.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
