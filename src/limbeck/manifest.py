"""Folders that can be told whole from half-written: a list of their files and sizes, written last."""

from __future__ import annotations

import json
import os
from pathlib import Path

MANIFEST = "manifest.json"


def flaw(folder: Path) -> str | None:
    """What is missing from a folder by its manifest, or None if it is whole."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return "no readable manifest"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
    return None


def write_manifest(folder: Path) -> None:
    """Lists the files of a folder with their sizes, everything flushed: what `flaw` reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        flush(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(sizes, indent=1))
    flush(manifest)
    flush(folder)


def flush(path: Path) -> None:
    """Has a file, or the names in a folder, on the disk itself. OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
