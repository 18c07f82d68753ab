"""Probes: classifiers trained on frozen embeddings of images, of texts, and of both.

`open_probe` divides a source into training and test, `evaluate_probe` fits linear probes and the fusions, late and by
attention, and says what each of them gains.

Read `probe.py` first, then `fusion.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
