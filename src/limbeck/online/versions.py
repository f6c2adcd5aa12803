"""The versions of a draft on disk: each whole or not there, the newest whole one serves after whatever happened.

A version is a folder `v000007`: the trained weights and the optimiser's state (safetensors), the state of the random
numbers, a few facts, and a manifest. It is written aside, flushed, and renamed. One that was rolled back is renamed to
`withdrawn-000007` and emptied of its tensors: its number is never given again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.errors import CheckpointError
from limbeck.manifest import flaw, flush, write_manifest

_WEIGHTS, _STATE, _FACTS, _ORIGIN = "weights.safetensors", "state.safetensors", "facts.json", "origin.json"
_KEPT = 5


@dataclass(frozen=True, eq=False)
class Version:
    """`weights` by the draft's names; `state`: tensors of optimiser and random numbers; `facts`: plain values."""

    number: int
    weights: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


class Versions:
    """The folder of one draft's versions; the newest `kept` stay, and number 0, from which all began.

    Made in any process: one alone may save. `origin` says which draft they are of (see `fingerprint`).
    """

    def __init__(self, folder: str | Path, *, kept: int = _KEPT) -> None:
        self.folder = Path(folder)
        self.kept = kept

    def claim(self, origin: str) -> None:
        """Takes the folder for the draft of this origin, and clears away what was half written. CheckpointError where
        it holds another's versions, or cannot be written."""
        place = self.folder / _ORIGIN
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".partial-*"):
                shutil.rmtree(partial, ignore_errors=True)
            if not place.exists():
                aside = place.with_name(".origin")
                aside.write_text(json.dumps({"origin": origin}))
                flush(aside)
                aside.rename(place)
                return
            found = json.loads(place.read_text())["origin"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder}: expected a folder for versions, found {error}: name another"
            ) from None
        if found != origin:
            raise CheckpointError(
                f"{self.folder}: expected versions of the draft that serves, found another's: name another folder"
            )

    def numbers(self) -> list[int]:
        """The whole versions, oldest first."""
        found = sorted(int(path.name[1:]) for path in self.folder.glob("v[0-9]*"))
        return [number for number in found if flaw(self._place(number)) is None]

    def next(self) -> int:
        """A number above all that were ever given."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        given = [int(name[-6:]) for name in names if name.startswith(("v", "withdrawn-")) and name[-6:].isdigit()]
        return max(given, default=-1) + 1

    def newest(self) -> int | None:
        return max(self.numbers(), default=None)

    def before(self, number: int) -> int | None:
        """The whole version before this one."""
        return max((other for other in self.numbers() if other < number), default=None)

    def save(self, version: Version) -> None:
        """Writes a version. CheckpointError where it cannot be (a full disk, say), with what is there as it was, and
        for a number that is not above all others: a stale version must not become the newest."""
        if version.number < self.next():
            raise CheckpointError(
                f"{self.folder}: expected version {self.next()} or above, found {version.number}: it is stale"
            )
        partial = self.folder / f".partial-{version.number:06d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in version.weights.items()}, partial / _WEIGHTS)
            save_file({name: tensor.contiguous() for name, tensor in version.state.items()}, partial / _STATE)
            (partial / _FACTS).write_text(json.dumps(version.facts))
            write_manifest(partial)
            partial.rename(self._place(version.number))
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{self.folder}: version {version.number} could not be written ({' '.join(str(error).split())}); free "
                "some space: the one before serves on"
            ) from error
        for old in [number for number in self.numbers() if number][: -self.kept]:
            shutil.rmtree(self._place(old), ignore_errors=True)

    def load(self, number: int) -> Version:
        """CheckpointError for one that is not there or not whole."""
        place = self._place(number)
        fault = flaw(place)
        if fault is not None:
            raise CheckpointError(f"{place}: expected a whole version, found {fault}: take another")
        try:
            facts = json.loads((place / _FACTS).read_text())
            return Version(number, load_file(place / _WEIGHTS), load_file(place / _STATE), facts)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{place}: expected a readable version, found {error}: take another") from None

    def weights(self, number: int) -> dict[str, Tensor]:
        """The weights alone. CheckpointError as `load`."""
        fault = flaw(self._place(number))
        if fault is not None:
            raise CheckpointError(f"{self._place(number)}: expected a whole version, found {fault}: take another")
        return load_file(self._place(number) / _WEIGHTS)

    def withdraw(self, number: int) -> None:
        """This version is never served again. CheckpointError where it cannot be renamed."""
        gone = self.folder / f"withdrawn-{number:06d}"
        try:
            self._place(number).rename(gone)
            flush(self.folder)
            for tensors in (_WEIGHTS, _STATE):
                (gone / tensors).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: version {number} could not be withdrawn ({error})") from None

    def _place(self, number: int) -> Path:
        return self.folder / f"v{number:06d}"
