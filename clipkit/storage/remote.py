"""Bytes from anywhere: whatever fsspec has a name for (``s3://``, ``https://``, ``hf://``, …) and ``pipe:COMMAND``.

The one home of fsspec. What may pass (a broken connection, a server that is too busy) is tried again; what is silent
for too long is given up; every failure is one `ClipkitError` that names the URL. Nothing here hangs, and nothing keeps
the interpreter from exiting: calls into fsspec run in daemon threads that are left behind when they do not return.
"""

import contextlib
import io
import os
import queue
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, TypeVar

from clipkit.core import ClipkitError, atomic_write

__all__ = ["fetch", "is_pipe", "is_remote", "list_files", "open_stream", "read_bytes", "sizes_and_stamps", "stamp"]

TIMEOUT = 60.0  # seconds without a byte
RETRIES = 3  # after the first attempt
FIRST_PAUSE = 0.5  # seconds before the first retry; doubles with each
PIECE = 8 << 20  # bytes asked for at once: what must arrive within the timeout, 140 kB/s at the least
CHUNK = 1 << 20  # bytes of a stream read at once; a thread for each costs some 50 us
AT_ONCE = 32  # requests under way when many files are described

# Two letters at least, so that C:\ is a drive; fsspec chains schemes as in simplecache::s3://.
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")

Value = TypeVar("Value")


class _MayPass(ClipkitError):
    """A failure that another attempt may not meet."""


def is_remote(spec: str) -> bool:
    """Whether `spec` is a URL of fsspec's (``s3://…``, ``memory://…``, ``file://…``); no path, no drive letter is."""
    return SCHEME.match(spec) is not None and not is_pipe(spec)


def is_pipe(spec: str) -> bool:
    """Whether `spec` is ``pipe:COMMAND``, a shell command whose output is meant, as webdataset writes it."""
    return spec.startswith("pipe:")


def read_bytes(
    url: str,
    start: int | None = None,
    size: int | None = None,
    *,
    timeout: float = TIMEOUT,
    retries: int = RETRIES,
) -> bytes:
    """Read a file, or `size` bytes of it from `start` on (fewer where it ends before).

    Args:
        url: an fsspec URL.
        start: the first byte; 0 where it is not given.
        size: how many bytes; to the end where it is not given.
        timeout: seconds that 8 MiB may take, or 1 MiB where the size is not known before.
        retries: attempts after the first, for errors that may pass.

    Raises:
        ClipkitError: where it is missing, refused, silent, or fails again and again.
    """
    if size is None:

        def whole() -> bytes:
            with open_stream(url, timeout=timeout) as stream:
                skipped = start or 0
                while skipped and (passed := len(stream.read(min(skipped, CHUNK)))):
                    skipped -= passed
                return stream.read()

        return _again(whole, retries)

    def piece(first: int, last: int) -> bytes:
        fs, path = _filesystem(url, timeout)
        data = fs.cat_file(path, start=first, end=last)
        # A web server that knows no ranges sends the whole file.
        return data[first:last] if len(data) > last - first else data

    pieces: list[bytes] = []
    first, end = start or 0, (start or 0) + size
    while first < end:
        last = min(first + PIECE, end)
        pieces.append(_call(url, lambda a=first, b=last: piece(a, b), timeout, retries))
        if len(pieces[-1]) < last - first:
            break
        first = last
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def stamp(url: str, *, timeout: float = TIMEOUT, retries: int = RETRIES) -> str:
    """What tells one content of a file from another without reading it: its size with its etag or time.

    Raises:
        ClipkitError: where it is missing or cannot be reached.
    """
    return _stamp(_info(url, timeout, retries))


def sizes_and_stamps(
    urls: Sequence[str], *, timeout: float = TIMEOUT, retries: int = RETRIES
) -> list[tuple[int, str] | None]:
    """Size (0 where the server does not tell) and `stamp` of many files at once; None where one cannot be had.

    The stamp is empty where the server tells nothing that it could be made of.
    """

    def one(url: str) -> tuple[int, str] | None:
        try:
            info = _info(url, timeout, retries)
        except ClipkitError:
            return None
        return int(info.get("size") or 0), _stamp(info)

    # A ThreadPool, whose threads are daemons, and not an executor, which waits for its threads at exit.
    with ThreadPool(max(1, min(AT_ONCE, len(urls)))) as pool:
        return pool.map(one, urls)


def list_files(url: str, suffix: str = "", *, timeout: float = TIMEOUT, retries: int = RETRIES) -> list[str]:
    """Full URLs of the files anywhere below `url` whose names end with `suffix`, sorted.

    Raises:
        ClipkitError: where `url` cannot be listed. A web server lists only where it shows an index page.
    """

    def found() -> list[str]:
        fs, path = _filesystem(url, timeout)
        fs.invalidate_cache()
        if not fs.exists(path):
            raise FileNotFoundError(url)
        return [fs.unstrip_protocol(name) for name in fs.find(path)]

    return sorted(name for name in _call(url, found, timeout, retries) if name.partition("?")[0].endswith(suffix))


def fetch(source: str, to: Path, *, timeout: float = TIMEOUT, retries: int = RETRIES) -> None:
    """Stream a whole URL, or the output of ``pipe:COMMAND``, into a local file, which appears when it is whole.

    Raises:
        ClipkitError: where the source fails, or the file cannot be written; nothing is left behind then.
    """

    def attempt() -> None:
        with atomic_write(to) as file, open_stream(source, timeout=timeout) as stream:
            while chunk := stream.read(CHUNK):
                file.write(chunk)

    _again(attempt, retries)


@contextlib.contextmanager
def open_stream(source: str, *, timeout: float = TIMEOUT) -> Iterator[BinaryIO]:
    """Open a URL, or the output of ``pipe:COMMAND``, to be read once from front to back.

    The command runs in a shell and is ended, with all that it started, when the block ends before it does.

    Args:
        source: an fsspec URL or ``pipe:COMMAND``.
        timeout: seconds that 1 MiB of a URL, or any byte of a pipe, may take.

    Raises:
        ClipkitError: on opening or on any read: where the source is missing or refused, breaks off, is silent for too
            long, or the command ends with another status than 0.
    """
    raw = _Pipe(source.removeprefix("pipe:"), timeout) if is_pipe(source) else _Remote(source, timeout)
    with contextlib.closing(raw):
        yield io.BufferedReader(raw, CHUNK)


class _Raw(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        # The inherited one reads 8 KiB at a time.
        return b"".join(iter(lambda: self.read(CHUNK), b""))


class _Remote(_Raw):
    """A file of fsspec's, every call to it watched."""

    def __init__(self, url: str, timeout: float):
        self.url, self.timeout = url, timeout

        def opened() -> Any:
            fs, path = _filesystem(url, timeout)
            # A web file as one response, not as a request per block; the size given saves the question for it.
            return fs.open(path, "rb", **({"block_size": 0, "size": 1} if _is_web(url) else {"block_size": PIECE}))

        self._file = _call(url, opened, timeout, 0)

    def readinto(self, buffer: Any, /) -> int:
        data = _call(self.url, lambda: self._file.read(len(buffer)), self.timeout, 0)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with contextlib.suppress(ClipkitError):
                _call(self.url, self._file.close, min(self.timeout, 1.0), 0)


class _Pipe(_Raw):
    """The output of a shell command."""

    def __init__(self, command: str, timeout: float):
        self.command, self.timeout = command, timeout
        # A session of its own makes a process group, so that a pipeline can be ended as a whole.
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._output = self._process.stdout or io.BytesIO()
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)

    def readinto(self, buffer: Any, /) -> int:
        if self._process.returncode is not None:
            return 0
        if not self._poll.poll(self.timeout * 1000):
            self.close()
            raise _silence(f"pipe:{self.command}", self.timeout)
        data = os.read(self._output.fileno(), len(buffer))
        if not data:
            self._check_status()
        buffer[: len(data)] = data
        return len(data)

    def _check_status(self) -> None:
        try:
            status = self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self.close()
            raise _MayPass(f"pipe:{self.command} closed its output but did not end") from None
        if status:
            raise _MayPass(f"pipe:{self.command} ended with status {status}")

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._process.returncode is None:
                # Not yet waited for, so the number of the group cannot have passed to another one.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._output.close()


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(url: str, timeout: float) -> tuple[Any, str]:
    """The filesystem of a URL and the path in it. fsspec keeps filesystems, and makes new ones after a fork."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if _is_web(url):
        import aiohttp

        # Without this a response of more than five minutes is broken off, however well it flows.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options["client_kwargs"] = {"timeout": limits}
    return url_to_fs(url, **options)


def _info(url: str, timeout: float, retries: int) -> dict[str, Any]:
    def found() -> dict[str, Any]:
        fs, path = _filesystem(url, timeout)
        return fs.info(path)

    return _call(url, found, timeout, retries)


# What filesystems call the mark or the time of a content, the surer first.
MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "version_id", "LastModified", "Last-Modified", "mtime", "created")


def _stamp(info: dict[str, Any]) -> str:
    parts = [info.get("size"), next((info[name] for name in MARKS if info.get(name)), None)]
    return " ".join(str(value) for value in parts if value is not None)


def _again(work: Callable[[], Value], retries: int) -> Value:
    """`work()`, again after a growing pause while it fails with what may pass."""
    for attempt in range(retries):
        try:
            return work()
        except _MayPass:
            time.sleep(FIRST_PAUSE * 2**attempt)
    return work()


def _call(url: str, work: Callable[[], Value], timeout: float, retries: int) -> Value:
    """`work()` in a daemon thread, given up after `timeout` seconds; its errors as `ClipkitError`."""

    def once() -> Value:
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((work(), None))
            except BaseException as error:  # it belongs to whoever waits, not to this thread
                answer.put((None, error))

        Thread(target=run, daemon=True, name="clipkit-storage").start()
        try:
            value, error = answer.get(timeout=timeout)
        except queue.Empty:
            raise _silence(url, timeout) from None
        if error is not None:
            raise _explained(url, error, timeout) from error
        return value

    return _again(once, retries)


def _silence(url: str, timeout: float) -> _MayPass:
    return _MayPass(f"{url} has not answered for {timeout:g} s")


def _explained(url: str, error: BaseException, timeout: float) -> BaseException:
    """What to raise for an error of fsspec's or of a library below it."""
    if isinstance(error, ClipkitError) or not isinstance(error, Exception):
        return error
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says this of a web file whatever the server said
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return ClipkitError(f"{url}: there is no such file")
    if isinstance(error, PermissionError) or status in (401, 403):
        return ClipkitError(f"{url}: access is refused; check the name and your credentials")
    if isinstance(error, ImportError):
        return ClipkitError(f"{url} cannot be read with what is installed: {_line(error)}")
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return ClipkitError(f"{url}: no such kind of address: {_line(error)}")
    if isinstance(error, TimeoutError):
        return _silence(url, timeout)
    if isinstance(status, int):
        kind = _MayPass if status >= 500 or status in (408, 425, 429) else ClipkitError
        return kind(f"cannot read {url}: the server says {status} {getattr(error, 'message', '')}".rstrip())
    lasting = (IsADirectoryError, NotADirectoryError)
    kind = _MayPass if isinstance(error, OSError | EOFError) and not isinstance(error, lasting) else ClipkitError
    if type(error).__module__.partition(".")[0] == "aiohttp" and "URL" not in type(error).__name__:
        kind = _MayPass  # not all of aiohttp's broken connections are an OSError
    return kind(f"cannot read {url}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
