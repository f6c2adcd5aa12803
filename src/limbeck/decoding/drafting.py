"""Whoever is chosen to draft for a round does so, and what it takes is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from limbeck.decoding.controller import Controller
from limbeck.decoding.drafts import Block, Draft
from limbeck.decoding.live import Live


@dataclass
class Drafting:
    """A round's blocks, one a row (None: nothing), and by draft what they took: see `Round`."""

    blocks: list[Block | None]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    step_seconds: dict[str, float] = field(default_factory=dict[str, float])
    read: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])


def drafted(rows: Sequence[Live], drafts: Mapping[str, Draft], controller: Controller) -> Drafting:
    """Blocks for these rows by the controller's choice. A draft that gives NaN is benched."""
    for row in rows:
        row.behind = {name: draft.behind(row) for name, draft in drafts.items()}
    groups: dict[str, dict[Live, int]] = {}
    for row, choice in zip(rows, controller.plan(rows), strict=True):
        name, most = choice.draft, min(choice.gamma, row.left - 1)
        if name is not None and most > 0 and not (row.alone or drafts[name].benched):
            groups.setdefault(name, {})[row] = most
    drafting = Drafting([None] * len(rows))
    places = {row: place for place, row in enumerate(rows)}
    for name, most in groups.items():
        start = perf_counter()
        proposal = drafts[name].propose(list(most), list(most.values()), partial(controller.go_on, name))
        if proposal.finite:
            for line, row in enumerate(proposal.rows):
                if proposal.tokens[line]:
                    drafting.blocks[places[row]] = Block(name, proposal, line)
        else:
            drafts[name].benched = True
        seconds = drafting.seconds[name] = perf_counter() - start
        if proposal.steps:
            drafting.step_seconds[name] = (seconds - proposal.read_seconds) / proposal.steps
        if proposal.read:
            drafting.read[name] = proposal.read, proposal.read_seconds
    return drafting
