"""osd-speedup: tokens/s of whole streams beside plain decoding of the same engine, draft kinds side by side, and beside
the formula at the alpha, gamma and cost that were measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import GenerationConfig

from limbeck.decoding import Sampling
from limbeck.decoding.adaptive import Adaptive
from limbeck.decoding.controller import Controller, Fixed
from limbeck.decoding.drafts import Draft
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.drafts.model import ModelDraft
from limbeck.decoding.drafts.ngram import NgramDraft
from limbeck.decoding.requests import Request
from limbeck.decoding.speculative import Engine
from limbeck.models import eos_tokens, load_model, set_vocabulary
from limbeck.pipeline.cells import Cells
from limbeck.studies.material import Material
from limbeck.studies.page import Result
from limbeck.studies.setting import Domain, Setting

GAMMAS = (3, 5, 7)
PEERS = ("transformers, assisted", "transformers, prompt lookup")
_DRAFT, _NGRAM = "draft", "ngram"


@dataclass
class Run:
    """Sums over prompts. `tokens`, `seconds` and `timed` rounds: after the step that reads the prompt, which is a round
    too; the rest, `rounds` among it, is of all rounds but the reading."""

    tokens: int = 0
    seconds: float = 0.0
    timed: int = 0
    drafted: int = 0
    verified: int = 0
    alpha_sum: float = 0.0
    rounds: int = 0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def run(setting: Setting, cells: Cells) -> Result:
    """Of each domain and way of drafting: every prompt is answered plainly and drafted, one after the other, so that
    both see the same machine; the speed-up is the ratio of the two."""
    material = Material(setting, cells.say)
    result = Result(
        "Tokens/s beside plain decoding",
        f"{material.words}, weights {setting.weights}; {setting.requests} prompts a domain, batch 1, at most "
        f"{setting.max_tokens} tokens, temperature {setting.temperature:g}. The reading of prompts is not counted",
    )
    result.remarks += material.head_words("the texts of all these domains")
    names = ("layers", "max_tokens", "temperature")
    ways = {**dict.fromkeys(_ways(material), _measure), **dict.fromkeys(PEERS, _peer)}
    for domain, way in product(setting.domains, ways):
        if way == "transformers, assisted" and setting.draft is None:
            continue  # it has no way to cut one
        own = () if way in PEERS else ("head_rows", "weights")
        facts = {**setting.facts(*names, *own), **material.facts, "way": way, "seed": 0}
        facts["prompts"] = material.digest(domain, setting.requests)
        found = cells.get(f"{domain.name}-{way}", facts, partial(ways[way], material, domain, way))
        result.add(way, 0, {f"{domain.name}: {name}": value for name, value in found.items()}, cells.all[-1])
    return result


def _ways(material: Material) -> dict[str, Callable[[], tuple[dict[str, Draft], Controller]]]:
    """By its name: the drafts and the controller of an engine, fresh ones at each call."""

    def fixed(gamma: int) -> tuple[dict[str, Draft], Controller]:
        return {_DRAFT: make_draft(material)}, Fixed(_DRAFT, gamma)

    def adaptive(*, model: bool, ngrams: bool) -> tuple[dict[str, Draft], Controller]:
        shared = NgramDraft()
        drafts: dict[str, Draft] = {_DRAFT: make_draft(material)} if model else {}
        if ngrams:
            drafts[_NGRAM] = shared
        return drafts, Adaptive(_DRAFT if model else None, ngram=(_NGRAM, shared) if ngrams else None)

    return {
        **{f"{gamma} drafted": partial(fixed, gamma) for gamma in GAMMAS},
        "adaptive": partial(adaptive, model=True, ngrams=False),
        "adaptive, n-grams": partial(adaptive, model=True, ngrams=True),
        "n-grams alone": partial(adaptive, model=False, ngrams=True),
    }


def make_draft(material: Material) -> ModelDraft:
    """The draft with the weights and the head rows of the setting."""
    setting, source = material.setting, material.target
    if setting.draft is not None:
        source: Any = load_model(setting.draft, dtype=material.target.dtype)
        set_vocabulary(source, material.vocabulary)
    rows = material.head(*setting.domains)
    if material.layers is None:
        return ModelDraft(source, weights=setting.weights, ids_D=rows)
    return layers_draft(source, material.layers, weights=setting.weights, ids_D=rows)


def _measure(material: Material, domain: Domain, way: str) -> dict[str, float]:
    setting, target = material.setting, material.target
    drafts, controller = _ways(material)[way]()
    drafted = Engine(target, material.tokenizer, drafts, controller, max_batch=1)
    plain = Engine(target, material.tokenizer, {}, Fixed(None, 0), max_batch=1, reader=drafted.reader)
    drafted.probe()
    sampling = Sampling(setting.max_tokens, temperature=setting.temperature, stop_tokens=_stops(material))
    prompts = material.prompts(domain, setting.requests)
    for engine in (plain, drafted):  # caches and kernels warm
        _answer(engine, Request("warm", tuple(prompts[0]), Sampling(8, temperature=0)), Run())
    drafted.seconds.draft = drafted.seconds.verify = 0.0
    ours, theirs = Run(), Run()
    for place, prompt in enumerate(prompts):
        request = Request(str(place), tuple(prompt), sampling, stream=(place,))
        _answer(plain, request, theirs)
        _answer(drafted, request, ours)
    return _figures(ours, theirs, drafted)


def _stops(material: Material) -> tuple[int, ...]:
    return tuple(eos_tokens(material.target, material.tokenizer))


def _answer(engine: Engine, request: Request, sums: Run) -> list[int]:
    engine.add(request)
    tokens: list[int] = []
    while not tokens:  # reads the prompt, in pieces if it is long, and writes at once some
        tokens = [token for event in engine.step() for token in event.tokens]
    written, start = len(tokens), time.perf_counter()
    while engine.busy:
        for event in engine.step():
            tokens += event.tokens
            if event.counters is not None:
                counters = event.counters
                sums.drafted += counters.drafted
                sums.verified += counters.verified
                sums.alpha_sum += counters.alpha_sum
                sums.rounds += counters.rounds - 1
                sums.timed += counters.rounds - 2
    sums.seconds += time.perf_counter() - start
    sums.tokens += len(tokens) - written
    return tokens


def _figures(ours: Run, theirs: Run, engine: Engine) -> dict[str, float]:
    """Also the formula (1 - a^(g+1)) / ((1 - a) (g c + v)) at the measured mean block length g, cost c of a drafted
    token and v of a verifying pass, both in plain steps (Leviathan et al. 2023, theorem 3.8, where v = 1)."""
    rounds = max(ours.rounds, 1)
    alpha = ours.alpha_sum / max(ours.verified, 1)
    gamma = ours.drafted / rounds
    step_s = theirs.seconds / theirs.tokens
    cost = engine.seconds.draft / max(ours.drafted, 1) / step_s
    verify = engine.seconds.verify / rounds / step_s
    expected = (1 - alpha ** (gamma + 1)) / (1 - alpha) if alpha < 1 else gamma + 1
    formula = expected / (gamma * cost + verify)
    speedup = ours.speed / theirs.speed
    return {
        "tokens/s": ours.speed,
        "plain tokens/s": theirs.speed,
        "speed-up": speedup,
        "alpha": alpha,
        "drafted a round": gamma,
        "written a round": ours.tokens / max(ours.timed, 1),
        "cost of a drafted token, plain steps": cost,
        "cost of a verifying pass, plain steps": verify,
        "formula": formula,
        "speed-up over the formula": speedup / formula,
    }


def _peer(material: Material, domain: Domain, way: str) -> dict[str, float]:
    """transformers' own assisted generation with the same draft, or its prompt lookup, as it comes. The reading of a
    prompt is taken off by the time of one token alone."""
    setting, stops = material.setting, _stops(material)
    target: Any = material.target
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if way == "transformers, assisted":
        options = {"assistant_model": load_model(str(setting.draft), dtype=target.dtype)}
    shared = {"do_sample": setting.temperature > 0, "eos_token_id": list(stops), "pad_token_id": stops[0]}
    if setting.temperature:
        shared |= {"temperature": setting.temperature, "top_k": 0, "top_p": 1.0}
    target.generation_config = GenerationConfig()  # a folder's own would draw from another distribution
    seconds, tokens = 0.0, 0
    for prompt in material.prompts(domain, setting.requests):
        ids_BT = torch.tensor([prompt])
        shared["attention_mask"] = torch.ones_like(ids_BT)
        start = time.perf_counter()
        target.generate(ids_BT, max_new_tokens=1, **shared)
        read_s = time.perf_counter() - start
        written_BT = target.generate(ids_BT, max_new_tokens=setting.max_tokens, **shared, **options)
        seconds += time.perf_counter() - start - 2 * read_s
        tokens += written_BT.shape[1] - len(prompt) - 1
    return {"tokens/s": tokens / seconds}
