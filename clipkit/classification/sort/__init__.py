"""Classified files put into a folder for each label, and back again.

`Sorter` plans where each file goes, writes that into a journal and copies, links or moves; `undo_sort` puts everything
back. Nothing is ever overwritten, and a sort that was killed goes on.

Read `plan.py` first, then `sorter.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
