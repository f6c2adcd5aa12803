"""Prompts are read in pieces: those who are being served wait for one piece at a time, never for a whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

PIECE = 512
"""Columns that a pass over prompts reads at most, padding included: enough to keep two cores busy with arithmetic, and
about two seconds of a model of 1.5 B parameters."""


def together(counts: Sequence[int], most: int = PIECE) -> list[list[int]]:
    """The places of rows that read so many columns each, in groups that are read in one pass: similar ones together,
    the longest first. A group is padded to `most` columns at most, unless one row alone is longer, and no row to more
    than twice its own."""
    groups: list[list[int]] = []
    for place in sorted(range(len(counts)), key=lambda place: -counts[place]):
        longest = counts[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= most and longest <= 2 * counts[place]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
