"""What every room may use: one kind of error, the log, files written whole, and this machine.

Errors that a user can mend are a `ClipkitError`; results and notes go through `emit`, `note` and `warn`; `atomic_write`
and its kin leave a file whole or not at all. Threads, loader processes, the processes of a node and what ranks tell
each other (`collectives`) are here too, and figures and pages, which any stage may draw. Nothing here knows of images,
models or artifacts.

Read `errors.py` first, then `files.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
