"""Freed memory: what goes back to the system has to be fetched again, page by page; what is kept serves nobody else."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT = 1 << 30
_LARGEST = 32 << 20  # glibc takes no more
_GROUP = Path("/sys/fs/cgroup")


@functools.cache
def keep_pages() -> None:
    """Has glibc keep up to 1 GiB of freed memory, in blocks of up to 32 MiB, for the process that asks.

    Without it a loop over tensors of some MiB may spend half of its time in the kernel, or none, as the heap happens to
    lie: writing 64 times 128 tokens of 32 000 took 2.5 to 4.2 s, and 2.5 s each time with it. Once a process; elsewhere
    than on Linux with glibc nothing happens.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def give_back() -> None:
    """Returns what is freed to the system, where it is more than 1 GiB and more than the system has left.

    glibc returns by itself what is free at the end of its heap alone. Between blocks in use, with tensors whose sizes
    change from step to step, gaps add up: a 0.5B that learnt from a 1.5B held 6 GB that nobody used, and grew. What was
    free once may be wanted again: where it is less than what is left, it fits even if no gap does. Returned memory has
    to be fetched again, so that nothing is returned without need. Elsewhere than on Linux with glibc 2.33 nothing
    happens.
    """
    mallinfo, trim = _glibc("mallinfo2"), _glibc("malloc_trim")
    if mallinfo is None or trim is None:
        return
    mallinfo.restype = _MallInfo
    found = mallinfo()
    if _anonymous_bytes() - found.uordblks - found.hblkhd > max(_KEPT, _bytes_left()):
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _bytes_left() -> int:
    """What this process may still take: of the machine, and of its control group (v2) where that has a limit."""
    left = psutil.virtual_memory().available
    limit, used = _GROUP / "memory.max", _GROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        left = min(left, int(most) - int(used.read_text()))
    return left


def _anonymous_bytes() -> int:
    """Resident bytes of this process that are no file's."""
    found = psutil.Process().memory_info()
    return found.rss - found.shared
