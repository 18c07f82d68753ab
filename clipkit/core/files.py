"""Files written whole, and where this user's cache stands.

A file is written under a hidden name beside its place, flushed to the disk and moved there, so that a kill or a power
cut leaves the old content or the new one.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clipkit.core.errors import ClipkitError

__all__ = ["atomic_write", "cache_folder", "read_json", "sync_folder", "write_json"]


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file beside `path` and move it there when the block ends well; on any error nothing is left.

    The data is flushed to the disk before the rename, so a power cut leaves the old file or the new one.
    """
    # Threads, and processes of several machines on one disk, may write the same file at once.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What is no Unicode, as in names of files that are not UTF-8, becomes an escape, which JSON reads back.
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
        with scratch.open(mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        scratch.replace(path)
    except OSError as error:
        raise ClipkitError(f"cannot write {path}: {error.strerror or error}; nothing of it was kept") from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses to remove what is not there, too
            scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    with atomic_write(path, "w") as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ClipkitError: where it is missing, unreadable or cut.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClipkitError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ClipkitError(f"{path} is not valid JSON ({error}); it was cut or edited") from error


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where things are kept that can be made or fetched again: $CLIPKIT_CACHE, else $XDG_CACHE_HOME/clipkit, else
    ~/.cache/clipkit."""
    if own := os.environ.get("CLIPKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipkit"
