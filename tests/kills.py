"""Work in a process of its own, and `kill -9` just before the n-th time that it changes something on the disk."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from clipkit.cli import main

FORK = multiprocessing.get_context("fork")
CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.symlink", "os.mkdir", "shutil.rmtree"}


# What takes seconds to import, and the tests that such processes are most often begun by.
PRELOADED = ["tests.conftest", "tests.training.test_train", "accelerate", "faiss", "open_clip", "transformers"]
PRELOADED += ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "clipkit.training.train_state"]


def ready_server() -> ForkServerContext:
    """Processes forked from one that has imported everything once and started no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def apart(function: Callable[..., Any], *args: Any) -> int | None:
    """Run it in a process that may die."""
    process = ready_server().Process(target=function, args=args)
    process.start()
    process.join(200)
    return process.exitcode


def _command(
    args: list[str], environment: dict[str, str], said: str, threads: int, first: Callable[[], None] | None
) -> None:
    torch.set_num_threads(threads)
    multiprocessing.set_start_method(None, force=True)  # its own processes are begun as everywhere, by no server
    os.environ.clear()  # the server has that of the test which needed it first
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    if first is not None:
        first()
    main(args)


def command(
    *args: object,
    said: object = os.devnull,
    environment: dict[str, str] | None = None,
    threads: int = 1,
    first: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Begin the command in a process of its own, seconds sooner than a new interpreter could: that has to import.

    Args:
        args: its words.
        said: the file that gets what it says.
        environment: all of it; this process's when not given.
        threads: that torch computes with.
        first: is called there before.
    """
    words = [str(arg) for arg in args]
    how = (words, dict(os.environ) if environment is None else environment, str(said), threads, first)
    process = ready_server().Process(target=_command, args=how)
    process.start()
    return process


def begin(work: Callable[..., Any], *args: Any, at: int | None = None) -> Any:
    """Run ``work(*args)`` in a forked process that kills itself before its change number `at`, counted from 1."""
    process = FORK.Process(target=_watched, args=(work, args, at), daemon=True)
    process.start()
    return process


def killed(work: Callable[..., Any], *args: Any, at: int) -> bool:
    """Whether it came to the kill; False where the work was done before."""
    process = begin(work, *args, at=at)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _watched(work: Callable[..., Any], args: tuple[Any, ...], at: int | None) -> None:
    seen = 0

    def watch(event: str, about: tuple[Any, ...]) -> None:
        nonlocal seen
        opened = event == "open" and isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in CHANGES:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    if at is not None:
        sys.addaudithook(watch)
    work(*args)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
