"""Figures from arrays: pure functions, each with its definition, its ties and its chance level.

Ranking and retrieval, accuracy and average precision, choices among captions, calibration and selective
classification, and how far each figure may be off: intervals, the bootstrap, paired differences. Nothing here knows of
models or files; where CLIP_benchmark defines a figure otherwise, `clip_benchmark` has its definition.

Read `ranking.py` first, then `retrieval.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
