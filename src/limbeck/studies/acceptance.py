"""osd-acceptance: one stream from each domain; a draft that stays as it is, was trained before, or learns from it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.online import Trace, Training
from limbeck.online.learner import snapshot
from limbeck.studies.cells import Cells
from limbeck.studies.material import Material, from_state
from limbeck.studies.page import Result, Series
from limbeck.studies.replay import Replay, train_offline
from limbeck.studies.setting import Domain, Setting

STREAM = ("target", "draft", "layers", "requests", "max_tokens", "temperature", "gamma", "learning_rate")
"""What every cell of a replayed stream depends on."""

ARMS = ("static", "offline", "online")
_FIFTH = 5  # the end and the beginning of a stream: this part of it
_OFFLINE = {"epochs": 50, "patience": 6}  # for as long as it gets better


def run(setting: Setting, cells: Cells) -> Result:
    """Of each domain twice `requests` answers: the first half teaches the offline draft, the second is the stream."""
    material = Material(setting, cells.say)
    result = Result(
        "Acceptance along a stream of one domain",
        f"{material.words}; {setting.requests} requests a domain, answers of at most {setting.max_tokens} tokens at "
        f"temperature {setting.temperature:g}, {setting.gamma} drafted tokens. `offline` was trained on as many other "
        "requests of the domain, with all positions, until a tenth of them got no better",
    )
    for domain, seed, arm in product(setting.domains, range(setting.seeds), ARMS):
        facts = _facts(setting, domain, seed, arm)
        found = cells.get(f"{domain.name}-{arm}-{seed}", facts, partial(_arm, material, domain, seed, arm))
        result.add(arm, seed, summary(domain.name, found), cells.all[-1])
        result.series.append(Series(domain.name, arm, seed, windowed(found["alpha"], found["verified"])))
    return result


def _facts(setting: Setting, domain: Domain, seed: int, arm: str) -> dict[str, Any]:
    facts = {**setting.facts(*STREAM), "domain": vars(domain), "seed": seed, "arm": arm}
    return facts | (_OFFLINE if arm == "offline" else setting.facts("update_size") if arm == "online" else {})


def _arm(material: Material, domain: Domain, seed: int, arm: str) -> dict[str, Any]:
    setting = material.setting
    answers = material.answers(domain, 2 * setting.requests)
    before, stream = answers[: setting.requests], shuffled(answers[setting.requests :], seed)
    training, build = Training(learning_rate=setting.learning_rate), material.build
    if arm == "offline":
        learner = build()
        train_offline(learner, shuffled(before, seed), replace(training, **_OFFLINE), seed)
        build = partial(from_state, build, snapshot(learner))
    replay = Replay(
        build,
        material.vocabulary,
        fresh(setting.work / "versions" / f"{domain.name}-{arm}-{seed}"),
        training,
        setting.update_size,
        setting.gamma,
        seed,
        learns=arm == "online",
    )
    return along(replay, stream)


def fresh(folder: Path) -> Path:
    """The folder, empty: a draft's versions of a cell that was killed are not gone on with."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


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
    alpha, verified = found["alpha"], found["verified"]
    part = max(1, len(alpha) // _FIFTH)
    return {
        f"{domain}: alpha, first fifth": mean_alpha(alpha[:part], verified[:part]),
        f"{domain}: alpha, last fifth": mean_alpha(alpha[-part:], verified[-part:]),
        f"{domain}: swaps": found["swaps"],
    }
