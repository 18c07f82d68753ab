"""The one kind of error that clipkit raises for something its user can mend.

The message is a single line: what is wrong, where, and what to do. The command prints it without a traceback
and exits with status 2; a notebook sees an ordinary exception.
"""

import difflib
from collections.abc import Iterable

__all__ = ["BadSample", "ClipkitError", "UnreadSample", "did_you_mean"]


class ClipkitError(Exception):
    """Root of every exception that clipkit raises on purpose."""


class BadSample(ClipkitError):
    """One sample that cannot be used. Among many it goes to the ledger and the work goes on."""


class UnreadSample(BadSample):
    """One that could not be read: another time the disk or the server may give it, and no stamp would tell."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of `known`, or an empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
