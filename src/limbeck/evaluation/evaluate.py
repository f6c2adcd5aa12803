"""What a model writes after fixed prompts with fixed seeds, scored: the same numbers at every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from limbeck.data import completion_text, plain_text
from limbeck.decoding import Completion, Sampling, generate
from limbeck.errors import DataError, RecipeError
from limbeck.scoring import (
    CORPUS_SCORES,
    Reward,
    build_reward,
    check_reward,
    needs_reference,
    references_in,
    reward_name,
)
from limbeck.types import Example

SAMPLES = 8

Write = Callable[[Sequence[Sequence[int]], Sampling], list[Completion]]
"""What `decoding.generate` does for a model: `n` completions a prompt, prompt-major."""


@dataclass(frozen=True, slots=True)
class Scores:
    """`values[metric]` [seeds, prompts]: what was sampled; `values["<metric>_greedy"]` [1, prompts]: the greedy
    completions. A metric of all completions together (CORPUS_SCORES) has [seeds, 1]. `samples`: prompt, reference and
    completion (greedy where there is one) of the first prompts, as text. `length_limit_share`: sampled completions that
    did not end by themselves, a fraction. `completions` [seeds][prompts]: what was sampled, as text."""

    values: dict[str, np.ndarray]
    samples: list[dict[str, str]]
    length_limit_share: float
    completions: list[list[str]]


@dataclass(frozen=True, slots=True)
class Metrics:
    """What `build_metrics` made, for as many evaluations as are wanted: by the names that stand in results, in their
    order, what was asked for, and the reward of each but those of CORPUS_SCORES."""

    specs: dict[str, str | Mapping[str, Any]]
    rewards: dict[str, Reward]

    def rows(self, examples: Sequence[Example], tokenizer: Any) -> list[dict[str, Any]]:
        """The examples' rows, each with its `references` where a reward needs them. DataError, RecipeError and
        ScoreError where a reward does not find what it reads."""
        rewards = [self.specs[name] for name in self.rewards]
        needed = any(needs_reference(reward) for reward in rewards)
        rows = [
            {**example.row, "references": references_of(example, tokenizer)} if needed else example.row
            for example in examples
        ]
        for reward in rewards:
            check_reward(reward, rows)
        return rows


def build_metrics(metrics: Sequence[str | Mapping[str, Any]], *, device: Any = None) -> Metrics:
    """metrics: rewards (`scoring.build_reward`: a name or a table with options) and names of CORPUS_SCORES. `device`:
    where a classifier runs. RecipeError for one that is unknown or comes twice, ModelError as `build_reward` does."""
    specs = {reward_name(metric): metric for metric in metrics}
    if len(specs) < len(metrics):
        raise RecipeError(f"expected metrics of different names, found one twice: {', '.join(map(str, metrics))}")
    corpus = {name for name, metric in specs.items() if isinstance(metric, str) and metric in CORPUS_SCORES}
    return Metrics(
        specs, {name: build_reward(metric, device=device) for name, metric in specs.items() if name not in corpus}
    )


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    metrics: Metrics | Sequence[str | Mapping[str, Any]],
    seeds: int | Sequence[int] = 3,
    sampling_temperature: float = 1.0,
    max_tokens: int,
    stop_tokens: tuple[int, ...],
    batch_size: int | None = None,
    greedy: bool = True,
    no_repeat_ngram_size: int = 0,
    write: Write | None = None,
) -> Scores:
    """Writes a sampled completion of every example's prompt for each of `seeds`, and a greedy one, and scores them.

    metrics: what `build_metrics` takes, or has made; a classifier runs on the model's device.
    seeds: their number, or the seeds themselves (each the one sample that `Sampling(seed=...)` draws).
    no_repeat_ngram_size: bans repeated n-grams of tokens, in greedy completions too.
    write: what writes, by default `generate` with the model and `batch_size`.

    The random numbers of a completion depend on the prompt's place in `examples` and the seed alone, so two models (or
    one before and after training) are paired prompt by prompt. The reference is the row's `references` (a list: the
    best counts), `completion` or `answer`, else the example's own text after the prompt.

    Raises DataError for no example or one without a reference that a metric needs, ScoreError, and what
    `build_metrics` raises.
    """
    if not examples:
        raise DataError("expected at least one example to evaluate on, found none")
    if not isinstance(metrics, Metrics):
        metrics = build_metrics(metrics, device=next(model.parameters()).device)
    rows = metrics.rows(examples, tokenizer)
    prompts = [example.prompt for example in examples]
    prompt_texts = [plain_text(tokenizer, prompt) for prompt in prompts]
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=sampling_temperature,
        stop_tokens=stop_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )
    write = write or partial(generate, model, batch_size=batch_size)
    sampled = _sampled(write, prompts, sampling, seeds)
    runs = {"": sampled}
    if greedy:
        runs["_greedy"] = write(prompts, replace(sampling, temperature=0.0))

    texts = {suffix: [completion_text(tokenizer, c.tokens, stop_tokens) for c in run] for suffix, run in runs.items()}
    values: dict[str, np.ndarray] = {}
    for name in metrics.specs:
        for suffix, completions in texts.items():
            each = len(completions) // len(examples)
            if name not in metrics.rewards:
                score = CORPUS_SCORES[name]
                values[name + suffix] = np.array([[score(completions[seed::each])] for seed in range(each)])
            else:
                numbers = metrics.rewards[name](_repeated(prompt_texts, each), completions, _repeated(rows, each))
                values[name + suffix] = np.array(numbers).reshape(len(examples), each).T
    count = len(sampled) // len(examples)
    shown = texts["_greedy"] if greedy else texts[""][::count]
    samples = [
        {"prompt": prompt, "reference": str(next(iter(references_in(row)), "")), "completion": completion}
        for prompt, row, completion in zip(prompt_texts[:SAMPLES], rows, shown, strict=False)
    ]
    limited = sum(completion.finish_reason == "length" for completion in sampled) / len(sampled)
    return Scores(values, samples, limited, [texts[""][seed::count] for seed in range(count)])


def _sampled(
    write: Write, prompts: list[list[int]], sampling: Sampling, seeds: int | Sequence[int]
) -> list[Completion]:
    """Prompt-major, a completion for each seed."""
    if isinstance(seeds, int):
        return write(prompts, replace(sampling, n=seeds))
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"expected seeds that differ from each other, found {list(seeds)}")
    runs = [write(prompts, replace(sampling, seed=seed)) for seed in seeds]
    return [completion for of_prompt in zip(*runs, strict=True) for completion in of_prompt]


def references_of(example: Example, tokenizer: Any) -> list[str]:
    """The texts that a completion of `example` is compared with. DataError where there is none."""
    if found := references_in(example.row):
        return [str(reference) for reference in found]
    if len(example.tokens) > example.prompt_tokens:
        return [plain_text(tokenizer, example.tokens[example.prompt_tokens :])]
    raise DataError(
        f"row {example.index}: expected a reference (columns references, completion or answer), found a prompt alone"
    )


def _repeated(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]
