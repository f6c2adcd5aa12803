"""What a number was measured on: every run keeps it in `environment.json`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TELLING_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")


def environment(command: str, seed: int, *, dtype: str = "float32") -> dict[str, Any]:
    """Machine, versions, date (UTC, ISO 8601), command, commit of the working folder, seed and dtype.

    `memory_bytes` is the machine's, `cores` those this process may use; `commit` is None outside a checkout and ends
    in `-dirty` where tracked files were changed.
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        # The root package imports the pipeline, which imports this file: read it without an import of it.
        "limbeck": getattr(sys.modules["limbeck"], "__version__", None) or _version("limbeck"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "seed": seed,
        "dtype": dtype,
    }


def cpu_name(cpuinfo: str | None = None) -> str:
    """The CPU's name; a hidden one ("AMD EPYC", "Intel Xeon @ 2.8GHz") gets its family, model and telling flags.

    `cpuinfo` is the text of /proc/cpuinfo, read if not given.
    """
    if cpuinfo is None:
        source = Path("/proc/cpuinfo")
        cpuinfo = source.read_text() if source.exists() else ""
    fields: dict[str, str] = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    if re.search(r"\d", name.split("@")[0]):
        return name
    flags = [flag for flag in TELLING_FLAGS if flag in fields.get("flags", "").split()]
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{name} ({', '.join([family, *flags])})"


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
