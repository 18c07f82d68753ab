"""Short hashes that name contents: of JSON-able values, of bytes, and of what a cached result depends on."""

import hashlib
import json
from typing import Any

__all__ = ["content_hash", "digest", "hash_of"]


def digest(value: Any) -> str:
    """A short hash of any JSON-able value, the same for equal values on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def hash_of(*facts: object) -> bytes:
    """16 bytes that tell these facts (texts, numbers, lists of them) from others, the same on every machine.

    Keys of the user's `Cache` are such hashes, of what an entry was made of: model, precision, text, an image's stamp.
    """
    return hashlib.blake2b(repr(facts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_hash(data: bytes) -> bytes:
    """16 bytes that tell an image's own bytes from any others."""
    return hashlib.blake2b(data, digest_size=16).digest()
