"""Speed and memory of a model that writes for one user."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from limbeck.decoding import Sampling, generate
from limbeck.errors import DataError
from limbeck.models import eos_tokens

REPEATS = 3
RSS_INTERVAL_S = 0.002


def speed(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, float]:
    """Batch 1, greedy, `max_tokens` tokens a prompt (the end is ruled out; fewer only where the context is full):
    medians over the prompts, REPEATS times each, after a warm-up.

    `time_to_first_token_s`: from the prompt to its first token. `tokens_per_s`: written tokens by the time of the whole
    completion, reading the prompt included. `peak_memory_bytes`, over the warm-up on the longest prompt: on CUDA the
    peak of PyTorch's allocator, weights included; on a CPU the peak resident memory of the *whole process*, sampled
    every 2 ms: Python, libraries and every other model in it count. Raises DataError without prompts.
    """
    if not prompts:
        raise DataError("expected at least one prompt to measure the speed on, found none")
    device = next(model.parameters()).device
    stops = eos_tokens(model, tokenizer)

    def write(prompt: Sequence[int], count: int) -> tuple[float, int]:
        """Seconds and tokens."""
        sampling = Sampling(max_tokens=count, min_tokens=count, temperature=0.0, stop_tokens=stops)
        start = time.perf_counter()
        completion = generate(model, [prompt], sampling, batch_size=1)[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, len(completion.tokens)

    with _peak_memory(device) as peak:
        write(max(prompts, key=len), max_tokens)
    repeated = [prompt for prompt in prompts for _ in range(REPEATS)]
    first_s = statistics.median(write(prompt, 1)[0] for prompt in repeated)
    rate = statistics.median(tokens / seconds for seconds, tokens in (write(p, max_tokens) for p in repeated))
    return {"time_to_first_token_s": first_s, "tokens_per_s": rate, "peak_memory_bytes": peak[0]}


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list whose one entry is, after the block, the peak in bytes (see `speed`)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = [0]
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process = psutil.Process(os.getpid())
    peak = [process.memory_info().rss]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(RSS_INTERVAL_S):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], process.memory_info().rss)
