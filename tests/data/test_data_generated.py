"""Problem generators as data, and rows with several right completions."""

from __future__ import annotations

from typing import Any

import pytest
import reasoning_gym

from limbeck.data import read
from limbeck.data.read import kind_of
from limbeck.errors import DataError


def test_rows_are_the_generators_own() -> None:
    rows = read("reasoning_gym:chain_sum:3:7")
    expected = reasoning_gym.create_dataset("chain_sum", size=3, seed=7)
    for row, entry in zip(rows, expected, strict=True):
        assert row["entry"] == entry
        assert (row["prompt"], row["completion"]) == (entry["question"], entry["answer"])
    assert rows == read("reasoning_gym:chain_sum:3:7")
    assert rows[0] != read("reasoning_gym:chain_sum:3")[0] == read("reasoning_gym:chain_sum:9:0")[0]
    assert [kind_of(row) for row in rows] == ["prompt + completion"] * 3


def test_puzzles_without_a_single_answer_are_prompts() -> None:
    assert {kind_of(row) for row in read("reasoning_gym:graph_color:2")} == {"prompt"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:chain_sums:3", "found 'chain_sums'; did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum", "expected reasoning_gym:NAME:COUNT or NAME:COUNT:SEED"),
        ("reasoning_gym:chain_sum:0", "expected reasoning_gym:NAME:COUNT"),
        ("reasoning_gym:chain_sum:3:x", "expected reasoning_gym:NAME:COUNT"),
        ("reasoning_gym:chain_sum:3:1:2", "expected reasoning_gym:NAME:COUNT"),
    ],
)
def test_mistakes_in_a_generators_name(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(source)


def test_a_list_of_completions_is_several_references() -> None:
    rows: list[dict[str, Any]] = [{"instruction": "say", "input": "", "output": ["yes", "yes indeed"]}]
    (found,) = read(rows)
    assert (found["completion"], found["references"]) == ("yes", ["yes", "yes indeed"])
    (own,) = read([{"prompt": "say", "completion": ["yes", "yeah"], "references": ["no"]}])
    assert (own["completion"], own["references"]) == ("yes", ["no"])
    for wrong in ([], [""], [3]):
        with pytest.raises(DataError, match="expected text as completion"):
            read([{"prompt": "say", "completion": wrong}])
