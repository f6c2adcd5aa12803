"""The page: every number of its input, all text escaped, nothing loaded, what is missing left out with a word."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from limbeck.errors import DataError
from limbeck.report import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert('x')</script>\"'</style>&amp;"


class Page(HTMLParser):
    """Text, attributes and table rows of a page; fails where an element is not closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.pieces.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]}{data}"

    def row(self, first: str, *, columns: int | None = None) -> list[str]:
        """The first table row that starts with this text."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows if row]
        return next(row for row in rows if row[0].startswith(first) and columns in (None, len(row)))


def page(folder: Path | list[Path], out: Path | None = None) -> Page:
    return Page(write_report(folder, out).read_text(encoding="utf-8"))


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Sets keys of a JSON file; `...` removes one."""
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        if value is ...:
            del content[key]
        else:
            content[key] = value
    (folder / file).write_text(json.dumps(content))


def minus(text: str) -> str:
    return text.replace("-", "\u2212")


def test_every_method_and_number_of_a_comparison(compare_folder: Path) -> None:
    found = page(compare_folder)
    comparison = json.loads((compare_folder / "comparison.json").read_text())
    assert comparison["title"] in found.text
    assert comparison["command"] in found.text
    assert "200 steps a method" in found.text and "3 training seeds" in found.text
    columns = ["accuracy", "accuracy_greedy", "forward_kl", "reverse_kl"]
    for entry in comparison["table"]:
        row = found.row(entry["label"], columns=7)
        assert entry.get("recipe", "") in row[0]
        for key, cell in zip(columns, row[1:5], strict=True):
            numbers = entry["metrics"].get(key)
            assert cell == ("–" if numbers is None else "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**numbers))
            for value in numbers["values"] if numbers else ():
                assert f"{value:.3f}" in found.text
        assert row[6] == (str(entry["steps"]) if "steps" in entry else "–")
        if "seconds" in entry:
            assert abs(float(row[5]) - entry["seconds"]) <= 0.5
    for pair in comparison["pairs"]:
        labels = {entry["method"]: entry["label"] for entry in comparison["table"]}
        a, b = labels[pair["a"]], labels[pair["b"]]
        row = found.row(f"{a} − {b}")
        assert row[1] == minus("{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**pair))
        clear = f"{a} is {pair['verdict']} than {b}"
        assert row[2] == ("no clear difference" if pair["verdict"] == "no clear difference" else clear)


def test_headline_tells_a_clear_lead_from_an_unclear_one(compare_folder: Path) -> None:
    numbers = {"mean": 0.9, "low": 0.88, "high": 0.92}
    rows = [{"method": key, "label": key.upper(), "metrics": {"accuracy": numbers}} for key in ("sft", "kd", "gkd")]
    rows[2]["metrics"] = {"accuracy": {"mean": 0.95, "low": 0.93, "high": 0.97}}
    pairs = [
        {"a": "sft", "b": "gkd", "metric": "accuracy", "difference": -0.05, "low": -0.08, "high": -0.02},
        {"a": "gkd", "b": "kd", "metric": "accuracy", "difference": 0.05, "low": -0.01, "high": 0.11},
    ]
    pairs[0]["verdict"], pairs[1]["verdict"] = "worse", "no clear difference"
    edit(compare_folder, "comparison.json", table=rows, pairs=pairs)
    text = page(compare_folder).text
    assert "GKD has the highest accuracy: 0.95 [0.93, 0.97]." in text
    assert "It is clearly better than SFT, pair by pair; there is no clear difference to KD." in text
    pairs[0]["verdict"] = "no clear difference"
    edit(compare_folder, "comparison.json", pairs=pairs)
    assert "There is no clear difference to SFT and KD." in page(compare_folder).text
    edit(compare_folder, "comparison.json", pairs=[])
    assert "Its lead was not tested" in page(compare_folder).text


def test_lower_is_better_for_a_divergence(compare_folder: Path) -> None:
    edit(compare_folder, "comparison.json", metric="forward_kl")
    assert "GKD has the lowest forward KL" in page(compare_folder).text


def test_one_run(run_folder: Path) -> None:
    found = page(run_folder)
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    accuracy = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**evaluation["metrics"]["accuracy"])
    start, teacher = evaluation["before"]["accuracy"]["mean"], evaluation["teacher_metrics"]["accuracy"]["mean"]
    assert f"GKD takes accuracy from {start:.3f} to {accuracy}. The teacher has {teacher:.3f}." in found.text
    assert found.row("Teacher", columns=6)[1:4] == ["598 k", "2.28 MiB", "41.3 MiB"]
    assert found.row("GKD", columns=6)[1:4] == ["136 k0.23×", "531 KiB0.23×", "18.2 MiB0.44×"]
    assert "max_steps: 200" in found.text and "family 25 model 17" in found.text
    assert sum(attributes.get("class") == "plot" for _, attributes in found.tags) == 16


def test_several_runs_side_by_side(compare_folder: Path, tmp_path: Path) -> None:
    runs = [compare_folder / "runs" / name for name in ("kd-seed0", "gkd-seed0", "gkd-seed1")]
    out = tmp_path / "other" / "side.html"
    found = page(runs, out)
    for run, label in zip(runs, ("KD", "GKD (gkd-seed0)", "GKD (gkd-seed1)"), strict=True):
        accuracy = json.loads((run / "evaluation.json").read_text())["metrics"]["accuracy"]
        assert found.row(label, columns=7)[1] == "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**accuracy)
    assert [row[0].strip() for row in found.rows if len(row) == 7].count("Teacher") == 1
    assert write_report(runs) == compare_folder / "runs" / "report.html"


def test_nothing_is_loaded(compare_folder: Path) -> None:
    html = write_report(compare_folder).read_text(encoding="utf-8")
    assert re.findall(r"https?:", html.replace("http://www.w3.org/2000/svg", "")) == []
    assert "url(" not in html and "@import" not in html
    for tag, attributes in Page(html).tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag


def test_all_text_is_escaped(run_folder: Path) -> None:
    sample = {"prompt": EVIL, "reference": EVIL, "teacher": f"a b c d {EVIL}", "before": f"a b c {EVIL}", "after": EVIL}
    edit(run_folder, "evaluation.json", label=EVIL, samples=[sample])
    edit(run_folder, "environment.json", cpu=EVIL, command=EVIL)
    (run_folder / "recipe.yaml").write_text(EVIL)
    rollout = {"step": 1, "prompt": EVIL, "completion": EVIL, "writer": EVIL, "finish_reason": "stop"}
    (run_folder / "samples.jsonl").write_text(json.dumps(rollout) + "\n{" + EVIL)
    html = write_report(run_folder).read_text(encoding="utf-8")
    found = Page(html)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert [tag for tag, _ in found.tags].count("style") == 1
    assert "alert(" in html and "<script>alert" not in html
    assert found.text.count(EVIL) >= 12
    charts = [json.loads(attributes["data-chart"] or "") for _, attributes in found.tags if "data-chart" in attributes]
    assert {series["label"] for chart in charts for series in chart["series"]} == {EVIL}


def test_completions_side_by_side_with_marks(run_folder: Path) -> None:
    sample = {"prompt": "P?", "reference": "R", "teacher": "3 * 6 = 18", "before": "3 * 6 = 19", "after": "3 * 6 = 18"}
    edit(run_folder, "evaluation.json", samples=[sample] + [{**sample, "prompt": f"P{k}"} for k in range(4)])
    html = write_report(run_folder).read_text(encoding="utf-8")
    assert html.count("<mark>19</mark>") == 5 and html.count("<mark>") == 5
    text = Page(html).text
    assert "Teacher3 * 6 = 18 Student before3 * 6 = 19 Student after3 * 6 = 18" in text
    assert html.index("P1") < html.index("2 more") < html.index("P2")


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("evaluation.json", "no final evaluation"),
        ("metrics.jsonl", "metrics.jsonl is missing or empty"),
        ("evaluations.jsonl", "evaluations.jsonl is missing or empty"),
        ("recipe.yaml", "recipe.yaml is missing"),
        ("environment.json", "environment.json is missing"),
        ("samples.jsonl", "Completions"),
    ],
)
def test_a_missing_or_empty_file_is_left_out_with_a_word(run_folder: Path, file: str, word: str) -> None:
    (run_folder / file).unlink()
    assert word in page(run_folder).text
    (run_folder / file).write_text("")
    assert word in page(run_folder).text


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("models", "Sizes and speeds were not measured"),
        ("divergence_by_position", "no run has `divergence_by_position`"),
        ("samples", "no run has `samples`"),
        ("teacher_metrics", "No teacher was evaluated"),
        ("metrics", "no final evaluation"),
        ("before", "reaches accuracy"),
    ],
)
@pytest.mark.parametrize("value", [..., None, 3, "text", [], [1], {}, {"a": None}], ids=str)
def test_a_part_that_is_missing_or_of_another_kind(run_folder: Path, key: str, word: str, value: Any) -> None:
    edit(run_folder, "evaluation.json", **{key: value})
    text = page(run_folder).text
    assert word in text
    assert ("GKD has" in text or "GKD takes" in text or "GKD reaches" in text) == (key != "metrics")


def test_a_run_without_teacher(run_folder: Path) -> None:
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    del evaluation["models"]["teacher"], evaluation["teacher_metrics"]
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = page(run_folder).text
    assert "No teacher was measured, so there are no ratios." in text
    assert "no teacher beside it" in text


def test_numbers_that_are_not_finite(run_folder: Path) -> None:
    numbers = {"mean": float("nan"), "low": float("-inf"), "high": None, "values": [float("nan")]}
    edit(run_folder, "evaluation.json", metrics={"accuracy": numbers, "forward_kl": {"mean": 0.05}}, seconds=None)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[50:53]:
        line["loss"] = float("nan")
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = page(run_folder)
    assert "3 values were not finite and are left out." in found.text
    assert found.row("GKD", columns=7)[1:6] == ["–", "–", "0.050", "–", "–"]
    assert "nan" not in found.text.lower().split() and "inf" not in found.text.lower().split()


def test_half_written_and_broken_lines(run_folder: Path) -> None:
    whole = (run_folder / "metrics.jsonl").read_text()
    before = write_report(run_folder).read_text(encoding="utf-8")
    (run_folder / "metrics.jsonl").write_text(whole + '{"step": 201, "loss": 0.')
    after = write_report(run_folder).read_text(encoding="utf-8")
    note = "The last line of gkd-seed0/metrics.jsonl is half-written and was left out."
    assert note in Page(after).text
    charts = re.compile(r'data-chart="[^"]*"')
    assert charts.findall(before) == charts.findall(after)
    lines = whole.splitlines()
    (run_folder / "metrics.jsonl").write_text("\n".join([*lines[:4], "[1]", *lines[4:]]))
    assert "Line 5 of gkd-seed0/metrics.jsonl is no JSON object and was left out." in page(run_folder).text
    (run_folder / "evaluation.json").write_text("{")
    assert "gkd-seed0/evaluation.json is not JSON" in page(run_folder).text


def test_a_step_written_twice_counts_once(run_folder: Path) -> None:
    """The last line of a step wins, as after a resume."""
    (run_folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 9}\n{"step": 2, "loss": 2}\n{"step": 1, "loss": 1}\n'
    )
    charts = [
        json.loads(attributes["data-chart"] or "")
        for _, attributes in page(run_folder).tags
        if "data-chart" in attributes
    ]
    assert charts[0]["series"][0]["x"] == [1, 2]
    assert charts[0]["series"][0]["y"] == [1, 2]


@pytest.mark.parametrize(
    "broken", [{}, {"table": None, "pairs": 3}, {"table": [{}], "pairs": [{}], "seeds": 2}], ids=str
)
def test_a_broken_comparison_still_shows_the_curves(compare_folder: Path, broken: dict[str, Any]) -> None:
    (compare_folder / "comparison.json").write_text(json.dumps(broken))
    found = page(compare_folder)
    assert "MiniLLM" in found.text
    assert any("data-chart" in attributes for _, attributes in found.tags)


def test_a_lone_surrogate_is_written(run_folder: Path) -> None:
    edit(run_folder, "evaluation.json", samples=[{"prompt": "P", "after": "half \ud83d"}])
    assert "half ?" in page(run_folder).text


def test_folders_that_hold_no_run(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(DataError, match="expected a run folder at .*nothing-here, found none"):
        write_report(tmp_path / "nothing-here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected one of recipe.yaml"):
        write_report(tmp_path / "empty")
    with pytest.raises(DataError, match="found none"):
        write_report([])
    with pytest.raises(DataError, match="name another `out`"):
        write_report(run_folder, run_folder / "recipe.yaml" / "report.html")


def test_default_and_given_places(run_folder: Path, tmp_path: Path) -> None:
    assert write_report(run_folder) == run_folder / "report.html"
    assert write_report(run_folder, tmp_path / "a" / "b") == tmp_path / "a" / "b" / "report.html"
    assert write_report([run_folder], tmp_path / "x.html") == tmp_path / "x.html"


def test_a_long_comparison_takes_under_two_seconds(compare_folder: Path) -> None:
    start = time.process_time()
    target = write_report(compare_folder)
    assert time.process_time() - start < 2
    assert target.stat().st_size < 1_000_000
