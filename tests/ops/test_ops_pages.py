"""Memory that is kept is not fetched again. In processes of their own: it cannot be undone."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from warm import printed

from limbeck.ops import pages

LOOP = """
import ctypes, resource, sys
from limbeck.ops.pages import keep_pages
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "kept":
    keep_pages()
def work():
    blocks = [libc.malloc(24 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 24 << 20)
    for block in blocks:
        libc.free(block)
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""By glibc itself: torch's small blocks may lie at the end of the heap, and keep it from shrinking, by chance."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told")
def test_a_loop_over_large_blocks_fetches_no_pages_again() -> None:
    faults = {}
    for how in ("kept", "usual"):
        done = subprocess.run([sys.executable, "-c", LOOP, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["kept"] < 500 < faults["usual"]


GAPS = """
import sys, torch
from pathlib import Path
from limbeck.ops import pages
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
pages.keep_pages()
count, left = int(sys.argv[1]), int(sys.argv[2]) << 20
pages._bytes_left = lambda: left
held = [torch.ones(5 << 20) for _ in range(2 * count)]  # 20 MiB each
del held[::2]
before = resident()
pages.give_back()
print(before - resident())
assert all(float(block.sum()) == 5 << 20 for block in held)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 alone can tell")
@pytest.mark.parametrize(("gaps", "left", "returned"), [(64, 0, 1200), (64, 2000, 0), (16, 0, 0)])
def test_gaps_between_blocks_in_use_are_given_back_where_memory_is_short(
    gaps: int, left: int, returned: int, tmp_path: Path
) -> None:
    """64 gaps of 20 MiB are more than 1 GiB, 16 are less. left: MiB that the system could still give."""
    found = int(printed(GAPS, gaps, left, output=tmp_path / "printed"))
    assert returned - 20 <= found <= returned + 100


def test_what_is_left_is_the_control_groups_where_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_GROUP", tmp_path)
    whole = pages._bytes_left()
    assert 0 < whole <= psutil.virtual_memory().total
    (tmp_path / "memory.current").write_text("3000\n")
    for most, left in (("max", None), ("10000", 7000)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert pages._bytes_left() == left or (left is None and pages._bytes_left() > 7000)
