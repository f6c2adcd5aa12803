"""Rewards: what they read from a row, and what stops a run with the prompt named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from limbeck.data import read
from limbeck.errors import DataError, LimbeckError, RecipeError, ScoreError
from limbeck.scoring import SCORES, build_reward, check_reward, needs_reference, references_in, score

PROMPTS = ["first question", "second question"]
COMPLETIONS = ["the cat sat\n#### 18", "nothing"]
ROWS: list[dict[str, Any]] = [
    {"prompt": "p", "completion": "the cat sat. #### 18", "summary": "a dog #### 3", "number": 18},
    {"prompt": "p", "references": ["#### 4", "nothing at all #### 5"], "summary": "nothing #### 1", "number": 2.5},
]


def odd(completion: str, reference: str) -> Any:
    return {"cat": 1.0, "raise": 1 / max(len(completion) - 5, 0) if completion == "raise" else 0}.get(completion, "no")


def lengths(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
    return [
        len(p) + 100 * len(c) + 10_000 * row["number"] for p, c, row in zip(prompts, completions, rows, strict=True)
    ]


@pytest.mark.parametrize("name", [name for name in SCORES])
def test_a_score_as_reward_is_that_score_against_the_rows_reference(name: str) -> None:
    references = [["the cat sat. #### 18"], ["#### 4", "nothing at all #### 5"]]
    assert build_reward(name)(PROMPTS, COMPLETIONS, ROWS) == score(name, COMPLETIONS, references)
    other = build_reward({"name": name, "column": "summary"})(PROMPTS, COMPLETIONS, ROWS)
    assert other == score(name, COMPLETIONS, ["a dog #### 3", "nothing #### 1"])


def test_numbers_and_answers_of_the_assistant_are_references() -> None:
    reward = build_reward({"name": "numeric_answer", "column": "number"})
    assert reward(PROMPTS, ["so 18", "it is 2.50"], ROWS) == [1.0, 1.0]
    told = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is 7."}]}
    assert build_reward("numeric_answer")(["?"], ["7"], [told]) == [1.0]
    check_reward("numeric_answer", [told])
    with pytest.raises(RecipeError, match="found row 1 with messages"):
        check_reward("numeric_answer", [{"messages": told["messages"][:1]}])


def test_a_pattern_is_searched() -> None:
    reward = build_reward({"name": "regex", "pattern": r"#### -?[0-9]+$"})
    assert reward(["a"] * 4, ["x #### 18", "#### 18 or so", "####", "#### -3"], [{}] * 4) == [1.0, 0.0, 0.0, 1.0]
    check_reward({"name": "regex", "pattern": "a"}, [{}])
    with pytest.raises(RecipeError, match=r"reward.pattern: expected a regular expression, found '\('"):
        build_reward({"name": "regex", "pattern": "("})


def test_ones_own_function_by_name_and_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "limbeck_own_reward.py").write_text(
        "def both(completion, reference): return len(completion) + 100 * len(reference)\n"
        "def whole(prompts, completions, rows): return [len(p) for p in prompts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"answer": "abc"}, {"answer": "d"}]
    assert build_reward("limbeck_own_reward:both")(PROMPTS, ["1", "22"], rows) == [301.0, 102.0]
    assert build_reward(lambda c, r: len(c) + 100 * len(r))(PROMPTS, ["1", "22"], rows) == [301.0, 102.0]
    whole = build_reward({"name": "limbeck_own_reward:whole", "batched": True})
    assert whole(PROMPTS, ["1", "22"], [{}, {}]) == [14.0, 15.0]


def test_a_batched_function_sees_prompts_completions_and_rows() -> None:
    reward = build_reward({"name": lengths, "batched": True})
    assert reward(PROMPTS, ["1", "22"], ROWS) == [14 + 100 + 180_000, 15 + 200 + 25_000]
    assert reward([], [], []) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, c, r: [1.0], r"expected 2 numbers, one a prompt, found 1"),
        (lambda p, c, r: [1.0, 2.0, 3.0], r"expected 2 numbers, one a prompt, found 3"),
        (
            lambda p, c, r: [1.0, float("nan")],
            r"at prompt 1 \('second question'\): expected a finite number, found nan",
        ),
        (
            lambda p, c, r: r[0]["gone"],
            r"2 prompts, the first of them 'first question': expected numbers, found KeyError",
        ),
        (lambda p, c, r: None, "found TypeError"),
    ],
)
def test_a_batched_function_that_fails_names_the_prompt(function: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        build_reward({"name": function, "batched": True})(PROMPTS, ["a", "b"], ROWS)


def test_a_function_that_fails_names_the_prompt() -> None:
    reward = build_reward(odd)
    with pytest.raises(ScoreError, match=r"score odd at prompt 1 \('second question'\): .*found ZeroDivisionError"):
        reward(PROMPTS, ["cat", "raise"], ROWS)
    with pytest.raises(ScoreError, match=r"score odd at prompt 1 \('second question'\): .*finite number, found 'no'"):
        reward(PROMPTS, ["cat", "dog"], ROWS)


@pytest.mark.parametrize(
    ("spec", "rows", "message"),
    [
        (
            "rouge_l",
            [{"prompt": "x", "about": "y"}],
            "one of the columns references, completion, answer, found row 1 with",
        ),
        (
            {"name": "rouge_l", "column": "sumary"},
            ROWS,
            "column sumary, found row 1 and 1 more .*did you mean 'summary'",
        ),
        ({"name": "rouge_l", "column": "summary"}, [*ROWS, {"prompt": "z"}], "column summary, found row 3 with prompt"),
        ({"name": "rouge_l", "column": "summary"}, [{"summary": None}], "column summary, found row 1"),
        ({"name": "reasoning_gym"}, ROWS, "rows of reasoning_gym:NAME:COUNT"),
        ("rouge", ROWS, "found 'rouge'; did you mean 'rouge_l'"),
        ({"name": "regex", "patern": "a"}, ROWS, "options among pattern, found 'patern'; did you mean 'pattern'"),
        ({"name": "regex"}, ROWS, "expected the option pattern, found none"),
        ({"name": "regex", "pattern": 3}, ROWS, "reward.pattern: expected str, found 3"),
        ({"name": "rouge_l", "batched": True}, ROWS, "reward.batched: expected a function of one's own"),
        ({"name": lengths, "batched": True, "column": "x"}, ROWS, "reward.batched"),
        ({"path": "x"}, ROWS, "expected a name and its options, found path"),
        ({"name": 3}, ROWS, "reward.name: expected a name"),
        ({"name": "classifier"}, ROWS, "expected the option path"),
    ],
)
def test_mistakes_are_found_before_training(spec: Any, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_reward(spec, rows)


def test_a_reference_without_a_number_is_found_before_training() -> None:
    rows = [{"prompt": "one", "answer": "#### 3"}, {"prompt": "two", "answer": "#### three"}]
    check_reward("numeric_answer", rows[:1])
    with pytest.raises(ScoreError, match=r"prompt 1 \('two'\): .* expected a number in the reference"):
        check_reward("numeric_answer", rows)


def test_what_looks_at_the_completion_alone_needs_no_reference() -> None:
    for spec in ("length", "repetition", {"name": "regex", "pattern": "a"}, {"name": lengths, "batched": True}):
        check_reward(spec, [{"prompt": "x"}])
        assert not needs_reference(spec)
    assert build_reward("length")(["x"], ["four"], [{"prompt": "x"}]) == [4.0]
    assert needs_reference("rouge_l") and not needs_reference({"name": "rouge_l", "column": "summary"})


def test_the_first_column_that_holds_something_is_the_reference() -> None:
    row: dict[str, Any] = {"references": ["a", 2], "completion": "b", "answer": 3.5, "summary": "c"}
    assert references_in(row) == ["a", "2"] and references_in(row, "summary") == ["c"]
    for nothing in (None, "", []):
        row["references"] = nothing
        assert references_in(row) == ["b"] and references_in(row, "references") == []
    row["completion"] = ""
    assert references_in(row) == ["3.5"] and references_in({"answer": 0}) == ["0"]
    row["answer"] = ""
    assert references_in(row) == []
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
    assert references_in({"messages": [asked, said]}) == ["r"] and references_in({"messages": [said, asked]}) == []
    with pytest.raises(RecipeError, match="expected column summary, found row 1"):
        check_reward({"name": "rouge_l", "column": "summary"}, [{"prompt": "x", "summary": ""}])


def test_generated_problems_and_their_verifiers() -> None:
    """basic_arithmetic wants the number; countdown takes any right expression; family_relationships one word."""
    reward = build_reward({"name": "reasoning_gym"})
    for name in ("basic_arithmetic", "countdown", "family_relationships"):
        rows = read(f"reasoning_gym:{name}:4")
        check_reward("reasoning_gym", rows)
        prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        assert reward(prompts, answers, rows) == [1.0] * 4
        assert (
            reward(prompts, [f"Let me think.\n<answer> {answer} </answer>." for answer in answers], rows) == [1.0] * 4
        )
        assert max(reward(prompts, ["<answer>12345</answer>"] * 4, rows)) < 0.5
    (row,) = read("reasoning_gym:countdown:1")
    numbers, target = row["entry"]["metadata"]["numbers"], row["entry"]["metadata"]["target"]
    assert row["completion"] != str(target)
    # Another right expression than the one in the row.
    assert len(numbers) > 1 and eval(row["completion"]) == target
    assert reward([row["prompt"]], [f"({row['completion']})"], [row]) == [1.0]


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"found none: pip install 'limbeck\[reasoning-gym\]'"):
        read("reasoning_gym:basic_arithmetic:1")
    assert issubclass(DataError, LimbeckError)
