"""The papers' claims as commands: `limbeck study NAME`. A study's cells are kept on disk; it writes a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from limbeck.errors import RecipeError, did_you_mean
from limbeck.pipeline.cells import Cells, Say
from limbeck.studies import ablation, acceptance, shift, speedup
from limbeck.studies.page import Result, write
from limbeck.studies.setting import Domain, Setting

STUDIES: dict[str, Callable[[Setting, Cells], Result]] = {
    "osd-acceptance": acceptance.run,
    "osd-shift": shift.run,
    "osd-speedup": speedup.run,
    "osd-ablation": ablation.run,
}


def study(name: str, setting: Setting, say: Say) -> Path:
    """Runs the cells of a study that were not run before and writes NAME.md, .csv and .png into `setting.out`. The
    page's path. RecipeError for an unknown study."""
    if name not in STUDIES:
        raise RecipeError(f"study: expected one of {', '.join(STUDIES)}; found {name!r}{did_you_mean(name, STUDIES)}")
    cells = Cells(setting.work / name, say)
    return write(name, STUDIES[name](setting, cells), setting.out)


__all__ = ["STUDIES", "Cells", "Domain", "Result", "Setting", "study"]
