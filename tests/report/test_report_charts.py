"""Numbers as text, and where a chart puts them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from limbeck.report import units
from limbeck.report.charts import BINS, Line, Style, dot_chart, line_chart, running_mean, thin, tick_texts, ticks
from limbeck.report.completions import marked
from limbeck.report.curves import over_seeds
from limbeck.report.load import Estimate, Report, Row
from limbeck.report.sweep import sweep, sweep_charts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.fixed(-0.0123, 3, sign=True), "\u22120.012"),
        (units.fixed(0.0123, 3, sign=True), "+0.012"),
        (units.fixed(-0.0001, 3, sign=True), "0.000"),
        (units.fixed(None, 3), "–"),
        (units.significant(5210.4), "5\u202f210"),
        (units.significant(0.04567), "0.0457"),
        (units.significant(1e-6), "1.00e\u221206"),
        (units.significant(0.0), "0"),
        (units.seconds(0.00412), "4.12 ms"),
        (units.seconds(83.21), "83.2 s"),
        (units.size(1023), "1\u202f023 B"),
        (units.size(135_936 * 4), "531 KiB"),
        (units.size(3 * 1024**3), "3.00 GiB"),
        (units.size(5 * 1024**4), "5\u202f120 GiB"),
        (units.count(598_272), "598 k"),
        (units.count(494_032_768), "494 M"),
        (units.count(999), "999"),
        (units.ratio(5210.0, 2150.0), "2.4×"),
        (units.ratio(1.0, 0.0), None),
        (units.name("accuracy_greedy"), "Accuracy, greedy"),
        (units.name("eval_forward_kl"), "Forward KL"),
    ],
)
def test_numbers_as_text(text: str | None, expected: str | None) -> None:
    assert text == expected


def test_decimals_follow_the_interval() -> None:
    """0.91 [0.89, 0.93], 0.954 [0.950, 0.958]: the half-width shows, to about half a unit of the last place."""
    assert units.decimals([0.02]) == 2
    assert units.decimals([0.004]) == 3
    assert units.decimals([0.3]) == 2
    assert units.decimals([1e-7]) == 4
    assert units.decimals([]) == 3


def test_ticks_are_round_and_inside() -> None:
    draw = random.Random(3)
    for _ in range(500):
        low = draw.uniform(-5, 5)
        high = low + 10 ** draw.uniform(-3, 3)
        values = ticks(low, high)
        assert 2 <= len(values) <= 7
        assert low <= values[0] + 1e-9 and values[-1] <= high + 1e-9
        assert np.ptp(np.diff(values)) < 1e-6 * (high - low)
        texts = tick_texts(values)
        assert len(set(texts)) == len(texts)
        shown = [float(text.replace("\u2212", "-")) for text in texts]
        np.testing.assert_allclose(shown, values, atol=1e-9 + 1e-4 * (high - low))


def test_running_mean_is_the_mean_of_what_is_there() -> None:
    values = [random.Random(k).random() for k in range(30)]
    for window in (1, 3, 7):
        half = window // 2
        expected = [np.mean(values[max(0, k - half) : k + half + 1]) for k in range(30)]
        np.testing.assert_allclose(running_mean(values, window), expected)
    assert running_mean([1.0, 2.0], 5) == [1.5, 1.5]


def test_thinning_keeps_the_mean() -> None:
    x = list(range(10 * BINS))
    y = [float(k % 7) for k in x]
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == len(thin_y) == BINS
    assert np.mean(thin_y) == pytest.approx(np.mean(y))
    assert thin_x[0] == 4.5 and thin_x[-1] == 10 * BINS - 5.5
    assert thin([1, 2], [3, 4]) == [[1, 2], [3, 4]]


def test_seeds_are_averaged_where_they_are() -> None:
    steps, mean, low, high = over_seeds([{0: 1.0, 10: 2.0}, {0: 3.0, 10: 6.0, 20: 5.0}])
    assert (steps, mean, low, high) == ([0, 10, 20], [2.0, 4.0, 5.0], [1.0, 2.0, 5.0], [3.0, 6.0, 5.0])


def test_lines_go_up_where_numbers_do() -> None:
    chart = line_chart("Loss", [Line("a", Style.of(0), [0, 50, 100], [1.0, 1.5, 2.0])])
    points = [tuple(map(int, point.split(","))) for point in chart.lines[0]["path"][1:].split("L")]
    assert [x for x, _ in points] == [0, 500, 1000]
    (_, first), (_, middle), (_, last) = points
    assert 1000 >= first > middle > last >= 0
    assert middle == pytest.approx((first + last) / 2, abs=1)
    places = {text: place for place, text in chart.y_ticks}
    assert places["2.0"] == pytest.approx(last / 10, abs=0.1)
    assert chart.x_ticks[0] == (0.0, "0") and chart.x_ticks[-1] == (100.0, "100")


def test_one_point_and_a_flat_line_are_drawn() -> None:
    chart = line_chart("Loss", [Line("a", Style.of(0), [5], [0.0]), Line("b", Style.of(7), [5], [0.0])])
    assert chart.lines[0]["path"] == "M500,1000"
    assert chart.lines[1]["style"].dashed


def test_dots_stand_where_their_numbers_are() -> None:
    rows = [({"label": "a"}, Estimate(0.92, 0.90, 0.96)), ({"label": "b"}, Estimate(0.98, None, None))]
    dots = dot_chart(rows, reference=0.99)
    a, b = dots.rows
    assert 0 < a["low"] < a["mean"] < a["high"] < b["mean"] < (dots.reference or 0) < 100
    assert (a["mean"] - a["low"]) / (a["high"] - a["low"]) == pytest.approx(1 / 3)
    assert b["low"] is None
    (first, first_text), (second, second_text) = dots.ticks[:2]
    slope = (float(second_text) - float(first_text)) / (second - first)
    assert float(first_text) + slope * (a["mean"] - first) == pytest.approx(0.92, abs=1e-6)


def test_differences_are_drawn_about_zero() -> None:
    dots = dot_chart([({}, Estimate(0.02, 0.01, 0.03)), ({}, Estimate(-0.001, -0.004, 0.002))], zero=True)
    assert dots.rows[0]["mean"] - 50 == pytest.approx(-20 * (dots.rows[1]["mean"] - 50))
    assert dots.rows[1]["mean"] < 50 < dots.rows[0]["low"]


def test_marks_are_escaped_and_only_where_texts_are_alike() -> None:
    assert marked("a <b> c d", "a x c d") == "a <mark>&lt;b&gt;</mark> c d"
    assert marked("one two", "three four five") == "one two"
    assert marked("  a\n b", "  a\n b") == "  a\n b"
    assert marked("  a b\n\n c e", "a b c d") == "  a b\n\n c <mark>e</mark>"
    assert marked("<i>", None) == "&lt;i&gt;"


def rows_of(means: dict[str, float]) -> list[Row]:
    return [Row(key, key, "method", {"accuracy": Estimate(mean)}) for key, mean in means.items()]


def test_a_sweep_is_one_method_with_one_number_that_differs() -> None:
    rows = rows_of({"gkd:lmbda=1": 0.3, "gkd:lmbda=0": 0.1, "gkd:lmbda=0.5": 0.2})
    found = sweep(rows)
    assert found is not None and found[0] == "lmbda" and [value for value, _ in found[1]] == [0.0, 0.5, 1.0]
    chart = sweep_charts(Report("", "accuracy", rows, []))[0]
    assert chart.x_label == "lmbda" and [round(x) for x, _ in chart.lines[0]["marks"]] == [0, 50, 100]
    for others in (
        {"gkd:lmbda=1": 0.3, "gkd:lmbda=0": 0.1},
        {"gkd:lmbda=1": 0.3, "gkd:lmbda=0": 0.1, "kd:lmbda=0": 0.2},
        {"gkd:lmbda=1": 0.3, "gkd:lmbda=0": 0.1, "gkd": 0.2},
        {"gkd:lmbda=1+samples=2": 0.3, "gkd:lmbda=0+samples=2": 0.1, "gkd:lmbda=0.5+samples=4": 0.2},
        {"gkd:offline=dataset": 0.3, "gkd:offline=teacher": 0.1, "gkd:offline=both": 0.2},
        {"sft": 0.1, "kd": 0.2, "gkd": 0.3},
    ):
        assert sweep(rows_of(others)) is None and sweep_charts(Report("", "accuracy", rows_of(others), [])) == []
