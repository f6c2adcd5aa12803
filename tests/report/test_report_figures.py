"""Pictures as SVG files: whole, and with their points where the numbers say."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from limbeck.report import exposure_figure, reliability_figure

CALIBRATION: dict[str, Any] = {
    "ece": 0.0625,
    "accuracy": 0.5,
    "confidence": 0.5,
    "count": 1000,
    "bins": [
        {"low": 0.2, "high": 0.3, "count": 250, "confidence": 0.25, "accuracy": 0.5},
        {"low": 0.7, "high": 0.8, "count": 750, "confidence": 0.75, "accuracy": 0.75},
    ],
}


def marks(text: str) -> list[tuple[float, float]]:
    found = re.findall(r'<svg class="mark" x="([0-9.]+)%" y="([0-9.]+)%">', text)
    return [(float(x), float(y)) for x, y in found]


def tick_places(text: str, anchor: str) -> dict[str, float]:
    """What each tick's text says, and where it stands in percent."""
    side = "y" if anchor == "end" else "x"
    pattern = rf'<text class="soft" [^>]*?\b{side}="([0-9.]+)%"[^>]*text-anchor="{anchor}">([^<]+)</text>'
    return {label: float(place) for place, label in re.findall(pattern, text) if re.fullmatch("[0-9.]+", label)}


def test_a_reliability_diagram() -> None:
    text = reliability_figure("A <b> & co.", CALIBRATION)
    ElementTree.fromstring(text)
    assert "A &lt;b&gt; &amp; co." in text and "ECE 0.062 over 1,000 predictions" in text
    x, y = tick_places(text, "middle"), tick_places(text, "end")
    assert (x["0.0"], x["1.0"]) == (0.0, 100.0)
    across = [100 * value for value in (0.25, 0.75)]
    upward = [y["0.0"] + value * (y["1.0"] - y["0.0"]) for value in (0.5, 0.75)]
    found = marks(text)[-2:]  # a mark a bin, behind those at the ends of the diagonal and of the shares
    assert [place for place, _ in found] == pytest.approx(across, abs=0.01)
    assert [place for _, place in found] == pytest.approx(upward, abs=0.02)
    assert marks(text)[0] == (100.0, pytest.approx(y["1.0"]))  # the diagonal


def test_an_exposure_curve() -> None:
    curve = {"percent": [0.0, 10.0, 20.0], "low": [0.0, 5.0, 10.0], "high": [0.0, 15.0, 30.0], "prompts": [9, 9, 4]}
    text = exposure_figure("Excess error", curve)
    ElementTree.fromstring(text)
    assert "9 prompts, 4 of them at the end" in text and text.count('class="band"') == 1
    assert exposure_figure("Excess error", {**curve, "low": None, "high": None}).count('class="band"') == 0
