"""Freed memory that is kept costs no page faults when it is used again."""

import subprocess
import sys

import pytest

from clipkit.core import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from clipkit.core import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    raise SystemExit(77)
def step():
    return [torch.ones(megabytes << 18) for megabytes in (9, 40, 25, 64)]
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc")
def test_memory_is_kept():
    faults = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("this C library cannot keep freed memory")
        faults[how] = int(done.stdout)
    assert faults["keep"] < faults["give back"] / 4


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
