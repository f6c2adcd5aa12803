"""Checkpoints that are whole or not there: written aside, flushed, listed in a manifest, renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from limbeck.errors import CheckpointError
from limbeck.manifest import flaw, flush, write_manifest


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


def _point_at_final(written: Path, final: Path, state: Any) -> None:
    """The state names the best checkpoint by its path: the one that it will have, not the one that it is written at."""
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(final)
    state.save_to_json(str(written / "trainer_state.json"))


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
