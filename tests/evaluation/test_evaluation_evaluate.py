"""Scores of what a model writes: the same at every call, and greedy text as transformers writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.data import completion_text, render
from limbeck.data.embedded.problems import rows
from limbeck.decoding import Completion, Sampling, generate
from limbeck.errors import DataError, RecipeError, ScoreError
from limbeck.evaluation import evaluate
from limbeck.evaluation.evaluate import references_of
from limbeck.models import eos_tokens, load_model, load_tokenizer
from limbeck.scoring.text import length, rouge_l
from limbeck.types import Example

STORIES = [
    {"prompt": "Once upon a time", "completion": "there was a little girl named Lily. She loved to play."},
    {"prompt": "Tom and Mia saw a big", "completion": "dog in the park. The dog was sad."},
    {"prompt": "The sun was", "completion": "shining and the birds were singing in the trees."},
    {"prompt": "One day, a boy named Tim went to the", "completion": "shop to buy a red ball."},
]


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Any, Any, list[Example]]:
    path = shared / "models" / "stories260k"
    tokenizer = load_tokenizer(path)
    return load_model(path), tokenizer, render(STORIES, tokenizer)[0]


def test_twice_and_in_other_batches_the_same_numbers(stories: tuple[Any, Any, list[Example]]) -> None:
    model, tokenizer, held = stories
    settings: Any = {"metrics": ["rouge_l", "length"], "max_tokens": 24, "stop_tokens": eos_tokens(model, tokenizer)}
    first = evaluate(model, tokenizer, held, **settings)
    torch.rand(7)  # the global generator plays no part
    again = evaluate(model, tokenizer, held, **settings, batch_size=2)
    assert first.values.keys() == {"rouge_l", "length", "rouge_l_greedy", "length_greedy"}
    for metric, values_SP in first.values.items():
        assert values_SP.shape == (1 if metric.endswith("_greedy") else 3, 4)
        np.testing.assert_array_equal(values_SP, again.values[metric])
    assert first.samples == again.samples
    seeds_SP = first.values["length"]
    assert not (seeds_SP[0] == seeds_SP[1]).all()  # seeds differ from each other
    fewer = evaluate(model, tokenizer, held, **settings, seeds=2, greedy=False)
    np.testing.assert_array_equal(fewer.values["length"], seeds_SP[:2])
    assert "length_greedy" not in fewer.values


def test_greedy_scores_are_those_of_transformers_own_text(stories: tuple[Any, Any, list[Example]]) -> None:
    model, tokenizer, held = stories
    found = evaluate(
        model, tokenizer, held, metrics=["rouge_l"], max_tokens=20, stop_tokens=eos_tokens(model, tokenizer), seeds=1
    )
    for place, example in enumerate(held):
        prompt_1T = torch.tensor([example.prompt])
        written_1T = model.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, max_new_tokens=20
        )
        text = tokenizer.decode(written_1T[0, len(example.prompt) :], skip_special_tokens=True)
        assert found.samples[place]["completion"] == text
        assert found.samples[place]["reference"] == STORIES[place]["completion"]
        assert found.values["rouge_l_greedy"][0, place] == rouge_l(text, STORIES[place]["completion"])


def test_each_number_stands_at_its_seed_and_prompt(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model, held = tiny(0), render(rows("eval", 5), tokenizer)[0]
    stops = (tokenizer.eos_token_id,)
    found = evaluate(
        model, tokenizer, held, metrics=["length"], max_tokens=9, stop_tokens=stops, seeds=3, sampling_temperature=0.7
    )
    sampling = Sampling(max_tokens=9, temperature=0.7, stop_tokens=stops, n=3)
    written = generate(model, [example.prompt for example in held], sampling)
    for prompt in range(5):
        for seed in range(3):
            text = completion_text(tokenizer, written[prompt * 3 + seed].tokens, stops)
            assert found.values["length"][seed, prompt] == length(text, "")
    assert found.length_limit_share == sum(c.finish_reason == "length" for c in written) / 15


def test_a_model_in_training_is_evaluated_without_dropout(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model, held = tiny(0, attention_dropout=0.5), render(rows("eval", 3), tokenizer)[0]
    settings: Any = {"metrics": ["length"], "max_tokens": 8, "stop_tokens": ()}
    expected = evaluate(model, tokenizer, held, **settings)
    found = evaluate(model.train(), tokenizer, held, **settings)
    assert found.samples == expected.samples
    assert model.training


def test_the_stop_token_is_not_text(tokenizer: Any) -> None:
    tokens = tokenizer("12 Answer", add_special_tokens=False)["input_ids"]
    # A stop token need not be special: here the last word ends the completion.
    assert completion_text(tokenizer, tokens, (tokens[-1],)) == "12"
    assert completion_text(tokenizer, tokens, (tokenizer.eos_token_id,)) == "12 Answer"
    ended = Completion([*tokens, tokenizer.eos_token_id], [], "stop")
    assert completion_text(tokenizer, ended.tokens, (tokenizer.eos_token_id,)) == "12 Answer"
    assert completion_text(tokenizer, [], (1,)) == ""


def test_references(tokenizer: Any) -> None:
    tokens = tokenizer("How? 12")["input_ids"]

    def example(row: dict[str, Any], prompt_tokens: int = len(tokens)) -> Example:
        return Example(tokens, [False] * len(tokens), prompt_tokens, row, index=7)

    every = {"references": ["a", "b"], "completion": "c", "answer": "d"}
    assert references_of(example(every), tokenizer) == ["a", "b"]
    assert references_of(example({**every, "references": "a"}), tokenizer) == ["a"]
    assert references_of(example({"completion": "c", "answer": "d"}), tokenizer) == ["c"]
    assert references_of(example({"answer": 51.0}), tokenizer) == ["51.0"]
    # Messages and plain text: the example's own words after the prompt.
    assert references_of(example({"messages": []}, len(tokens) - 2), tokenizer) == [" 12"]
    with pytest.raises(DataError, match="row 7: expected a reference"):
        references_of(example({"prompt": "How? 12"}), tokenizer)


def test_several_references_reach_the_score(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny(0)
    (plain,) = render([{"prompt": "Ada has", "completion": "nothing"}], tokenizer)[0]
    settings: Any = {"metrics": ["exact_match"], "max_tokens": 4, "stop_tokens": (), "seeds": 1}
    written = evaluate(model, tokenizer, [plain], **settings).samples[0]["completion"]
    row = {"prompt": "Ada has", "completion": "nothing", "references": ["nothing", written]}
    found = evaluate(model, tokenizer, render([row], tokenizer)[0], **settings)
    assert found.values["exact_match_greedy"].tolist() == [[1.0]]


def test_mistakes_are_named(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model, held = tiny(0), render(rows("eval", 2), tokenizer)[0]
    settings: Any = {"max_tokens": 4, "stop_tokens": ()}
    with pytest.raises(DataError, match="at least one example"):
        evaluate(model, tokenizer, [], metrics=["rouge_l"], **settings)
    with pytest.raises(RecipeError, match="did you mean 'rouge_l'"):
        evaluate(model, tokenizer, held, metrics=["rogue_l"], **settings)
    wordy = render([{"prompt": "Ada has", "completion": "nothing"}], tokenizer)[0]
    with pytest.raises(ScoreError, match=r"score accuracy at prompt 0 \('Ada has'\)"):
        evaluate(model, tokenizer, wordy, metrics=["accuracy"], **settings)
