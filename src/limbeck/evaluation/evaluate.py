"""What a model writes after fixed prompts with fixed seeds, scored: the same numbers at every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.decoding import Completion, Sampling, generate
from limbeck.errors import DataError
from limbeck.scoring import resolve, score
from limbeck.types import Example

SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Scores:
    """`values[metric]` [seeds, prompts]: what was sampled; `values["<metric>_greedy"]` [1, prompts]: the greedy
    completions. `samples`: prompt, reference and completion (greedy where there is one) of the first prompts, as text.
    `length_limit_share`: sampled completions that did not end by themselves, a fraction."""

    values: dict[str, np.ndarray]
    samples: list[dict[str, str]]
    length_limit_share: float

    def means(self, metric: str) -> list[float]:
        """The mean over prompts, one a seed."""
        return self.values[metric].mean(1).tolist()


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    metrics: Sequence[str],
    seeds: int = 3,
    sampling_temperature: float = 1.0,
    max_tokens: int,
    stop_tokens: tuple[int, ...],
    batch_size: int | None = None,
    greedy: bool = True,
) -> Scores:
    """Writes `seeds` sampled completions of every example's prompt, and a greedy one, and scores them by `metrics`.

    The random numbers of a completion depend on the prompt's place in `examples` and the seed alone, so two models (or
    one before and after training) are paired prompt by prompt. The reference is the row's `references` (a list: the
    best counts), `completion` or `answer`, else the example's own text after the prompt.

    Raises DataError for no example or one without a reference, RecipeError for an unknown metric, ScoreError.
    """
    if not examples:
        raise DataError("expected at least one example to evaluate on, found none")
    for metric in metrics:
        resolve(metric)
    references = [references_of(example, tokenizer) for example in examples]
    prompts = [example.prompt for example in examples]
    prompt_texts = [_text(tokenizer, prompt) for prompt in prompts]
    sampling = Sampling(max_tokens=max_tokens, temperature=sampling_temperature, stop_tokens=stop_tokens, n=seeds)
    sampled = generate(model, prompts, sampling, batch_size=batch_size)
    runs = {"": sampled}
    if greedy:
        argmax = Sampling(max_tokens=max_tokens, temperature=0.0, stop_tokens=stop_tokens)
        runs["_greedy"] = generate(model, prompts, argmax, batch_size=batch_size)

    texts = {suffix: [completion_text(tokenizer, c, stop_tokens) for c in run] for suffix, run in runs.items()}
    values: dict[str, np.ndarray] = {}
    for metric in metrics:
        for suffix, completions in texts.items():
            each = len(completions) // len(examples)
            numbers = score(metric, completions, _repeated(references, each), _repeated(prompt_texts, each))
            values[metric + suffix] = np.array(numbers).reshape(len(examples), each).T
    shown = texts["_greedy"] if greedy else texts[""][::seeds]
    samples = [
        {"prompt": prompt, "reference": reference[0], "completion": completion}
        for prompt, reference, completion in zip(prompt_texts[:SAMPLES], references, shown, strict=False)
    ]
    limited = sum(completion.finish_reason == "length" for completion in sampled) / len(sampled)
    return Scores(values, samples, limited)


def references_of(example: Example, tokenizer: Any) -> list[str]:
    """The texts that a completion of `example` is compared with. DataError where there is none."""
    several = example.row.get("references")
    if isinstance(several, str):
        return [several]
    if several:
        return [str(reference) for reference in several]
    for column in ("completion", "answer"):
        if isinstance(example.row.get(column), str | int | float):
            return [str(example.row[column])]
    if len(example.tokens) > example.prompt_tokens:
        return [_text(tokenizer, example.tokens[example.prompt_tokens :])]
    raise DataError(
        f"row {example.index}: expected a reference (columns references, completion or answer), found a prompt alone"
    )


def completion_text(tokenizer: Any, completion: Completion, stop_tokens: Sequence[int]) -> str:
    """The text of a completion without the stop token that ended it and without special tokens."""
    tokens = completion.tokens
    return _text(tokenizer, tokens[:-1] if tokens and tokens[-1] in stop_tokens else tokens)


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def _repeated(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]
