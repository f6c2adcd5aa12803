"""A service whose draft learns, on the wall clock: a cold draft, and one that cannot learn."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Result, Row, llama, real_model, say, shared
from limbeck.data import read, render
from limbeck.decoding import Sampling
from limbeck.decoding.controller import Fixed
from limbeck.decoding.requests import Event, Request
from limbeck.decoding.speculative import Engine
from limbeck.models import load_tokenizer
from limbeck.online import Learning
from limbeck.online.learner import acceptances, mean_acceptance, restore
from limbeck.online.server.serving import Options, assemble
from limbeck.online.service import Service

RESAMPLES = 2000


@dataclass
class Traffic:
    """Serves `prompts`, over and over, `clients` at a time, until it is told that it is enough."""

    service: Service
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    clients: int
    served: int = 0

    def until(self, enough: Callable[[int], bool]) -> tuple[int, float]:
        """(tokens, seconds) of the requests that begin before `enough(requests ended)`; the last are waited for."""
        start, tokens, ended = time.perf_counter(), 0, 0
        lock, done = threading.Lock(), threading.Event()
        running = 0

        def begin() -> None:
            nonlocal running
            number = self.served
            self.served += 1
            running += 1
            prompt = self.prompts[number % len(self.prompts)]
            self.service.submit(Request(str(number), tuple(prompt), self.sampling, stream=(number,)), heard)

        def heard(event: Event) -> None:
            nonlocal running, tokens, ended
            with lock:
                tokens += len(event.tokens)
                if event.finish_reason is None:
                    return
                running -= 1
                ended += 1
                if not enough(ended):
                    begin()
                elif not running:
                    done.set()

        with lock:
            for _ in range(self.clients):
                begin()
        done.wait()
        return tokens, time.perf_counter() - start


def alphas_since(learning: Learning, number: int) -> dict[str, float]:
    """Mean alpha_raw of the first version and of the one that serves, at every position of the requests that came
    after trace `number`, of which neither has learnt: what a controller chose to draft does not matter."""
    learner, found = learning.build(), dict[str, float]()
    for name, version in (("alpha", 0), ("alpha_after", learning.serving)):
        restore(learner, learning.versions.weights(version))
        alpha = mean_acceptance(acceptances(learner, learning.buffer.whole_since(number), 2048))
        found[name] = float("nan") if alpha is None else alpha
    return found


# -- a cold draft ------------------------------------------------------------------------------------------------------


def cold(case: str, quick: bool) -> Iterator[Result]:
    target = shared("models/stories260k") if quick else real_model("smollm2-135m-instruct")
    watched, seconds = (1.0, 3.0) if quick else (20.0, 120.0)
    tokenizer = load_tokenizer(target)
    examples, _ = render(read(shared(f"data/{case}_train.jsonl"))[:2000], tokenizer, template=None if quick else "chat")
    prompts = [list(example.tokens[: example.prompt_tokens][:128]) for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        served, described = assemble(Options(str(target), folder=Path(folder)), None)
        say(f"  {described}")
        service = served.service
        learning = service.learning["layers"]
        with service:
            sampling = Sampling(16 if quick else 96, stop_tokens=served.stop_tokens)
            traffic = Traffic(service, prompts, sampling, clients=8)
            traffic.until(after(seconds))
            service.pause()
            before, count = service.snapshot(), learning.buffer.count
            traffic.until(after(watched))
            numbers = alphas_since(learning, count)
            counts = before["drafts"]["layers"]
            numbers |= {"swaps": counts["swaps"], "updates": counts["updates"], "requests": before["requests"]}
            numbers["training_s"] = before["ledger"]["training"]
    numbers["gain"] = numbers["alpha_after"] - numbers["alpha"]
    yield Result("serving-cold", case, "as served", "limbeck serve", "ours", numbers)


def after(seconds: float) -> Callable[[int], bool]:
    end = time.perf_counter() + seconds
    return lambda ended: time.perf_counter() >= end


# -- a draft that cannot learn -----------------------------------------------------------------------------------------


def random_models(folder: Path, quick: bool) -> tuple[Path, Path]:
    """A target that writes a random walk over its tokens, from each to a few others, and a draft of one random layer:
    it could learn the walk by heart alone, place by place. Folders, with a tokenizer of as many tokens."""
    source = shared("models/stories260k") if quick else real_model("smollm2-135m-instruct")
    tokenizer: Any = load_tokenizer(source)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    made: list[Path] = []
    for name, layers, seed in (("target", 6, 1), ("draft", 1, 2)):
        model: Any = llama(
            width=288, layers=layers, heads=6, inner=768, vocabulary=vocabulary, dtype=torch.float32, tied=False
        )
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.weight, std=WALK_STD / 288**0.5)
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        made.append(folder / name)
        model.save_pretrained(made[-1])
        tokenizer.save_pretrained(made[-1])
    return made[0], made[1]


WALK_STD = 8.0
"""Of the logits of the random target: the likeliest of 49 152 tokens gets most of the mass."""


def hopeless(case: str, quick: bool) -> Iterator[Result]:
    """Blocks of requests, plain and drafted in turn; both see the same prompts, one request at a time."""
    blocks, requests, max_tokens = (3, 2, 8) if quick else (60, 20, 64)
    with tempfile.TemporaryDirectory() as folder:
        target, draft = random_models(Path(folder), quick)
        served, described = assemble(Options(str(target), str(draft), folder=Path(folder) / "versions"), None)
        say(f"  {described}")
        service = served.service
        plain = Service(Engine(service.engine.reader.model, served.tokenizer, {}, Fixed(None, 0), max_batch=1))
        generator = torch.Generator().manual_seed(0)
        vocabulary = max(served.tokenizer.get_vocab().values()) + 1
        prompts = torch.randint(3, vocabulary, (blocks * requests, 16), generator=generator).tolist()
        ours, theirs = (Traffic(one, prompts, Sampling(max_tokens), clients=1) for one in (service, plain))
        rates: list[tuple[float, float]] = []
        trained: list[float] = []
        with service, plain:
            for _ in range(blocks):
                settle(service)
                slow = theirs.until(lambda ended: ended >= requests)
                service.resume()
                worked = service.snapshot()["ledger"]["training"]
                fast = ours.until(lambda ended: ended >= requests)
                service.pause()
                trained.append((service.snapshot()["ledger"]["training"] - worked) / fast[1])
                rates.append((fast[0] / fast[1], slow[0] / slow[1]))
            counts = service.snapshot()["drafts"]["model"]
    last = len(rates) // 3
    numbers: dict[str, float] = {"tokens_per_s": float(np.mean([rate for rate, _ in rates]))}
    numbers |= {"plain_tokens_per_s": float(np.mean([rate for _, rate in rates]))}
    for name, part in (("", rates), (", last third", rates[-last:])):
        middle, low, _ = ratio_interval(part, np.mean)
        numbers |= {f"ratio{name}": middle, f"ratio_low{name}": low}
    numbers |= {
        "training_share": float(np.mean(trained)),
        "training_share, last third": float(np.mean(trained[-last:])),
    }
    numbers |= {"alpha": counts["alpha_sum"] / max(counts["verified"], 1), "drafted": counts["drafted"]}
    numbers |= {"updates": counts["updates"], "swaps": counts["swaps"]}
    yield Result("serving-hopeless", case, "as served", "limbeck serve", "ours", numbers)


def settle(service: Service, seconds: float = 1.5) -> None:
    """Waits until nobody trains: updates are paused, a step of one may be at work."""
    worked = -1.0
    while (now := service.snapshot()["ledger"]["training"]) > worked:
        worked = now
        time.sleep(seconds)


def ratio_interval(pairs: Sequence[tuple[Any, Any]], of: Callable[[Any], Any]) -> tuple[float, float, float]:
    """of(firsts) / of(seconds), and its 95 % bootstrap interval over pairs."""
    random = np.random.default_rng(0)

    def ratio(chosen: Sequence[int]) -> float:
        first, second = ([pairs[place][side] for place in chosen] for side in (0, 1))
        return float(of(np.hstack(first)) / of(np.hstack(second)))

    drawn = [ratio(random.integers(len(pairs), size=len(pairs)).tolist()) for _ in range(RESAMPLES)]
    return ratio(range(len(pairs))), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


ROWS = [
    Row(
        "serving-cold",
        "smollm2-135m served with a draft of every other of its layers, cold, 8 clients, temperature 1: after 120 s, "
        "alpha of what serves then and of what served first, on the requests of the next 20 s",
        "gain",
        lambda quick: ["tinystories"] if quick else ["gsm8k", "dolly"],
        cold,
        more_is_better=True,
    ),
    Row(
        "serving-hopeless",
        "a random target of 15 M and a random draft that learns from it in vain, one client, temperature 1: tokens/s "
        "beside plain decoding of the same engine, blocks in turn, 95 % bounds over blocks",
        "ratio",
        lambda quick: ["random walk"],
        hopeless,
        more_is_better=True,
    ),
]
