"""Bytes from anywhere: what passes is tried again, what is silent is given up, every failure is one line."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from clipkit.core import ClipkitError
from clipkit.storage import (
    fetch,
    is_pipe,
    is_remote,
    list_files,
    open_stream,
    read_bytes,
    remote,
    sizes_and_stamps,
    stamp,
)
from tests.paths import ROOT

DATA = bytes(range(256)) * 1000


class Answers(BaseHTTPRequestHandler):
    """``/data`` in whole or by range, ``/whole`` never by range, ``/twice`` fails twice, ``/stall`` falls silent."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, self.path.partition("?")[0]
        server.asked.append((self.command, name))
        if name == "/stall":
            self.answer(200, DATA[:10], length=len(DATA))
            server.over.wait(20)
        elif name == "/twice" and len(server.asked) <= 2:
            self.answer(503, b"")
        elif name == "/cut":
            self.answer(200, DATA[:10], length=len(DATA))
        elif name in ("/busy", "/secret"):
            self.answer(503 if name == "/busy" else 403, b"")
        elif name not in ("/data", "/whole", "/twice"):
            self.answer(404, b"")
        elif (span := self.headers.get("Range")) and name != "/whole":
            first, last = span.removeprefix("bytes=").split("-")
            self.answer(206, DATA[int(first) : int(last) + 1])
        else:
            self.answer(200, DATA)

    def answer(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", '"one"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(monkeypatch):
    """A web server on this machine: its address, and in `.asked` what it was asked."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads, server.asked, server.over = True, [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    class Address(str):
        asked = server.asked

    yield Address(f"http://127.0.0.1:{server.server_port}")
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["memory", "file", "http"])
def url(request, tmp_path):
    """One file of 256,000 bytes in three kinds of places."""
    if request.param == "http":
        yield request.getfixturevalue("web") + "/data"
        return
    address = f"memory://{tmp_path.name}/a.bin" if request.param == "memory" else f"file://{tmp_path}/a.bin"
    with fsspec.open(address, "wb") as file:
        file.write(DATA)
    yield address


def test_what_is_remote():
    for spec in ("s3://a/b", "https://x/y.tar", "memory://a", "file:///a", "simplecache::s3://a", "HTTP://x"):
        assert is_remote(spec), spec
    for spec in ("a/b", "/a/b.tar", "C:\\a", "c:/a", "C://a", "a:b", "{000..009}.tar", "pipe:cat s3://x", ""):
        assert not is_remote(spec), spec
    assert is_pipe("pipe:cat x")
    assert not is_pipe("pipes/x")


def test_reading_whole_and_in_part(url, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1000)
    assert read_bytes(url) == DATA
    assert read_bytes(url, 255_990) == DATA[255_990:]
    for start, size in [(0, 10), (7, 1000), (999, 2503), (255_990, 10), (5, 0)]:
        assert read_bytes(url, start, size) == DATA[start : start + size]
    assert sizes_and_stamps([url])[0][0] == len(DATA)
    fetch(url, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == DATA
    with open_stream(url) as stream:
        assert stream.read(3) == DATA[:3]
        assert stream.read() == DATA[3:]
        assert stream.read(1) == b""


def test_a_range_that_reaches_over_the_end_gives_what_is_there(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    for address in (f"file://{tmp_path}/a", str(tmp_path / "a")):
        assert read_bytes(address, 255_999, 100) == DATA[-1:]


def test_a_stamp_follows_the_content(tmp_path, web):
    (tmp_path / "a").write_bytes(b"1")
    before = stamp(f"file://{tmp_path}/a")
    assert before == stamp(f"file://{tmp_path}/a")
    os.utime(tmp_path / "a", (1, 1))
    assert stamp(f"file://{tmp_path}/a") != before
    assert stamp(f"{web}/data") == '256000 "one"'
    assert sizes_and_stamps([f"{web}/data", f"{web}/none", f"file://{tmp_path}/a"])[:2] == [
        (256_000, '256000 "one"'),
        None,
    ]
    assert sizes_and_stamps([]) == []


def test_listing(tmp_path):
    for name in ("b.tar", "a.tar", "deep/c.tar", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        fsspec.filesystem("memory").pipe(f"/listed/{name}", b"")
    assert list_files("memory://listed", ".tar") == [f"memory:///listed/{n}" for n in ("a.tar", "b.tar", "deep/c.tar")]
    assert list_files(f"file://{tmp_path}", ".txt") == [f"file://{tmp_path}/note.txt"]
    assert read_bytes(list_files("memory://listed")[0]) == b""
    with pytest.raises(ClipkitError, match=r"^memory://nowhere: there is no such file$"):
        list_files("memory://nowhere")


@pytest.mark.parametrize("read", [read_bytes, lambda url: read_bytes(url, 0, len(DATA))])
def test_what_passes_is_tried_again(web, read):
    assert read(f"{web}/twice") == DATA
    assert len(web.asked) == 3


def test_what_lasts_is_not(web, tmp_path):
    for call in (read_bytes, stamp, lambda url: fetch(url, tmp_path / "x"), lambda url: read_bytes(url, 3, 4)):
        web.asked.clear()
        with pytest.raises(ClipkitError, match=r"^http.*/none: there is no such file$"):
            call(f"{web}/none")
        assert len(web.asked) <= 2  # a question for the size is put in two ways
    with pytest.raises(ClipkitError, match=r"/secret: access is refused"):
        read_bytes(f"{web}/secret")
    web.asked.clear()
    with pytest.raises(ClipkitError, match=r"^cannot read http.*/busy: the server says 503"):
        read_bytes(f"{web}/busy", retries=2)
    assert len(web.asked) == 3
    with pytest.raises(ClipkitError, match=r"cannot read http.*/cut: "):
        fetch(f"{web}/cut", tmp_path / "x", retries=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ClipkitError, match=r"there is no such file"):
        read_bytes(f"file://{tmp_path}/none")
    with pytest.raises(ClipkitError, match=r"cannot read http://127.0.0.1:1/x: "):
        read_bytes("http://127.0.0.1:1/x", retries=0)


def test_a_server_that_knows_no_ranges(web):
    assert read_bytes(f"{web}/whole", 1000, 10) == DATA[1000:1010]


@pytest.mark.parametrize("read", [read_bytes, lambda url, **how: read_bytes(url, 0, 100, **how)])
def test_silence_is_an_error(web, read):
    began = time.monotonic()
    with pytest.raises(ClipkitError, match=r"^http.*/stall has not answered for 0\.2 s$"):
        read(f"{web}/stall", timeout=0.2, retries=1)
    assert time.monotonic() - began < 5


def test_a_filesystem_that_is_silent_by_itself(monkeypatch, tmp_path):
    # No filesystem's own timeout helps here: the call just does not come back.
    monkeypatch.setattr(remote, "_filesystem", lambda *_: time.sleep(3))
    with pytest.raises(ClipkitError, match=r"^s3://a/b has not answered for 0\.1 s$"):
        stamp("s3://a/b", timeout=0.1, retries=0)


def test_a_silent_read_does_not_keep_the_interpreter(web):
    code = (
        "import sys\nfrom clipkit.storage import read_bytes\n"
        f"try:\n    read_bytes({str(web + '/stall')!r}, timeout=0.3, retries=0)\n"
        "except Exception as error:\n    print(error)\n"
    )
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=15, cwd=root
    )
    assert "has not answered for 0.3 s" in done.stdout
    assert done.stderr == ""


def test_pipes(tmp_path):
    (tmp_path / "a").write_bytes(DATA * 20)
    fetch(f"pipe:cat {tmp_path}/a | cat", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == DATA * 20
    with open_stream(f"pipe:cat {tmp_path}/a") as stream:
        assert stream.read() == DATA * 20
        assert stream.read() == b""
    with open_stream("pipe:yes") as stream:  # ended early: no error
        assert stream.read(4) == b"y\ny\n"


def test_a_pipe_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    with (
        pytest.raises(ClipkitError, match=r"^pipe:echo some; exit 3 ended with status 3$"),
        open_stream("pipe:echo some; exit 3") as stream,
    ):
        assert stream.read(5) == b"some\n"
        stream.read(1)
    with pytest.raises(ClipkitError, match=r"^pipe:exit 3 ended with status 3$"):
        fetch("pipe:exit 3", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    # A command that fails at first is run again.
    fetch(f"pipe:test -e {tmp_path}/been && echo good || {{ touch {tmp_path}/been; exit 1; }}", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == b"good\n"


def test_a_pipe_that_is_silent_is_ended_with_its_group(tmp_path):
    began = time.monotonic()
    command = f"pipe:(sleep 30; echo late) | cat & echo $! > {tmp_path}/pid; wait"
    with (
        pytest.raises(ClipkitError, match=r"has not answered for 0\.3 s$"),
        open_stream(command, timeout=0.3) as stream,
    ):
        stream.read(1)
    assert time.monotonic() - began < 5
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):  # its parent is gone: the system collects it in its own time
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the command's child lives on")
    with (
        pytest.raises(ClipkitError, match="closed its output but did not end"),
        open_stream("pipe:exec >&-; sleep 30", timeout=0.2) as stream,
    ):
        stream.read(1)


def test_what_is_not_installed_or_known_is_named():
    if "s3fs" not in sys.modules:
        with pytest.raises(ClipkitError, match=r"^s3://a/b cannot be read with what is installed: Install s3fs"):
            read_bytes("s3://a/b")
    with pytest.raises(ClipkitError, match=r"^nope://a: no such kind of address: Protocol not known: nope$"):
        read_bytes("nope://a")


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(ClipkitError, match="cannot write"):
        fetch(f"file://{tmp_path}/a", tmp_path / "file" / "x")
