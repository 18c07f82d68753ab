"""Samples: packed into shards, checked for what is wrong with them, and drawn for tests and demos.

`pack` turns any source into webdataset shards; the synthetic scenes (`draw`, `caption`) are what the demo trains on.
The sub-packages have faces of their own: `sources` opens samples wherever they lie, `shards` reads and writes tars,
`check` finds duplicates, defects and leaks.

Read `sources/opening.py` first, then `packing.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
