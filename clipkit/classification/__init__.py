"""Images named by class names or by examples, and how sure that is.

`classify` is the whole way for notebooks. `open_images` opens whatever holds the images, `parse_labels` reads names and
their words, `class_vectors` turns prompts into vectors, `fit_classifiers` learns from examples too, `Rule` says when an
answer is sure enough, and `Classified` is what came of it, for rows and `write_report`. The sub-package `sort` puts the
files into folders.

Read `pipeline.py` first, then `images.py`, `classifier.py` and `decisions.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
