"""Rows from the problem generators of reasoning-gym (an extra)."""

from __future__ import annotations

from typing import Any

from limbeck.errors import DataError, did_you_mean

PREFIX = "reasoning_gym:"


def gym() -> Any:
    """The package reasoning-gym. DataError where it is not installed."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "expected the package reasoning-gym, found none: pip install 'limbeck[reasoning-gym]'"
        ) from None
    return reasoning_gym


def gym_rows(source: str) -> list[dict[str, Any]]:
    """COUNT rows of `reasoning_gym:NAME:COUNT` or `reasoning_gym:NAME:COUNT:SEED` (seed 0 unless given: training and
    evaluation need two): the question as `prompt`, the answer as `completion` where every problem has one (some puzzles
    have many and name none), and as `entry` all that the generator says."""
    _, name, count, seed, *rest = [*source.split(":"), "", ""]
    if not name or not count.isdecimal() or int(count) == 0 or not (seed or "0").isdecimal() or any(rest):
        raise DataError(
            f"expected {PREFIX}NAME:COUNT or NAME:COUNT:SEED, such as {PREFIX}chain_sum:1000:1, found {source}"
        )
    package = gym()
    known = package.factory.DATASETS
    if name not in known:
        raise DataError(f"{source}: expected a generator of reasoning-gym, found {name!r}{did_you_mean(name, known)}")
    entries = [dict(entry) for entry in package.create_dataset(name, size=int(count), seed=int(seed or 0))]
    answered = all(isinstance(entry["answer"], str) and entry["answer"].strip() for entry in entries)
    return [
        {"prompt": entry["question"], **({"completion": entry["answer"]} if answered else {}), "entry": entry}
        for entry in entries
    ]
