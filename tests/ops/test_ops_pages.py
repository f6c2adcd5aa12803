"""Memory that is kept is not fetched again. In processes of their own: it cannot be undone."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

LOOP = """
import resource, sys, torch
from limbeck.ops.pages import keep_pages
if sys.argv[1] == "kept":
    keep_pages()
def work():
    held = [torch.ones(6 << 20) for _ in range(4)]  # 24 MiB each
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told")
def test_a_loop_over_large_tensors_fetches_no_pages_again() -> None:
    faults = {}
    for how in ("kept", "usual"):
        done = subprocess.run([sys.executable, "-c", LOOP, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["kept"] < 500 < faults["usual"]
