"""Sampled completions side by side, with what departs from the teacher's text marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup, escape

from limbeck.report.load import Group, records

LONGEST_DIFF = 400  # words; beyond it, and below the likeness, marking everything would say nothing
LEAST_LIKENESS = 0.4


def marked(text: str, against: str | None) -> Markup:
    """`text` escaped, the words that are not in `against` at their place in <mark>; unmarked where little agrees."""
    if not against or text == against:
        return escape(text)
    words, other = re.findall(r"\S+\s*", text), re.findall(r"\S+\s*", against)
    if max(len(words), len(other)) > LONGEST_DIFF:
        return escape(text)
    matcher = SequenceMatcher(None, [w.strip() for w in other], [w.strip() for w in words], autojunk=False)
    if matcher.ratio() < LEAST_LIKENESS:
        return escape(text)
    leading = text[: len(text) - len(text.lstrip())]
    parts = [escape(leading)]
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = "".join(words[start:end])
        if kind == "equal" or not piece:
            parts.append(escape(piece))
        else:
            bare = piece.rstrip()
            parts.append(Markup("<mark>{}</mark>{}").format(bare, piece[len(bare) :]))
    return Markup("").join(parts)


def cards(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One card a prompt: teacher, student before, and each method's student after; the first seed that has samples."""
    found: dict[str, dict[str, Any]] = {}
    several = len(groups) > 1
    for group in groups:
        found_in = (records(run.evaluation.get("samples")) for run in group.runs)
        samples = next((samples for samples in found_in if samples), [])
        for sample in samples:
            if sample.get("prompt") is None:
                continue
            prompt = str(sample["prompt"])
            card = found.setdefault(prompt, {"prompt": prompt, "reference": None, "cells": [], "teacher": None})
            if card["reference"] is None and sample.get("reference") is not None:
                card["reference"] = str(sample["reference"])
            if card["teacher"] is None and sample.get("teacher") is not None:
                card["teacher"] = str(sample["teacher"])
            heads = (("Teacher", "teacher"), ("Student before", "before"))
            for head, part in heads:
                _add(card["cells"], head, sample.get(part), group.label)
            after = group.label if several else "Student after"
            if sample.get("after") is not None:
                card["cells"].append({"head": after, "key": group.key, "text": str(sample["after"])})
    for card in found.values():
        order = {"Teacher": 0, "Student before": 1}
        card["cells"].sort(key=lambda cell: order.get(cell["head"].split(" of ")[0], 2))
        for cell in card["cells"]:
            cell["marked"] = marked(cell["text"], card["teacher"])
    return [card for card in found.values() if card["cells"]]


def _add(cells: list[dict[str, Any]], head: str, text: object, label: str) -> None:
    """A text that every run shares stands once; another one says whose it is."""
    if text is None:
        return
    same = [cell for cell in cells if cell["head"].split(" of ")[0] == head]
    if any(cell["text"] == str(text) for cell in same):
        return
    cells.append({"head": f"{head} of {label}" if same else head, "key": None, "text": str(text)})


def rollouts(groups: Sequence[Group], most: int = 8) -> list[dict[str, Any]]:
    """A few training rollouts, spread over the run and over the methods."""
    each = max(2, most // max(1, len(groups)))
    chosen: list[dict[str, Any]] = []
    for group in groups:
        samples = next((run.samples for run in group.runs if run.samples), [])
        if not samples:
            continue
        places = sorted({round(k * (len(samples) - 1) / max(1, each - 1)) for k in range(min(each, len(samples)))})
        chosen += [{**samples[place], "label": group.label, "key": group.key} for place in places]
    return chosen
