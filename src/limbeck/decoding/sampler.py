"""From logits to tokens: what may be drawn, with which probability, and which random number draws it.

Everything here is a pure function of its arguments. Random numbers are counted, not consumed: the one at (seed, stream,
sample, position) is a hash of that tuple, so neither batch size nor order nor neighbours can change a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from limbeck.errors import RecipeError, RolloutError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BLOCK = 256  # tokens that `draw` sums at once
_CANDIDATES = 512  # top-p looks at this many tokens first and sorts the whole vocabulary only where they do not suffice


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing.

    Filters apply in this order: repetition penalty, frequency and presence penalties, banned n-grams, stop tokens
    before `min_tokens`, temperature, top-k, top-p (of what top-k left). The repetition penalty and n-grams count the
    prompt, presence and frequency only the completion. `stop_tokens`: exactly these end a completion, and the one drawn
    stays in it. `stop_strings` end it once its text, special tokens included, contains one, also before `min_tokens`.
    `n` completions a prompt.

    Raises RecipeError on a value that has no meaning.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    n: int = 1
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        for name in ("stop_tokens", "stop_strings"):
            value = getattr(self, name)
            _expect(isinstance(value, (tuple, list)), name, "a tuple", value)
            object.__setattr__(self, name, tuple(value))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            _expect(_is_int(value) and value >= least, name, f"an integer of at least {least}", value)
        for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _expect(_is_number(value) and math.isfinite(value), name, "a finite number", value)
        _expect(_is_int(self.seed), "seed", "an integer", self.seed)
        _expect(self.temperature >= 0, "temperature", "0 (greedy) or more", self.temperature)
        _expect(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _expect(self.repetition_penalty > 0, "repetition_penalty", "above 0 (1: none)", self.repetition_penalty)
        _expect(
            self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens {self.max_tokens}", self.min_tokens
        )
        for token in self.stop_tokens:
            _expect(_is_int(token) and token >= 0, "stop_tokens", "token ids", token)
        for string in self.stop_strings:
            _expect(isinstance(string, str) and string != "", "stop_strings", "non-empty strings", string)

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p rule tokens out."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on the tokens before it, beyond what the model makes of them."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.no_repeat_ngram_size > 0
        )

    def early(self, written: int) -> bool:
        """Whether a completion of so many tokens is too short to stop."""
        return bool(self.stop_tokens) and written < self.min_tokens

    @property
    def tail(self) -> int:
        """Tokens whose text holds any stop string: a token is at least a byte, but for a few marks."""
        return max((len(string.encode()) for string in self.stop_strings), default=0) + 8

    def completes(self, tokenizer: Any, texts: Sequence[Sequence[int]], written: Sequence[int]) -> list[bool]:
        """Whether a stop string stands in the last tokens of each text, of which `written` are the completion's: the
        last `tail`, and the one before them suffice. That one is decoded too, for some tokenizers leave out the space
        that a text begins with."""
        if not self.stop_strings:
            return [False] * len(texts)
        counts = [min(count, self.tail) for count in written]
        ends = [list(text[-count - 1 :]) for text, count in zip(texts, counts, strict=True)]
        firsts = [end[:-count] for end, count in zip(ends, counts, strict=True)]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        pairs = zip(tokenizer.batch_decode(ends, **options), tokenizer.batch_decode(firsts, **options), strict=True)
        return [any(string in end[len(first) :] for string in self.stop_strings) for end, first in pairs]

    def check(self, tokenizer: Any, vocabulary: int) -> None:
        """RolloutError for stop tokens outside the vocabulary, and for stop strings without a tokenizer."""
        if self.stop_strings and tokenizer is None:
            raise RolloutError("expected a tokenizer, which stop_strings need, found none: pass tokenizer=")
        outside = [token for token in self.stop_tokens if token >= vocabulary]
        if outside:
            raise RolloutError(
                f"expected stop tokens below the vocabulary's {vocabulary}, found {outside}: take its tokenizer's"
            )


_LEAST = {"max_tokens": 0, "top_k": 0, "n": 1, "min_tokens": 0, "no_repeat_ngram_size": 0}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise RecipeError(f"sampling.{name} must be {expected}, found {found!r}: change sampling.{name}")


@dataclass(frozen=True)
class History:
    """What stands before the token to draw: `tokens_BT`, of which `real_BT` are tokens (the rest is padding on the
    left, of any value) and `written_BT` those of the completion."""

    tokens_BT: torch.Tensor
    real_BT: torch.Tensor
    written_BT: torch.Tensor


def served_logits(logits_BV: torch.Tensor, sampling: Sampling, history: History | None = None) -> torch.Tensor:
    """The logits that tokens are drawn from, -inf where a token cannot be drawn (float32).

    `history` is needed for penalties and `min_tokens`. Greedy (temperature 0): penalised, neither scaled nor filtered.
    Repetition penalty: Keskar et al. 2019 (arXiv 1909.05858), made sign-aware as in transformers; top-p: Holtzman et
    al. 2020 (arXiv 1904.09751), the smallest set of the most probable tokens that holds at least `top_p`.
    """
    logits_BV = logits_BV.float()
    if history is not None:
        logits_BV = _penalise(logits_BV, sampling, history)
    if sampling.temperature == 0:
        return logits_BV
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if sampling.filters:
        logits_BV = _keep_top(logits_BV, sampling.top_k, sampling.top_p)
    return logits_BV


def _penalise(logits_BV: torch.Tensor, sampling: Sampling, history: History) -> torch.Tensor:
    tokens_BT = history.tokens_BT

    def counts_of(kept_BT: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits_BV).scatter_add_(1, tokens_BT, kept_BT.to(logits_BV.dtype))

    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = torch.where(counts_of(history.real_BT) > 0, penalised_BV, logits_BV)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts_BV = counts_of(history.written_BT)
        logits_BV = logits_BV - sampling.frequency_penalty * counts_BV - sampling.presence_penalty * (counts_BV > 0)
    if sampling.no_repeat_ngram_size:
        banned_BV = counts_of(_ends_of_ngrams(history, sampling.no_repeat_ngram_size)) > 0
        logits_BV = logits_BV.masked_fill(banned_BV, -math.inf)
    if sampling.min_tokens and sampling.stop_tokens:
        early_B = history.written_BT.sum(1) < sampling.min_tokens
        stops_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
        stops_V[list(sampling.stop_tokens)] = True
        logits_BV = logits_BV.masked_fill(early_B[:, None] & stops_V, -math.inf)
    return logits_BV


def _ends_of_ngrams(history: History, size: int) -> torch.Tensor:
    """True at each token that ended an n-gram whose first n - 1 tokens are the last n - 1 ones: it would repeat."""
    tokens_BT, real_BT = history.tokens_BT, history.real_BT
    ends_BT = torch.zeros_like(real_BT)
    length = tokens_BT.shape[1]
    if length < size:
        return ends_BT
    matches_BT = real_BT[:, : length - size + 1].clone()  # at the place of an n-gram's first token, which must be real
    for offset in range(size - 1):
        wanted_B1 = tokens_BT[:, length - size + 1 + offset, None]
        matches_BT &= tokens_BT[:, offset : length - size + 1 + offset] == wanted_B1
    ends_BT[:, size - 1 :] = matches_BT
    return ends_BT


def _keep_top(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """-inf outside the `top_k` largest logits, and of those outside the smallest set with `top_p` of their mass."""
    vocabulary = logits_BV.shape[-1]
    count = min(top_k or _CANDIDATES, vocabulary)
    while True:
        top_BK, tokens_BK = logits_BV.topk(count)
        if top_p == 1:
            break
        total_B1 = (top_BK if top_k else logits_BV).logsumexp(-1, keepdim=True)
        probs_BK = (top_BK - total_B1).exp().double()
        before_BK = probs_BK.cumsum(-1) - probs_BK
        if top_k or count == vocabulary or bool((before_BK[:, -1] >= top_p).all()):
            top_BK = top_BK.masked_fill(before_BK >= top_p, -math.inf)
            break
        count = vocabulary
    return torch.full_like(logits_BV, -math.inf).scatter_(1, tokens_BK, top_BK)


def mixed_logits(student_logits_BV: torch.Tensor, teacher_logits_BV: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q), p and q the softmax of the teacher's and the student's logits."""
    student_BV = student_logits_BV.log_softmax(-1) + math.log1p(-share)
    if share == 0:
        return student_BV
    return torch.logaddexp(student_BV, teacher_logits_BV.log_softmax(-1) + math.log(share))


def draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """One token a row: see `draw_scored`."""
    return draw_scored(logits_BV, uniforms_B)[0]


def draw_scored(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inversion, the first whose cumulative probability exceeds the uniform (float64, [0, 1)), and
    its log-probability.

    Summed by blocks, so that only the block that is hit is summed token by token. A token of probability 0 is never
    drawn: it does not raise the sum, and the uniform is scaled by the sum it has.
    """
    weights_BV = logits_BV.softmax(-1)  # one pass in a core's cache
    short = -weights_BV.shape[-1] % _BLOCK
    padded_BV = F.pad(weights_BV, (0, short)) if short else weights_BV
    blocks_BKW = padded_BV.unflatten(-1, (-1, _BLOCK))
    sums_BK = blocks_BKW.sum(-1).double()  # not by `dtype`, which makes a copy of all
    total_B = sums_BK.sum(-1)
    block_B, rest_B = _invert(sums_BK, uniforms_B * total_B)
    rows_B = torch.arange(len(block_B), device=block_B.device)
    hit_BW = blocks_BKW[rows_B, block_B].double()
    # A block's own sum is rounded to float32: the rest is taken as a share of it.
    place_B, _ = _invert(hit_BW, rest_B * (hit_BW.sum(-1) / sums_BK[rows_B, block_B]))
    # The clamp is reached by NaN alone, which the caller reports.
    tokens_B = (block_B * _BLOCK + place_B).clamp_(max=logits_BV.shape[-1] - 1)
    chosen_B1 = weights_BV.gather(-1, tokens_B[:, None])
    return tokens_B, (chosen_B1[:, 0].double() / total_B).log().to(logits_BV.dtype)


def _invert(weights_BN: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the first place whose cumulative weight exceeds the target, what of the target lies in it). Where rounding has
    put a target past the sum, the last place that has a weight."""
    cumulative_BN = weights_BN.cumsum(-1)
    past_B1 = torch.searchsorted(cumulative_BN, targets_B[:, None], right=True)
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())
    place_B1 = torch.minimum(past_B1, last_B1).clamp_(max=weights_BN.shape[-1] - 1)
    before_B1 = cumulative_BN.gather(1, place_B1) - weights_BN.gather(1, place_B1)
    return place_B1[:, 0], targets_B - before_B1[:, 0]


def stream_key(seed: int, stream: Sequence[int], sample: int) -> tuple[int, int]:
    """The start and the odd step of one completion's random numbers: SplitMix64 (Steele et al., OOPSLA 2014), as signed
    64-bit integers for `uniforms`."""
    key = _mix(seed & _WORD)
    for value in (len(stream), *stream, sample):
        key = _mix((key + _GOLDEN) & _WORD ^ _mix(value & _WORD))
    gamma = _mix((key + _GOLDEN) & _WORD) | 1
    return _signed(key), _signed(gamma)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _WORD
    value = ((value ^ (value >> 27)) * _MIX_2) & _WORD
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def uniforms(key_B: torch.Tensor, gamma_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """The random numbers of these streams at these positions: multiples of 2^-53 in [0, 1), float64."""
    value_B = key_B + (position_B + 1) * gamma_B  # int64 wraps around, as it should
    value_B = (value_B ^ _shifted(value_B, 30)) * _signed(_MIX_1)
    value_B = (value_B ^ _shifted(value_B, 27)) * _signed(_MIX_2)
    value_B = value_B ^ _shifted(value_B, 31)
    return _shifted(value_B, 11).double() * 2.0**-53


def _shifted(value_B: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right: torch's own keeps the sign."""
    return (value_B >> bits) & ((1 << (64 - bits)) - 1)
