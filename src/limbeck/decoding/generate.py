"""The rollout engine: completions for many prompts at once, with a cache, in batches that never wait for one row.

All rows of the batch stand at the same column and are padded on the left. A row that has ended leaves at once: the
last rows of the batch move into the holes, so that a forward computes live rows only. Waiting prompts join in groups,
longest first: whoever joins later is shorter than the columns already there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from limbeck.decoding.cache import SlotCache, View, check_attention_only, moved
from limbeck.decoding.sampler import (
    History,
    Sampling,
    draw,
    mixed_logits,
    served_logits,
    stream_key,
    uniforms,
)
from limbeck.errors import RolloutError
from limbeck.models import unwrap, vocabulary_rows

_PREFILL_TOKENS = 16_384  # prompt tokens, padding included, in one forward
_GROWTH = 64  # columns that the buffers grow by, at least


@dataclass(frozen=True)
class Prompt:
    """What a completion continues. `decoder_start` and `extras` are for models that read more than `tokens`."""

    tokens: Sequence[int]
    decoder_start: Sequence[int] = ()
    extras: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Mix:
    """A policy of two models in lockstep: each token is drawn from share * teacher + (1 - share) * student, after the
    same temperature (MiniLLM, arXiv:2306.08543, section 2.2). `share` is the teacher's weight, 0 <= share < 1."""

    student: Any
    teacher: Any
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise RolloutError(
                f"Mix: expected the teacher's share in [0, 1), found {self.share}: at 1 the student writes nothing"
            )


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt. `logprobs[i]` is the model's (of a `Mix`: the student's) log-probability of
    `tokens[i]` at temperature 1, unfiltered, over the vocabulary without its padding rows, in nats; `teacher_logprobs`
    the same of a Mix's teacher. `stop`: the last token is a stop token or completes a stop string; `length`:
    `max_tokens` or the model's context is full."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    teacher_logprobs: list[float] | None = None


def generate(
    policy: Any,
    prompts: Sequence[Sequence[int] | Prompt],
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    tokenizer: Any = None,
    streams: Sequence[tuple[int, ...]] | None = None,
) -> list[Completion]:
    """`sampling.n` completions a prompt, prompt-major: those of prompt i stand at [i n, (i + 1) n).

    policy: a causal language model of transformers, also wrapped, or a Mix of two; they are in eval mode meanwhile and
        left as they were.
    batch_size: sequences in a forward, by default 256, or 64 from 100 M parameters on.
    tokenizer: needed for `sampling.stop_strings` only.
    streams: one tuple of integers a prompt, which with `sampling.seed` and the sample's number fixes its random numbers
        whatever the batch; by default the prompt's place.

    Raises RolloutError: a prompt that is empty, fills the context or has tokens outside the vocabulary; logits that are
    NaN or leave no token to draw; a model that is not causal or keeps more than keys and values.
    """
    if not prompts:
        return []
    models = [policy.student, policy.teacher] if isinstance(policy, Mix) else [policy]
    vocabulary, limit = _common_limits(models)
    _check_sampling(sampling, tokenizer, vocabulary, mixed=len(models) > 1)
    if batch_size is not None and batch_size < 1:
        raise RolloutError(f"expected a batch_size of at least 1, found {batch_size}: leave it out for the default")
    if streams is not None and len(streams) != len(prompts):
        raise RolloutError(f"expected a stream for each of {len(prompts)} prompts, found {len(streams)}")
    rows: list[_Row] = []
    for index, prompt in enumerate(prompts):
        tokens = _prompt_tokens(prompt, index, limit, vocabulary)
        room = sampling.max_tokens if limit is None else min(sampling.max_tokens, limit - len(tokens))
        for sample in range(sampling.n):
            key = stream_key(sampling.seed, (index,) if streams is None else streams[index], sample)
            rows.append(_Row(len(rows), index, tokens, room, *key))
    if sampling.max_tokens == 0:
        return [Completion([], [], "length") for _ in rows]
    if batch_size is None:
        batch_size = 256 if sum(p.numel() for model in models for p in model.parameters()) < 100e6 else 64
    share = policy.share if isinstance(policy, Mix) else None
    writer = _Writer(models, share, rows, sampling, tokenizer, vocabulary, min(batch_size, len(rows)))
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_evaluating(model))
        return writer.run()


@dataclass(eq=False)
class _Row:
    """One completion to write. Columns are counted from the first that was ever written; `first` holds the prompt's
    first token and `start` the completion's, both known once the row has joined the batch."""

    place: int
    prompt: int
    tokens: tuple[int, ...]
    room: int
    key: int
    gamma: int
    first: int = 0
    start: int = 0


class _Reader:
    """One model with its cache."""

    def __init__(self, model: Any, view: View) -> None:
        self.model = model
        self.cache = SlotCache(view)
        accepted = inspect.signature(unwrap(model).forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def logits(self, input_ids_BT: torch.Tensor, distance_BT: torch.Tensor) -> torch.Tensor:
        """After the last column. `distance_BT`: places from each row's first token, negative in its padding, of all
        columns that are seen; the last ones are `input_ids_BT`'s."""
        arguments: dict[str, Any] = dict(self.options)
        if self.takes_positions:
            arguments["position_ids"] = distance_BT[:, -input_ids_BT.shape[1] :].clamp(min=0)
        output = self.model(
            input_ids=input_ids_BT,
            attention_mask=(distance_BT >= 0).long(),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **arguments,
        )
        return output.logits[:, -1]


class _Writer:
    """Writes all rows. Slots [0, active) of every buffer hold the rows in the batch, and all stand at `column`: their
    newest token is there, and their keys and values end before it. Column `base` is the buffers' first."""

    def __init__(
        self,
        models: list[Any],
        share: float | None,
        rows: list[_Row],
        sampling: Sampling,
        tokenizer: Any,
        vocabulary: int,
        slots: int,
    ) -> None:
        self.share = share
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        first: Any = unwrap(models[0])
        self.device = first.get_input_embeddings().weight.device
        # Longest first; what is waiting is taken from the end.
        self.waiting = sorted(rows, key=lambda row: len(row.tokens))
        self.batch: list[_Row] = []
        self.done: list[Completion | None] = [None] * len(rows)
        longest = len(self.waiting[-1].tokens)
        self.widest = max(len(row.tokens) + row.room for row in rows)
        capacity = min(self.widest, longest + max(_GROWTH, longest // 2)) + 1
        self.view = View(slots, capacity)
        self.readers = [_Reader(model, self.view) for model in models]
        self.base = self.origin = self.column = 0
        self.tokens_ST = torch.zeros(slots, capacity, dtype=torch.long, device=self.device)
        self.logprobs_MST = torch.zeros(len(models), slots, capacity, device=self.device)
        # Per slot: first, start, key, gamma of its row.
        self.numbers_4S = torch.zeros(4, slots, dtype=torch.long, device=self.device)
        self.stops = torch.tensor(sampling.stop_tokens, dtype=torch.long, device=self.device)
        tail = max((len(string.encode()) for string in sampling.stop_strings), default=0)
        self.tail = tail + 8  # tokens whose text is searched: a token is at least a byte, but for a few marks

    def run(self) -> list[Completion]:
        slots = self.view.slots
        group = max(1, slots // 8)  # joining costs a forward of its own
        while self.waiting or self.batch:
            if self.waiting and slots - len(self.batch) >= min(group, len(self.waiting)):
                self._admit()
            else:
                self._step()
            self._retire()
        return [completion for completion in self.done if completion is not None]

    def _admit(self) -> None:
        """Waiting rows join at the slots behind the batch; a prompt is read once, however many of its samples join."""
        active, longest = len(self.batch), len(self.waiting[-1].tokens)
        count = min(self.view.slots - active, len(self.waiting), max(1, _PREFILL_TOKENS // longest))
        popped = [self.waiting.pop() for _ in range(count)]
        readers = {row.tokens: row for row in reversed(popped)}
        others = [row for row in popped if readers[row.tokens] is not row]
        joining = [*readers.values(), *others]
        if not self.batch:
            self.base = self.origin = self.column
            self.column += longest
        self._make_room()
        for row in joining:
            row.first, row.start = self.column - len(row.tokens), self.column
        begin = self.column - longest
        numbers = [(row.first, row.start, row.key, row.gamma) for row in joining]
        padded = [(0,) * (longest - len(row.tokens)) + row.tokens for row in joining]
        joined = slice(active, active + count)
        window = self._columns(begin, self.column)
        self.numbers_4S[:, joined] = torch.tensor(numbers, device=self.device).T
        self.tokens_ST[joined, window] = torch.tensor(padded, device=self.device)
        self.batch += joining
        self.origin = min(row.first for row in self.batch)

        logits_MRV = self._forward(slice(active, active + len(readers)), begin, begin, self.column)
        place = {tokens: place for place, tokens in enumerate(readers)}
        sources_B = torch.tensor([place[row.tokens] for row in joining], device=self.device)
        if others:
            targets = torch.arange(active + len(readers), active + count, device=self.device)
            for reader in self.readers:
                reader.cache.copy_rows(active + sources_B[len(readers) :], targets, window)
        self._write([logits_RV[sources_B] for logits_RV in logits_MRV], joined)

    def _step(self) -> None:
        """One more token for every row of the batch."""
        rows = slice(0, len(self.batch))
        self._make_room()
        logits_MBV = self._forward(rows, self.origin, self.column, self.column + 1)
        self.column += 1
        self._write(logits_MBV, rows)

    def _forward(self, rows: slice, origin: int, begin: int, end: int) -> list[torch.Tensor]:
        """Each model's logits (float32) after the last of the columns [begin, end), where [origin, begin) have been
        read before."""
        self.view.rows, self.view.origin, self.view.column = rows, origin - self.base, begin - self.base
        columns_T = torch.arange(origin, end, device=self.device)
        distance_BT = columns_T - self.numbers_4S[0, rows, None]
        input_ids_BT = self.tokens_ST[rows, self._columns(begin, end)]
        return [reader.logits(input_ids_BT, distance_BT)[:, : self.vocabulary].float() for reader in self.readers]

    def _write(self, logits_MBV: list[torch.Tensor], rows: slice) -> None:
        """Draws the token at `column` for these rows."""
        sampling = self.sampling
        first_B, start_B, key_B, gamma_B = self.numbers_4S[:, rows]
        history = None
        if sampling.penalises or (sampling.min_tokens and sampling.stop_tokens):
            columns_T = torch.arange(self.origin, self.column, device=self.device)
            tokens_BT = self.tokens_ST[rows, self._columns(self.origin, self.column)]
            history = History(tokens_BT, columns_T >= first_B[:, None], columns_T >= start_B[:, None])
        served_BV = served_logits(logits_MBV[0], sampling, history)
        if self.share is not None:
            served_BV = mixed_logits(served_BV, served_logits(logits_MBV[1], sampling), self.share)
        if history is not None:
            self._check_served(served_BV, rows)
        if sampling.temperature == 0:
            tokens_B = served_BV.argmax(-1)
        else:
            tokens_B = draw(served_BV, uniforms(key_B, gamma_B, self.column - start_B))
        column = self.column - self.base
        self.tokens_ST[rows, column] = tokens_B
        for logprobs_ST, logits_BV in zip(self.logprobs_MST, logits_MBV, strict=True):
            chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
            logprobs_ST[rows, column] = chosen_B - logits_BV.logsumexp(-1)

    def _retire(self) -> None:
        """Rows that have ended leave, and the last ones of the batch take their slots."""
        stopped = self._stopped()
        written = self.column + 1
        ended = [slot for slot, row in enumerate(self.batch) if slot in stopped or written - row.start >= row.room]
        if not ended:
            return
        for slot in ended:
            self._finish(slot, "stop" if slot in stopped else "length")
        gone = set(ended)
        left = len(self.batch) - len(ended)
        holes = [slot for slot in ended if slot < left]
        movers = [slot for slot in range(left, len(self.batch)) if slot not in gone]
        if holes:
            sources, targets = torch.tensor(movers, device=self.device), torch.tensor(holes, device=self.device)
            for reader in self.readers:
                reader.cache.copy_rows(sources, targets, self._columns(self.origin, self.column))
            self.numbers_4S[:, targets] = self.numbers_4S[:, sources]
            for buffer_ST in (self.tokens_ST, *self.logprobs_MST):
                buffer_ST[targets] = buffer_ST[sources]
            for hole, mover in zip(holes, movers, strict=True):
                self.batch[hole] = self.batch[mover]
        del self.batch[left:]
        if self.batch:
            self.origin = min(row.first for row in self.batch)

    def _stopped(self) -> set[int]:
        """The slots whose newest token ends them."""
        stopped: set[int] = set()
        active, column = len(self.batch), self.column - self.base
        if self.sampling.stop_tokens:
            hit_B = torch.isin(self.tokens_ST[:active, column], self.stops)
            if hit_B.any():
                stopped.update(hit_B.nonzero()[:, 0].tolist())
        if self.sampling.stop_strings:
            newest = self.tokens_ST[:active, max(0, column + 1 - self.tail) : column + 1].tolist()
            tails = [tokens[-(self.column + 1 - row.start) :] for tokens, row in zip(newest, self.batch, strict=True)]
            texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            strings = self.sampling.stop_strings
            stopped.update(slot for slot, text in enumerate(texts) if any(string in text for string in strings))
        return stopped

    def _finish(self, slot: int, reason: Literal["stop", "length"]) -> None:
        row = self.batch[slot]
        columns = self._columns(row.start, self.column + 1)
        logprobs_MT = self.logprobs_MST[:, slot, columns]
        if logprobs_MT.isnan().any():
            position = int(logprobs_MT.isnan().any(0).int().argmax())
            raise RolloutError(
                f"prompt {row.prompt}: expected finite logits, found NaN at position {position} of the completion: "
                "check the model's weights and dtype"
            )
        logprobs, *teacher_logprobs = logprobs_MT.tolist()
        self.done[row.place] = Completion(self.tokens_ST[slot, columns].tolist(), logprobs, reason, *teacher_logprobs)

    def _check_served(self, served_BV: torch.Tensor, rows: slice) -> None:
        """RolloutError where the penalties have left no token."""
        empty_B = (served_BV == -torch.inf).all(-1)
        if empty_B.any():
            slot = rows.start + int(empty_B.int().argmax())
            row = self.batch[slot]
            raise RolloutError(
                f"prompt {row.prompt}: expected a token to draw at position {self.column - row.start} of the "
                f"completion, found all {self.vocabulary} ruled out: lower no_repeat_ngram_size or min_tokens"
            )

    def _columns(self, begin: int, end: int) -> slice:
        return slice(begin - self.base, end - self.base)

    def _make_room(self) -> None:
        """New buffers, without the columns before `origin`, where the old ones end before the column after `column`."""
        needed = self.column + 2 - self.base
        if needed <= self.view.capacity:
            return
        width = self.column + 2 - self.origin
        capacity = min(width + max(_GROWTH, width // 2), self.widest + _GROWTH)
        kept = self._columns(self.origin, min(self.column + 1, self.base + self.view.capacity))
        for reader in self.readers:
            reader.cache.move_columns(kept, capacity)
        self.tokens_ST = moved(self.tokens_ST, kept, capacity, axis=1)
        self.logprobs_MST = moved(self.logprobs_MST, kept, capacity, axis=2)
        self.base = self.origin


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's mode is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _common_limits(models: list[Any]) -> tuple[int, int | None]:
    """(tokens of the vocabulary, context length or None) of models that write together. RolloutError for a model that
    this engine cannot run, and for two vocabularies."""
    sizes: list[int] = []
    limits: list[int] = []
    for model in models:
        base: Any = unwrap(model)
        if base.config.is_encoder_decoder:
            raise RolloutError(f"expected a causal language model, found an encoder-decoder ({base.config.model_type})")
        check_attention_only(base.config)
        sizes.append(vocabulary_rows(base) or base.get_input_embeddings().weight.shape[0])
        limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        limits += [] if limit is None else [limit]
    if len(set(sizes)) > 1:
        raise RolloutError(
            f"Mix: expected one vocabulary, found {sizes[0]} tokens in the student and {sizes[1]} in the teacher: "
            "declare the tokens that they share by limbeck.models.set_vocabulary"
        )
    return sizes[0], min(limits, default=None)


def _check_sampling(sampling: Sampling, tokenizer: Any, vocabulary: int, *, mixed: bool) -> None:
    if mixed and (sampling.filters or sampling.penalises or sampling.min_tokens or sampling.temperature == 0):
        raise RolloutError(
            "Mix: expected a temperature above 0 and no filter (top_p, top_k, penalties, min_tokens), found one: "
            "a mixture of filtered distributions has no usual meaning"
        )
    if sampling.stop_strings and tokenizer is None:
        raise RolloutError("expected a tokenizer, which stop_strings need, found none: pass tokenizer=")
    outside = [token for token in sampling.stop_tokens if token >= vocabulary]
    if outside:
        raise RolloutError(
            f"expected stop tokens below the vocabulary's {vocabulary}, found {outside}: take those of its tokenizer"
        )


def _prompt_tokens(prompt: Sequence[int] | Prompt, index: int, limit: int | None, vocabulary: int) -> tuple[int, ...]:
    """The tokens of a prompt that a causal model can continue."""
    if isinstance(prompt, Prompt):
        if prompt.decoder_start or prompt.extras:
            raise RolloutError(
                f"prompt {index}: expected tokens alone for a causal model, found decoder_start or extras: remove them"
            )
        prompt = prompt.tokens
    tokens = tuple(int(token) for token in prompt)
    if not tokens:
        raise RolloutError(f"prompt {index}: expected at least one token, found none: begin it with BOS")
    if limit is not None and len(tokens) >= limit:
        raise RolloutError(
            f"prompt {index}: expected fewer tokens than the context's {limit}, found {len(tokens)}: shorten it"
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        outside = next(token for token in tokens if not 0 <= token < vocabulary)
        raise RolloutError(
            f"prompt {index}: expected tokens below {vocabulary}, found {outside}: encode it with the model's tokenizer"
        )
    return tokens
