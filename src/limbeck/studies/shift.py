"""osd-shift: the traffic changes from one domain to another, then both come mixed: the dip, the recovery, and what is
forgotten of the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from limbeck.errors import RecipeError
from limbeck.online import Pace, Training
from limbeck.pipeline.cells import Cells
from limbeck.studies.acceptance import along, fresh, mean_alpha, shuffled, stream_facts, taught, windowed
from limbeck.studies.material import Material
from limbeck.studies.page import Result, Series
from limbeck.studies.replay import Replay, acceptance_on
from limbeck.studies.setting import Domain, Setting

_HELD = 0.1  # of the first domain's answers: never served, to see what is forgotten
_RECOVERED = 0.95  # of the plateau
_SMOOTH = 20  # requests that a running mean is over
_REMEMBERED = 256  # traces of any earlier time
ARMS = {"replay": 0.5, "new ones alone": 0.0}
"""The share of an update's batches that are of earlier requests."""


def run(setting: Setting, cells: Cells) -> Result:
    """The first two domains: `requests` of the one, `requests` of the other, then `requests` of both in turn."""
    if len(setting.domains) < 2:
        raise RecipeError(f"osd-shift: expected two domains, found {len(setting.domains)}: name another by --domain")
    first, second = setting.domains[:2]
    material, held, count = Material(setting, cells.say), _held(setting), setting.requests
    result = Result(
        f"From {first.name} to {second.name}, then both",
        f"{material.words}; {count} requests of each stage, updates of {setting.update_size} positions. "
        f"What is forgotten is measured on {held} other requests of {first.name}",
    )
    result.remarks += material.head_words("the texts of the first two domains")
    for seed, arm in product(range(setting.seeds), ARMS):
        training, pace = _training(setting, ARMS[arm]), Pace(update_size=setting.update_size)
        facts = {**stream_facts(material, first, second), "requests": count, **taught(training, pace), "seed": seed}
        facts["prompts"] = [material.digest(domain, asked) for domain, asked in _asked(setting)]
        found = cells.get(f"shift-{arm}-{seed}", facts, partial(_stages, material, seed, training, pace))
        result.add(arm, seed, summary(found, count, first.name, second.name), cells.all[-1])
        result.series.append(Series("stream", arm, seed, windowed(found["alpha"], found["verified"], 60)))
    return result


def _held(setting: Setting) -> int:
    return max(8, round(setting.requests * _HELD))


def _training(setting: Setting, share: float) -> Training:
    return Training(learning_rate=setting.learning_rate, replay=share)


def _asked(setting: Setting) -> list[tuple[Domain, int]]:
    """Prompts of each domain: a stage, half of the mixed one, and of the first those that are held out."""
    each = setting.requests + (setting.requests + 1) // 2
    first, second = setting.domains[:2]
    return [(first, each + _held(setting)), (second, each)]


def _stages(material: Material, seed: int, training: Training, pace: Pace) -> dict[str, Any]:
    """The stream, and the acceptance on the held-out requests of the first domain before it and after each stage."""
    setting = material.setting
    count, held = setting.requests, _held(setting)
    firsts, seconds = (material.answers(*asked) for asked in _asked(setting))
    apart, firsts, seconds = firsts[:held], shuffled(firsts[held:], seed), shuffled(seconds, seed)
    both = [trace for pair in zip(firsts[count:], seconds[count:], strict=True) for trace in pair][:count]
    with fresh(setting.work / "versions" / f"shift-{training.replay}-{seed}") as folder:
        remembered = _REMEMBERED if training.replay else 0
        build = material.building(*setting.domains[:2])
        replay = Replay(build, material.vocabulary, folder, training, pace, setting.gamma, seed, remembered=remembered)
        kept, parts = [acceptance_on(replay.serving, apart)], []
        for stage in (firsts[:count], seconds[:count], both):
            parts.append(along(replay, stage))
            kept.append(acceptance_on(replay.serving, apart))
    whole = {name: sum((part[name] for part in parts), []) for name in ("alpha", "verified", "version")}
    return {**parts[-1], **whole, "kept": kept}


def summary(found: dict[str, Any], count: int, first: str, second: str) -> dict[str, float]:
    alpha, verified = found["alpha"], found["verified"]
    part = max(1, count // 5)
    plateau = mean_alpha(alpha[2 * count - part : 2 * count], verified[2 * count - part : 2 * count])
    return {
        f"alpha on {first}, end of its stage": mean_alpha(alpha[count - part : count], verified[count - part : count]),
        f"alpha on {second}, its first {_SMOOTH} requests": mean_alpha(
            alpha[count : count + _SMOOTH], verified[count : count + _SMOOTH]
        ),
        f"alpha on {second}, end of its stage": plateau,
        f"requests until {_RECOVERED:.0%} of that": recovery(
            alpha[count : 2 * count], verified[count : 2 * count], _RECOVERED * plateau
        ),
        f"held-out {first}, at the start": found["kept"][0],
        f"held-out {first}, after its stage": found["kept"][1],
        f"held-out {first}, after {second}": found["kept"][2],
        f"held-out {first}, after the mixed stream": found["kept"][3],
        "swaps": found["swaps"],
    }


def recovery(alpha: Sequence[float], verified: Sequence[int], level: float) -> float:
    """Requests until the mean over the last `_SMOOTH` reaches this level and `_SMOOTH` more keep it in their own mean;
    infinite where they never do."""
    weights = np.maximum(verified, 1e-9)
    ones = np.ones(_SMOOTH)
    means = np.convolve(weights * alpha, ones, "valid") / np.convolve(weights, ones, "valid")
    reached = np.nonzero((means[: -_SMOOTH or None] >= level) & (means[_SMOOTH:] >= level))[0]
    return float(reached[0] + _SMOOTH) if len(reached) else float("inf")
