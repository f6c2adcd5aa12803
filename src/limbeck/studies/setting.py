"""What a study is about: models, domains, sizes. Its parts go into the digests by which cells are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.errors import RecipeError

ARMS = ("static", "offline", "online", "idle")
"""A draft that stays as it is, was trained before on the same requests, or learns from them as they are served; `idle`:
and nobody is served while an update trains."""

_COLUMNS = ("prompt", "input", "completion", "text", "messages")


@dataclass(frozen=True)
class Domain:
    """Rows of one kind of traffic: a file, and which of its columns are what (none: as `data.read` finds them)."""

    name: str
    path: str
    columns: dict[str, str] = field(default_factory=dict[str, str])

    @staticmethod
    def parse(text: str) -> Domain:
        """`gsm8k=FILE`, or `spider=FILE:prompt=question,input=schema,completion=sql`. RecipeError for anything else."""
        name, equals, rest = text.partition("=")
        path, _, columns = rest.partition(":")
        pairs = [part.partition("=") for part in columns.split(",")] if columns else []
        wrong = [column for column, sign, value in pairs if column not in _COLUMNS or not sign or not value]
        if not name or not equals or not path or wrong:
            raise RecipeError(
                f"--domain: expected NAME=FILE or NAME=FILE:prompt=COLUMN,completion=COLUMN, found {text!r}"
            )
        return Domain(name, path, {column: value for column, _, value in pairs})


@dataclass(frozen=True)
class Setting:
    """target, draft: folders of models (draft None: cut from the target). layers: those of the draft's model that are
    kept (None: all of a given draft's, every other of the target's). requests: of each domain. max_tokens: of an
    answer. temperature: that the target answers with, and of live decoding. seeds: how many. update_size: new positions
    that an update waits for. gamma: drafted tokens a round. head_rows: rows of the draft's head that are kept (0:
    all). weights: how it serves in the speed study. arms: of osd-acceptance, which of `ARMS`.
    """

    target: str
    domains: Sequence[Domain]
    draft: str | None = None
    layers: Sequence[int] | None = None
    requests: int = 400
    max_tokens: int = 96
    temperature: float = 1.0
    seeds: int = 3
    update_size: int = 4096
    learning_rate: float = 1e-3
    gamma: int = 4
    head_rows: int = 0
    weights: str = "own"
    arms: Sequence[str] = ("static", "offline", "online")
    batch: int = 32
    out: Path = Path("docs/studies")
    work: Path = Path("runs/studies")

    def __post_init__(self) -> None:
        if not self.domains:
            raise RecipeError("--domain: expected at least one NAME=FILE, found none")
        names = [domain.name for domain in self.domains]
        if len(set(names)) < len(names):
            raise RecipeError(f"--domain: expected each name once, found {', '.join(names)}")
        if not self.arms or set(self.arms) - set(ARMS):
            raise RecipeError(f"--arms: expected some of {', '.join(ARMS)}, found {', '.join(self.arms) or 'none'}")
        for name in ("requests", "max_tokens", "seeds", "update_size", "gamma", "batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: expected at least 1, found {getattr(self, name)}")

    def facts(self, *names: str) -> dict[str, Any]:
        """These settings, as they are written into a cell."""
        whole = asdict(self)
        return {name: whole[name] for name in names}
