"""Checking a set of samples: one pass over it, what is wrong with it, a page to look at, a clean copy.

Read `scanning.py` first, then `findings.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
