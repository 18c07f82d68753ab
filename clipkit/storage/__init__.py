"""Artifacts on disk, whole or absent, and bytes that lie elsewhere.

A stage works in a `Stage`, part by part, and its manifest comes last; `read_manifest` opens what is finished. Beside
them: hashes that name contents (`digest`, `hash_of`), checksums of files, a folder that takes another one's place at
once, the user's cache of what was computed before, and files at URLs (`read_bytes`, `open_stream`, `fetch`).

Read `manifest.py` first, then `stage.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
