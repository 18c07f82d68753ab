"""Images named by class names or by examples, and how sure that is.

`classify` is the whole way for notebooks. `parse_labels` reads names and their words, `class_vectors` turns prompts
into vectors, `fit_classifiers` learns from examples too, `Rule` says when an answer is sure enough, `write_report`
shows what came of it. The sub-package `sort` puts the files into folders.

Read `classifier.py` first, then `prompts.py` and `decisions.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
