"""osd-ablation: what is minimised x how much an update waits for x which positions are kept."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

from limbeck.online import Pace, Training
from limbeck.online.buffer import Positions
from limbeck.pipeline.cells import Cells
from limbeck.studies.acceptance import along, ends, fresh, shuffled, stream_facts, taught
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
    result.remarks += material.head_words("the domain's own texts")
    for seed, objective, times, positions in product(range(setting.seeds), OBJECTIVES, SIZES, POSITIONS):
        size = round(setting.update_size * times)
        training, pace = Training(objective, learning_rate=setting.learning_rate), Pace(update_size=size)
        facts = {**stream_facts(material, domain), **taught(training, pace, positions), "seed": seed}
        facts["prompts"] = material.digest(domain, setting.requests)
        compute = partial(_stream, material, seed, training, pace, positions)
        found = cells.get(f"{objective}-{size}-{positions}-{seed}", facts, compute)
        _, end = ends(found["alpha"], found["verified"])
        result.add(objective, seed, {f"updates of {size}, {positions} positions": end}, cells.all[-1])
    return result


def _stream(material: Material, seed: int, training: Training, pace: Pace, positions: Positions) -> dict[str, Any]:
    setting, vocabulary = material.setting, material.vocabulary
    build = material.building(setting.domains[0])
    stream = shuffled(material.answers(setting.domains[0], setting.requests), seed)
    name = f"ablation-{training.objective}-{pace.update_size}-{positions}-{seed}"
    with fresh(setting.work / "versions" / name) as folder:
        replay = Replay(build, vocabulary, folder, training, pace, setting.gamma, seed, positions=positions)
        return along(replay, stream)
