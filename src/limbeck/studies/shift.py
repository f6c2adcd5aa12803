"""osd-shift: the traffic changes from one domain to another, then both come mixed: the dip, the recovery, and what is
forgotten of the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from limbeck.errors import RecipeError
from limbeck.online import Training
from limbeck.studies.acceptance import STREAM, along, fresh, mean_alpha, shuffled, windowed
from limbeck.studies.cells import Cells
from limbeck.studies.material import Material
from limbeck.studies.page import Result, Series
from limbeck.studies.replay import Replay, acceptance_on
from limbeck.studies.setting import Setting

_HELD = 0.1  # of the first domain's answers: never served, to see what is forgotten
_RECOVERED = 0.95  # of the plateau
_SMOOTH = 20  # requests that a running mean is over
_REMEMBERED = 256  # traces of any earlier time
ARMS = {"online": 0.0, "online, replay": 0.25}


def run(setting: Setting, cells: Cells) -> Result:
    """The first two domains: `requests` of the one, `requests` of the other, then `requests` of both in turn."""
    if len(setting.domains) < 2:
        raise RecipeError(f"osd-shift: expected two domains, found {len(setting.domains)}: name another by --domain")
    first, second = setting.domains[:2]
    material, held = Material(setting, cells.say), max(8, round(setting.requests * _HELD))
    result = Result(
        f"From {first.name} to {second.name}, then both",
        f"{material.words}; {setting.requests} requests of each stage, updates of {setting.update_size} positions. "
        f"What is forgotten is measured on {held} other requests of {first.name}",
    )
    for seed, arm in product(range(setting.seeds), ARMS):
        facts = {**setting.facts(*STREAM, "update_size"), "domains": [vars(first), vars(second)]}
        facts |= {"seed": seed, "replay": ARMS[arm]}
        found = cells.get(f"shift-{arm}-{seed}", facts, partial(_stages, material, held, seed, ARMS[arm]))
        result.add(arm, seed, summary(found, setting.requests, first.name, second.name), cells.all[-1])
        result.series.append(Series("stream", arm, seed, windowed(found["alpha"], found["verified"], 60)))
    return result


def _stages(material: Material, held: int, seed: int, share: float) -> dict[str, Any]:
    """The stream, and the acceptance on the held-out requests of the first domain before it and after each stage."""
    setting = material.setting
    count = setting.requests
    each = count + (count + 1) // 2  # a stage, and half of the mixed one
    firsts, seconds = (
        material.answers(domain, each + more) for domain, more in zip(setting.domains[:2], (held, 0), strict=True)
    )
    apart, firsts, seconds = firsts[:held], shuffled(firsts[held:], seed), shuffled(seconds, seed)
    replay = Replay(
        material.build,
        material.vocabulary,
        fresh(setting.work / "versions" / f"shift-{share}-{seed}"),
        Training(learning_rate=setting.learning_rate, replay=share),
        setting.update_size,
        setting.gamma,
        seed,
        remembered=_REMEMBERED if share else 0,
    )
    both = [trace for pair in zip(firsts[count:], seconds[count:], strict=True) for trace in pair][:count]
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
        f"requests until {_RECOVERED:.0%} of that": recovery(alpha[count : 2 * count], _RECOVERED * plateau),
        f"held-out {first}, at the start": found["kept"][0],
        f"held-out {first}, after its stage": found["kept"][1],
        f"held-out {first}, after {second}": found["kept"][2],
        f"held-out {first}, after the mixed stream": found["kept"][3],
        "swaps": found["swaps"],
    }


def recovery(alpha: Sequence[float], level: float) -> float:
    """Requests until the mean of the last `_SMOOTH` reaches this level; infinite where it never does."""
    means = np.convolve(alpha, np.ones(_SMOOTH) / _SMOOTH, "valid")
    reached = np.nonzero(means >= level)[0]
    return float(reached[0] + _SMOOTH) if len(reached) else float("inf")
