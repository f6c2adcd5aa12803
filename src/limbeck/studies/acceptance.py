"""osd-acceptance: one stream from each domain; a draft that stays as it is, was trained before, or learns from it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.online import Gate, Pace, Trace, Training
from limbeck.online.buffer import Positions
from limbeck.online.coins import held_out_of
from limbeck.online.learner import mean_known
from limbeck.pipeline.cells import Cells
from limbeck.studies.material import Material
from limbeck.studies.page import Result, Series
from limbeck.studies.replay import Replay, acceptance_on, train_offline
from limbeck.studies.setting import Domain, Setting

_FIFTH = 5  # of a domain's answers one in so many is kept apart, and so are the first and last part of a stream
_OFFLINE = {"epochs": 50, "patience": 6, "replay": 0.0}  # for as long as it gets better, nearly
_ONLINE = ("online", "idle")
_IDLE_WORDS = (
    f"`idle` learns online, too, but nobody is served while an update trains: it takes {Training().idle_epochs} epochs "
    f"at most, where one beside traffic takes {Training().epochs}. "
)
_OFFLINE_WORDS = (
    "`offline` was trained on the same requests, with all positions, until a tenth of them got no better, or for "
    f"{_OFFLINE['epochs']} epochs; its level line is what it has apart. "
)


def run(setting: Setting, cells: Cells) -> Result:
    """Of each domain a fifth of the answers is kept apart to measure by; the others are the stream, of `requests` at
    most, and what the offline draft is trained on."""
    material = Material(setting, cells.say)
    result = Result(
        "Acceptance along a stream of one domain",
        f"{material.words}; {setting.requests} requests a domain, or all but a fifth, answers of at most "
        f"{setting.max_tokens} tokens at temperature {setting.temperature:g}, {setting.gamma} drafted tokens. "
        f"{_OFFLINE_WORDS if 'offline' in setting.arms else ''}"
        f"{_IDLE_WORDS if 'idle' in setting.arms else ''}*Apart*: on a fifth of the requests, which none of them "
        "was trained on",
    )
    for domain, arm in product(setting.domains, setting.arms):
        for seed in range(1 if arm == "static" else setting.seeds):
            facts = _facts(material, domain, seed, arm)
            found = cells.get(f"{domain.name}-{arm}-{seed}", facts, partial(_arm, material, domain, seed, arm))
            result.add(arm, seed, summary(domain.name, found), cells.all[-1])
            result.series.append(Series(domain.name, arm, seed, found["curve"]))
    for domain in setting.domains:
        _compare(result, domain.name)
    result.remarks.append(material.tail_words([(domain, *_counts(setting)) for domain in setting.domains]))
    result.remarks += material.head_words("the domain's own texts")
    return result


def stream_facts(material: Material, *domains: Domain) -> dict[str, Any]:
    """What every cell of a replayed stream of these domains depends on, beside prompts and training."""
    ids_D = material.head(*domains)
    head = {} if ids_D is None else {"head": hashlib.sha256(repr(ids_D.tolist()).encode()).hexdigest()}
    return {**material.setting.facts("layers", "max_tokens", "temperature", "gamma"), **material.facts, **head}


def _counts(setting: Setting) -> tuple[int, int]:
    """(prompts that are asked for, and at least)."""
    return setting.requests + setting.requests // (_FIFTH - 1), 2 * _FIFTH


def _facts(material: Material, domain: Domain, seed: int, arm: str) -> dict[str, Any]:
    setting = material.setting
    facts = {
        **stream_facts(material, domain),
        "prompts": material.digest(domain, *_counts(setting)),
        "seed": seed,
        "arm": arm,
    }
    if arm == "offline":
        facts |= asdict(_offline(setting))
    return facts | (taught(Training(learning_rate=setting.learning_rate), _pace(setting)) if arm in _ONLINE else {})


def taught(training: Training, pace: Pace, positions: Positions = "all") -> dict[str, Any]:
    """What a draft that learns from a stream depends on, for a cell's facts."""
    parts = {"training": training, "pace": pace, "gate": Gate(), "held_out": held_out_of(positions)}
    return {name: asdict(part) for name, part in parts.items()} | {"positions": positions}


def _offline(setting: Setting) -> Training:
    return replace(Training(learning_rate=setting.learning_rate), **_OFFLINE)


def _pace(setting: Setting) -> Pace:
    return Pace(update_size=setting.update_size)


def _arm(material: Material, domain: Domain, seed: int, arm: str) -> dict[str, Any]:
    setting, build = material.setting, material.building(domain)
    answers = material.answers(domain, *_counts(setting))
    apart = answers[::_FIFTH]
    stream = shuffled([answer for place, answer in enumerate(answers) if place % _FIFTH], seed)
    facts = {"requests": len(stream), "requests apart": len(apart)}
    if arm == "offline":
        learner = build()
        steps = train_offline(learner, stream, _offline(setting), seed)
        alpha = acceptance_on(learner, apart)
        curve = [(0.0, alpha), (float(len(stream)), alpha)]
        return {"apart": alpha, "curve": curve, "steps": steps, "known": mean_known(learner, apart), **facts}
    with fresh(setting.work / "versions" / f"{domain.name}-{arm}-{seed}") as folder:
        training = Training(learning_rate=setting.learning_rate)
        replay = Replay(
            build,
            material.vocabulary,
            folder,
            training,
            _pace(setting),
            setting.gamma,
            seed,
            learns=arm in _ONLINE,
            idle=arm == "idle",
        )
        found = along(replay, stream)
    found["curve"] = windowed(found["alpha"], found["verified"])
    serving = replay.serving
    return {**found, "apart": acceptance_on(serving, apart), "known": mean_known(serving, apart), **facts}


def _compare(result: Result, domain: str) -> None:
    """What the online drafts reach beside the others, seed by seed."""
    metric = f"{domain}: alpha apart, at the end"
    found = {(n.method, n.seed): n for n in result.numbers if n.metric == metric}
    for (arm, seed), online in list(found.items()):
        if arm in _ONLINE:
            for other in (other for other in (("static", 0), ("offline", seed)) if other in found):
                gain = online.value - found[other].value
                result.add(f"{arm} - {other[0]}", seed, {metric: gain}, online.cell)


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """The folder, empty: a draft's versions of a cell that was killed are not gone on with. Gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def shuffled(traces: Sequence[Trace], seed: int) -> list[Trace]:
    order = np.random.default_rng(seed).permutation(len(traces))
    return [traces[place] for place in order]


def along(replay: Replay, stream: Sequence[Trace]) -> dict[str, Any]:
    """Serves the stream: what a cell keeps of it."""
    points = replay.run(stream)
    return {
        "alpha": [point.alpha for point in points],
        "verified": [point.verified for point in points],
        "version": [point.version for point in points],
        "updates": replay.updates,
        "swaps": replay.swaps,
    }


def mean_alpha(alpha: Sequence[float], verified: Sequence[int]) -> float:
    """Over positions."""
    return float(np.average(alpha, weights=np.maximum(verified, 1e-9)))


def windowed(alpha: Sequence[float], verified: Sequence[int], windows: int = 20) -> list[tuple[float, float]]:
    """(requests served, mean alpha) of equal parts of the stream."""
    edges = np.linspace(0, len(alpha), min(windows, len(alpha)) + 1).astype(int)
    return [
        (float(end), mean_alpha(alpha[start:end], verified[start:end]))
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]


def summary(domain: str, found: dict[str, Any]) -> dict[str, float]:
    numbers = {f"{domain}: alpha apart, at the end": found["apart"]}
    numbers |= {f"{domain}: {name}": found[name] for name in ("requests", "requests apart")}
    if found.get("known") is not None:  # cells of before p(D) was kept have none
        numbers[f"{domain}: p(D) apart, which no alpha is above"] = found["known"]
    if "alpha" in found:
        first, last = ends(found["alpha"], found["verified"])
        numbers |= {f"{domain}: alpha, first fifth": first, f"{domain}: alpha, last fifth": last}
        numbers |= {f"{domain}: {name}": found[name] for name in ("updates", "swaps")}
    return numbers


def ends(alpha: Sequence[float], verified: Sequence[int]) -> tuple[float, float]:
    """Mean alpha of the first and of the last fifth of a stream."""
    part = max(1, len(alpha) // _FIFTH)
    return mean_alpha(alpha[:part], verified[:part]), mean_alpha(alpha[-part:], verified[-part:])
