"""The model card that lies beside a student's weights."""

from __future__ import annotations

from typing import Any

from limbeck.methods import METHODS
from limbeck.recipe import Recipe


def model_card(recipe: Recipe, evaluation: dict[str, Any]) -> str:
    """README.md of the student's folder: what it is, how it was made, what was measured."""
    method = METHODS[recipe.method]
    parts = [evaluation[part] for part in ("before", "metrics", "teacher_metrics")]
    numbers = "\n".join(
        f"| {name} | {' | '.join(_shown(part.get(name)) for part in parts)} |" for name in evaluation["metrics"]
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation, limbeck, {recipe.method}]
---
# A student distilled by limbeck

{method.label} ({method.paper}) from `{recipe.teacher or "no teacher"}`, {evaluation["steps"]} optimiser steps.

| measure | before | after | teacher |
|---|---|---|---|
{numbers}

Intervals and the machine stand in the run's `evaluation.json` and `environment.json`. The recipe:

```yaml
{recipe.yaml()}```
"""


def _shown(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['mean']:.4f}"
