"""What the rows share: results, contenders measured in turn, peers, models of a given size."""

from __future__ import annotations

import ctypes
import gc
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.models.linear import FastLinear

MIB = 1 << 20
SHARED = Path(__file__).resolve().parents[2] / "shared"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Side = Literal["ours", "peer", "floor", "none"]


class Skipped(Exception):
    """This machine lacks what a row needs."""


@dataclass(frozen=True)
class Result:
    """One line of a row's table. `numbers` by name, units in the names; `case` and `dtype` say what ratios compare."""

    row: str
    case: str
    dtype: str
    who: str
    side: Side
    numbers: dict[str, float] = field(default_factory=dict[str, float])
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One family of measurements. `cases(quick)` run in a child process each; `run(case, quick)` yields results.
    Ratios compare `metric`, of which less is better unless `more_is_better`."""

    name: str
    about: str
    metric: str
    cases: Callable[[bool], list[str]]
    run: Callable[[str, bool], Iterator[Result]]
    more_is_better: bool = False


@dataclass(frozen=True)
class Contender:
    """`run(prepare())` is measured, `prepare` is not."""

    who: str
    side: Side
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Fastest round (s), highest peak over what was resident before (bytes), what the last round returned, or why there
    is none."""

    seconds: float = float("inf")
    peak_bytes: int = 0
    output: Any = None
    failure: str = ""

    @property
    def numbers(self) -> dict[str, float]:
        return {"seconds": self.seconds, "peak_mib": self.peak_bytes / MIB}


def in_turn(contenders: Sequence[Contender], rounds: int, warm_up: bool = True) -> dict[str, Timing]:
    """Rounds in which each contender runs once, one after the other; the warm-up round is not counted. A peer that
    raises is left out from there on."""
    timings = {contender.who: Timing() for contender in contenders}
    for counted in [*([False] if warm_up else []), *[True] * rounds]:
        for contender in contenders:
            timing = timings[contender.who]
            if timing.failure:
                continue
            timing.output = None
            try:
                timing.output, seconds, peak_bytes = measured(contender)
            except Exception as error:
                if contender.side != "peer":
                    raise
                timing.failure = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if counted:
                timing.seconds = min(timing.seconds, seconds)
                timing.peak_bytes = max(timing.peak_bytes, peak_bytes)
            say(f"  {contender.who}: {seconds:.3f} s{'' if counted else ' (warm-up)'}")
    return timings


def measured(contender: Contender) -> tuple[Any, float, int]:
    """(what it returns, seconds, peak bytes over what is resident once it is prepared)."""
    gc.collect()  # what the one before has left
    state = contender.prepare()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed memory goes back to the system now: it would hide in the resident size
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    start = time.perf_counter()
    output = contender.run(state)
    seconds = time.perf_counter() - start
    return output, seconds, max(0, resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {name} in /proc/self/status, found none: this benchmark needs Linux")


def peer(module: str) -> ModuleType | None:
    """A module of a peer, or None where the peer is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.partition(".")[0] != error.name.partition(".")[0]:
            raise
        return None


def say(line: str) -> None:
    """Progress, beside the table."""
    print(line, file=sys.stderr, flush=True)


def plain(model: Any) -> Any:
    """The model as transformers builds it, for a peer: limbeck makes its linear layers take the faster product."""
    module: Any
    for module in model.modules():
        if type(module) is FastLinear:
            setattr(module, "__class__", torch.nn.Linear)  # noqa: B010 (pyright)
    return model


def llama(
    *, width: int, layers: int, heads: int, inner: int, vocabulary: int, dtype: torch.dtype, tied: bool = True
) -> LlamaForCausalLM:
    """A random Llama without EOS, in eval mode, the same at every call. `tied`: of its embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def llama_15m(dtype: torch.dtype, quick: bool) -> LlamaForCausalLM:
    """15 M parameters, vocabulary 32 000 (quick: 256)."""
    if quick:
        return llama(width=32, layers=2, heads=2, inner=64, vocabulary=256, dtype=dtype)
    return llama(width=288, layers=6, heads=6, inner=768, vocabulary=32_000, dtype=dtype)


def llama_50m(dtype: torch.dtype, quick: bool) -> LlamaForCausalLM:
    """48 M parameters, vocabulary 32 000 (quick: 256)."""
    if quick:
        return llama(width=64, layers=2, heads=2, inner=128, vocabulary=256, dtype=dtype)
    return llama(width=512, layers=10, heads=8, inner=1376, vocabulary=32_000, dtype=dtype)


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, none of them 0 (the pad) or 1."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocabulary, (count, length), generator=generator).tolist()


def shared(place: str) -> Path:
    """A file or folder of ../shared. Skipped where there is none."""
    path = SHARED / place
    if not path.exists():
        raise Skipped(f"needs {path}")
    return path


def real_model(name: str) -> Path:
    """The folder of a real model, made at the first call (minutes). Skipped where it cannot be made."""
    command = [sys.executable, str(shared("get-model")), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Skipped(f"{name}: ../shared/get-model could not make it")
    return Path(done.stdout.splitlines()[-1])
