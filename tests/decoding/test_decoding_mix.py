"""Two models in lockstep: tokens follow the mixture of their distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_helpers import STOP, llama
from scipy import stats
from transformers import LlamaForCausalLM

from limbeck.decoding import Mix, Sampling, generate
from limbeck.errors import RecipeError, RolloutError
from limbeck.models import set_vocabulary

VOCABULARY = 6


@pytest.fixture(scope="module")
def student() -> LlamaForCausalLM:
    return llama(VOCABULARY, scale=0.3)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    """Another width, other layers, other weights."""
    return llama(VOCABULARY, scale=0.4, hidden_size=24, num_hidden_layers=3)


@torch.no_grad()
def pair_probs(models: list[Any], shares: list[float], prompt: list[int], temperature: float) -> torch.Tensor:
    """Probability of every pair of tokens after the prompt, token by token from the mixture."""

    def probs(rows: list[list[int]]) -> torch.Tensor:
        each = [
            (model(input_ids=torch.tensor(rows)).logits[:, -1] / temperature).softmax(-1).double() for model in models
        ]
        return sum(share * one for share, one in zip(shares, each, strict=True))  # type: ignore[return-value]

    first = probs([prompt])[0]
    second = probs([[*prompt, token] for token in range(VOCABULARY)])
    return first[:, None] * second


def p_value(student: Any, teacher: Any, share: float, believed: float, temperature: float) -> float:
    """Chi-square of 6 000 pairs drawn at `share` against the enumeration at `believed` (35 degrees of freedom or fewer:
    cells that expect under 5 are pooled)."""
    prompt = [1, 3, 4]
    sampling = Sampling(2, temperature=temperature, n=6000, seed=3)
    drawn = torch.tensor([c.tokens for c in generate(Mix(student, teacher, share), [prompt], sampling, batch_size=512)])
    observed = torch.bincount(drawn[:, 0] * VOCABULARY + drawn[:, 1], minlength=VOCABULARY**2).double()
    expected = 6000 * pair_probs([student, teacher], [1 - believed, believed], prompt, temperature).flatten()
    rare = expected < 5
    cells = torch.cat([expected[~rare], expected[rare].sum()[None] + 1e-9])
    seen = torch.cat([observed[~rare], observed[rare].sum()[None] + 1e-9])
    return float(stats.chisquare(seen.numpy(), (cells * seen.sum() / cells.sum()).numpy()).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_follow_the_mixture(student: Any, teacher: Any, temperature: float) -> None:
    """A right sampler fails one time in a thousand (fixed seed: never); shares that are swapped or .1 off must fail."""
    assert p_value(student, teacher, 0.3, 0.3, temperature) > 1e-3
    assert p_value(student, teacher, 0.3, 0.7, temperature) < 1e-6
    assert p_value(student, teacher, 0.3, 0.0, temperature) < 1e-6


@torch.no_grad()
def test_log_probabilities_are_each_models_own(student: Any, teacher: Any) -> None:
    """Also where rows leave and waiting prompts join, and the buffers grow."""
    prompts = [[1, *range(3, 3 + length % 3), 4, 5] * (1 + length % 4) for length in range(14)]
    sampling = Sampling(20, seed=5, stop_tokens=(STOP,), n=2)
    for share in (0.0, 0.4):
        written = generate(Mix(student, teacher, share), prompts, sampling, batch_size=4)
        again = generate(Mix(student, teacher, share), prompts, sampling, batch_size=64)
        assert [c.tokens for c in written] == [c.tokens for c in again]
        for place, completion in enumerate(written):
            prompt = prompts[place // 2]
            tokens = torch.tensor(completion.tokens)[:, None]
            for model, found in ((student, completion.logprobs), (teacher, completion.teacher_logprobs)):
                logits = model(input_ids=torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, tokens)[:, 0]
                torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_no_share_of_the_teacher_is_the_student_alone(student: Any, teacher: Any) -> None:
    prompts = [[1, 3], [4, 5, 3, 1]]
    sampling = Sampling(12, n=5, seed=1)
    mixed = generate(Mix(student, teacher, 0.0), prompts, sampling)
    assert [c.tokens for c in mixed] == [c.tokens for c in generate(student, prompts, sampling)]


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_outside_the_range_is_refused(share: float) -> None:
    with pytest.raises(RolloutError, match=r"share in \[0, 1\)"):
        Mix(None, None, share)


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}, {"repetition_penalty": 1.2}])
def test_filters_are_refused(student: Any, teacher: Any, changes: dict[str, Any]) -> None:
    with pytest.raises((RolloutError, RecipeError), match="no filter"):
        generate(Mix(student, teacher, 0.2), [[1]], Sampling(4, **changes))


def test_two_vocabularies_are_refused(student: Any) -> None:
    larger = llama(VOCABULARY + 2)
    with pytest.raises(RolloutError, match="one vocabulary, found 6 tokens in the student and 8 in the teacher"):
        generate(Mix(student, larger, 0.2), [[1]], Sampling(4))
    set_vocabulary(larger, VOCABULARY)
    assert generate(Mix(student, larger, 0.2), [[1]], Sampling(4))
