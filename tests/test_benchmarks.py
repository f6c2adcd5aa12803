"""`make bench` at tiny sizes, without its peers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.common import Result, Row
from benchmarks.report import with_ratios, write_section

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": "a CPU",
    "threads": 2,
    "torch": "2",
    "transformers": "5",
    "limbeck": "0",
    "commit": "abc",
    "command": "python -m benchmarks.run",
    "peers": {"trl": None},
}


def row(*, more_is_better: bool) -> Row:
    return Row("name", "about", "metric", lambda _: [], lambda *_: iter(()), more_is_better)


def test_a_row_runs_without_peers_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    monkeypatch.setenv("PYTHONPATH", str(run.ROOT / "src"))
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--only", "divergence", "--out", str(out)])
    monkeypatch.setattr(run, "installed", lambda _: None)
    assert run.main() == 0
    content = json.loads(out.read_text())
    assert content["machine"]["cpu"] and content["machine"]["threads"] >= 1
    lines = content["results"]
    assert {(line["who"], line["dtype"]) for line in lines if line["side"] == "ours"} == {
        (who, dtype) for who in ("limbeck", "limbeck eager") for dtype in ("fp32", "bf16")
    }
    for line in lines:
        if line["side"] == "peer":
            assert line["note"] == "not installed" and not line["numbers"]
        elif line["side"] == "floor":
            assert line["numbers"]["seconds"] > 0
        else:
            tolerance = 1e-4 if line["dtype"] == "fp32" else 1e-2
            assert line["numbers"]["value_error"] < tolerance and line["numbers"]["gradient_error"] < tolerance
            assert line["numbers"]["seconds"] > 0 and not line["note"]


def test_ratios_compare_with_the_best_peer_of_the_case() -> None:
    results = [
        Result("name", "a", "fp32", "limbeck", "ours", {"metric": 6.0}),
        Result("name", "a", "fp32", "slow", "peer", {"metric": 2.0}),
        Result("name", "a", "fp32", "fast", "peer", {"metric": 3.0}),
        Result("name", "a", "bf16", "fast", "peer", {"metric": 4.0}),
        Result("name", "a", "fp32", "absent", "peer", note="not installed"),
        Result("name", "a", "fp32", "floor", "floor", {"metric": 100.0}),
        Result("name", "b", "fp32", "fast", "peer", {"metric": 50.0}),
    ]
    speed = with_ratios(results, row(more_is_better=True))[0].numbers
    assert (speed["x_same_dtype"], speed["x_best_peer"]) == (2.0, 1.5)
    seconds = with_ratios(results, row(more_is_better=False))[0].numbers
    assert (seconds["x_same_dtype"], seconds["x_best_peer"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_a_section_is_added_after_those_that_are_there(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    results = [Result("name", "a", "fp32", "limbeck", "ours", {"metric": 1234.5})]
    for _ in range(2):
        write_section(page, MACHINE, [(row(more_is_better=True), results)])
    text = page.read_text()
    assert text.count("# Benchmarks") == 1 and text.count("## 2026-01-02 03:04 UTC, a CPU") == 2
    assert "| a | fp32 | limbeck | 1,234 |  |" in text and "trl not installed" in text
