"""Work in a process of its own, and `kill -9` just before the n-th time that it changes something on the disk."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

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
