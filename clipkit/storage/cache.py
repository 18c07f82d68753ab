"""What was computed before, kept in the user's cache folder: embeddings by content, and what is known of models.

One SQLite file, bounded in size. Whatever happens to it costs time and nothing else: one that is broken is begun anew,
one that cannot be written is left as it is.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from clipkit.core import warn

__all__ = ["Cache", "Entry"]

Value = TypeVar("Value")
AT_ONCE = 500  # keys in one query; SQLite takes 32,766 variables at the most, and older ones 999
DAY = 86_400
SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, vector BLOB, reason TEXT, used INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS facts (key BLOB PRIMARY KEY, value TEXT NOT NULL, used INTEGER NOT NULL);
"""


class Entry(NamedTuple):
    """What came of embedding something: a vector, or a reason why there is none."""

    vector: np.ndarray | None
    """float32 ``[dim]``."""
    reason: str | None = None


class Cache:
    """Embeddings and facts by key.

    Several processes may share one. What has not been used for the longest time goes first when it grows too large; use
    is noted by the day, so that a second run writes nothing.

    Args:
        folder: is made; None for a cache that keeps nothing.
        limit: bytes that the file may take.
    """

    def __init__(self, folder: Path | None, limit: int = 4_000_000_000):
        self.path = None if folder is None else folder / "embeddings.sqlite"
        self.limit = limit
        self._today = int(time.time()) // DAY

    def entries(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """Those that are there."""
        found: dict[bytes, Entry] = {}

        def ask(base: sqlite3.Connection) -> None:
            old = []
            for chunk in _in_turn(keys):
                marks = ",".join("?" * len(chunk))
                rows = base.execute(f"SELECT key, vector, reason, used FROM entries WHERE key IN ({marks})", chunk)
                for key, vector, reason, used in rows:
                    found[key] = Entry(None if vector is None else np.frombuffer(vector, np.float32), reason)
                    if used < self._today:
                        old.append((self._today, key))
            if old:
                base.executemany("UPDATE entries SET used = ? WHERE key = ?", old)

        self._with_base(ask, None)
        return found

    def keep(self, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Add some; afterwards the file is within its limit again."""
        rows = [
            (key, None if vector is None else np.ascontiguousarray(vector, np.float32).tobytes(), reason, self._today)
            for key, (vector, reason) in entries
        ]

        def write(base: sqlite3.Connection) -> None:
            base.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", rows)
            base.commit()
            self._shrink(base)

        if rows:
            self._with_base(write, None)

    def fact(self, key: bytes) -> Any:
        """A plain value that was kept, or None."""

        def ask(base: sqlite3.Connection) -> Any:
            row = base.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])

        return self._with_base(ask, None)

    def keep_fact(self, key: bytes, value: Any) -> None:
        """Add a plain value; facts are few and small, and stay."""
        row = (key, json.dumps(value), self._today)
        self._with_base(lambda base: base.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", row), None)

    def _with_base(self, work: Callable[[sqlite3.Connection], Value], otherwise: Value) -> Value:
        """Do something with the file, once more with a new one where it is broken."""
        for fresh in (False, True):
            if self.path is None:
                break
            try:
                if fresh:
                    self.path.unlink(missing_ok=True)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self.path, timeout=60)) as base:
                    if base.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
                        base.executescript(SCHEMA)
                    with base:
                        return work(base)
            except (OSError, sqlite3.OperationalError) as error:  # full, read-only, or locked for a minute
                self._give_up(error)
            except sqlite3.DatabaseError as error:
                if fresh:
                    self._give_up(error)
                else:
                    warn(f"{self.path} is broken ({error}); what was kept there is made again")
        return otherwise

    def _give_up(self, error: Exception) -> None:
        warn(f"{self.path} cannot be used ({error}); nothing is kept. --cache names another folder, --no-cache none")
        self.path = None

    def _shrink(self, base: sqlite3.Connection) -> None:
        while (size := _size(base)) > self.limit:
            count = base.execute("SELECT COUNT(*) FROM entries").fetchone()[0]
            if not count:
                return
            gone = max(1, count - int(count * 0.8 * self.limit / size))
            oldest = "SELECT key FROM entries ORDER BY used, rowid LIMIT ?"
            base.execute(f"DELETE FROM entries WHERE key IN ({oldest})", (gone,))
            base.commit()
            base.executescript("PRAGMA incremental_vacuum")  # which `execute` does for one page only
            base.commit()


def _size(base: sqlite3.Connection) -> int:
    page, pages = (base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count"))
    return page * pages


def _in_turn(keys: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE))
