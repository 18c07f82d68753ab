"""Webdataset shards: tars of samples, named by a pattern, written once and read by seeking.

`Shards` gives any sample of a set of tars by number, `write_shard` writes one with webdataset itself, `expand` says
which files a pattern or folder names, `Spool` fetches remote ones ahead of their use. An index beside each tar says
what stands where.

Read `reader.py` first, then `tar_index.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
