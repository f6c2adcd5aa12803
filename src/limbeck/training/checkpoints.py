"""Checkpoints that are whole or not there: written aside, flushed, listed in a manifest, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from limbeck.errors import CheckpointError

MANIFEST = "manifest.json"


class Checkpoints:
    """The folder `checkpoints/` of a run. While a checkpoint is being written, `place` is a folder beside it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.place = str(folder)

    @contextmanager
    def whole(self, state: Any, accelerator: Any, args: Any) -> Iterator[None]:
        """Raises CheckpointError if the write fails (a full disk); the checkpoints there stay as they were."""
        partial = self.folder / ".partial"
        name = f"checkpoint-{state.global_step}"
        if args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.place = str(partial)
        try:
            yield
            accelerator.wait_for_everyone()
            if args.should_save:
                _point_at_final(partial / name, self.folder / name, state)
                write_manifest(partial / name)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (partial / name).rename(self.folder / name)
                flush(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "write" not in str(error) and "file" not in str(error):
                raise
            raise CheckpointError(
                f"step {state.global_step}: the checkpoint could not be written ({' '.join(str(error).split())}); "
                f"free some space and go on with --resume: earlier checkpoints in {self.folder} are whole"
            ) from error
        finally:
            self.place = str(self.folder)
            if args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        if args.should_save:
            rotate_checkpoints(
                output_dir=str(self.folder),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=False,
            )
        accelerator.wait_for_everyone()

    def newest(self) -> tuple[Path, list[str]]:
        """The newest whole checkpoint, and what is wrong with each newer one. CheckpointError if none is whole."""
        found = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
        faults: list[str] = []
        for path in found:
            fault = flaw(path)
            if fault is None:
                return path, faults
            faults.append(f"{path.name}: {fault}")
        what = "; ".join(faults) if faults else "no checkpoint at all"
        raise CheckpointError(
            f"{self.folder}: expected a whole checkpoint to resume from; found {what}; start anew without --resume"
        )


def flaw(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint folder by its manifest, or None if it is whole."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return "no readable manifest"
    for name, size in sizes.items():
        file = checkpoint / name
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


def _point_at_final(written: Path, final: Path, state: Any) -> None:
    """The state names the best checkpoint by its path: the one that it will have, not the one that it is written at."""
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(final)
    state.save_to_json(str(written / "trainer_state.json"))


def flush(path: Path) -> None:
    """Has a file, or the names in a folder, on the disk itself. OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def trim_log(path: Path, step: int) -> None:
    """Cuts a JSON-lines log back to `step`, a half-written last line included."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    whole = path.with_suffix(".trimmed")
    whole.write_text("".join(f"{line}\n" for line in kept))
    whole.replace(path)
