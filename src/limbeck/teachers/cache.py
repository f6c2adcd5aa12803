"""What a teacher wrote, kept on disk by content: the same weights, prompt and sampling are written once, ever."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from limbeck.decoding import Completion, Sampling


def default_folder() -> Path:
    """$XDG_CACHE_HOME/limbeck/teacher, or ~/.cache/limbeck/teacher."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck" / "teacher"


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of a model's weights: names, shapes and every byte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TextCache:
    """Completions of one teacher under one sampling, a JSON line each; a line cut short by a crash is ignored."""

    def __init__(self, folder: Path, teacher: str, sampling: Sampling) -> None:
        key = json.dumps([teacher, asdict(sampling)], sort_keys=True)
        self.path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                self._rows[row["prompt"]] = row

    @staticmethod
    def key(prompt: list[int]) -> str:
        return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()

    def get(self, prompt: list[int]) -> Completion | None:
        row = self._rows.get(self.key(prompt))
        if row is None:
            return None
        return Completion(tokens=row["tokens"], logprobs=row["logprobs"], finish_reason=row["finish_reason"])

    def add(self, prompts: list[list[int]], completions: list[Completion]) -> None:
        """Remembers and appends; a line begun by a killed process is closed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and not self._ends_whole(file):
                file.write(b"\n")
            for prompt, completion in zip(prompts, completions, strict=True):
                row = {
                    "prompt": self.key(prompt),
                    "tokens": completion.tokens,
                    "logprobs": completion.logprobs,
                    "finish_reason": completion.finish_reason,
                }
                self._rows[row["prompt"]] = row
                file.write(json.dumps(row).encode() + b"\n")

    @staticmethod
    def _ends_whole(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
