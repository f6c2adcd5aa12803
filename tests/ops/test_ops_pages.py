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


GAPS = """
import sys, torch
from pathlib import Path
from limbeck.ops.pages import give_back, keep_pages
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
keep_pages()
count = int(sys.argv[1])
held = [torch.ones(5 << 20) for _ in range(2 * count)]  # 20 MiB each
del held[::2]
before = resident()
give_back()
print(before - resident())
assert all(float(block.sum()) == 5 << 20 for block in held)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 alone can tell")
@pytest.mark.parametrize(("gaps", "returned"), [(64, 1200), (16, 0)])
def test_gaps_between_blocks_in_use_are_given_back_from_1_gib_on(gaps: int, returned: int) -> None:
    """64 gaps of 20 MiB are more, 16 are less."""
    done = subprocess.run([sys.executable, "-c", GAPS, str(gaps)], capture_output=True, text=True, check=True)
    assert returned - 20 <= int(done.stdout) <= returned + 100
