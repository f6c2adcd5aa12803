"""osd-ablation: what is minimised x how much an update waits for x which positions are kept."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

from limbeck.online import Training
from limbeck.online.buffer import Positions
from limbeck.studies.acceptance import STREAM, along, fresh, shuffled, summary
from limbeck.studies.cells import Cells
from limbeck.studies.material import Material
from limbeck.studies.page import Result
from limbeck.studies.replay import Replay
from limbeck.studies.setting import Setting

OBJECTIVES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "blend")
SIZES = (0.5, 1, 2)  # times the setting's update size
POSITIONS: tuple[Positions, ...] = ("rejected", "all")


def run(setting: Setting, cells: Cells) -> Result:
    """The first domain: one stream for every combination, from one start."""
    domain, material = setting.domains[0], Material(setting, cells.say)
    result = Result(
        "Divergence, update size and positions",
        f"{material.words}; {setting.requests} requests of {domain.name}, answers of at most {setting.max_tokens} "
        f"tokens at temperature {setting.temperature:g}; alpha of the last fifth of the stream",
    )
    for seed, objective, times, positions in product(range(setting.seeds), OBJECTIVES, SIZES, POSITIONS):
        size = round(setting.update_size * times)
        facts = {**setting.facts(*STREAM), "domain": vars(domain), "seed": seed, "update_size": size}
        facts |= {"objective": objective, "positions": positions}
        compute = partial(_stream, material, seed, objective, size, positions)
        found = cells.get(f"{objective}-{size}-{positions}-{seed}", facts, compute)
        end = summary("", found)[": alpha, last fifth"]
        result.add(objective, seed, {f"updates of {size}, {positions} positions": end}, cells.all[-1])
    return result


def _stream(material: Material, seed: int, objective: str, size: int, positions: Positions) -> dict[str, Any]:
    setting = material.setting
    replay = Replay(
        material.build,
        material.vocabulary,
        fresh(setting.work / "versions" / f"ablation-{objective}-{size}-{positions}-{seed}"),
        Training(objective, learning_rate=setting.learning_rate),
        size,
        setting.gamma,
        seed,
        positions=positions,
    )
    return along(replay, shuffled(material.answers(setting.domains[0], setting.requests), seed))
