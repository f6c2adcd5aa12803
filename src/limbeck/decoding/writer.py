"""Completions for many prompts at once, with a cache written in place, in batches that never wait for one row.

All rows of the batch stand at the same column and are padded on the left. A row that has ended leaves at once: the
last rows of the batch move into the holes, so that a forward computes live rows only. Waiting prompts join in groups,
longest first: whoever joins later is shorter than the columns already there.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch

from limbeck.decoding.cache import SlotCache, View, moved
from limbeck.decoding.records import Completion, Row, finished, nothing_to_draw
from limbeck.decoding.sampler import History, Sampling, draw_scored, mixed_logits, served_logits, uniforms
from limbeck.models import unwrap
from limbeck.ops.tiles import token_logprobs

_PREFILL_TOKENS = 16_384  # prompt tokens, padding included, in one forward
_GROWTH = 64  # columns that the buffers grow by, at least


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


def write_in_place(
    models: list[Any],
    rows: list[Row],
    batch_size: int,
    done: dict[int, Completion],
    *,
    share: float | None,
    sampling: Sampling,
    tokenizer: Any,
    vocabulary: int,
) -> None:
    """Puts the completions of `rows` into `done`, each as it ends. `share`: see `Mix`; None for one model."""
    _Writer(models, share, rows, sampling, tokenizer, vocabulary, min(batch_size, len(rows)), done).run()


class _Writer:
    """Writes all rows. Slots [0, active) of every buffer hold the rows in the batch, and all stand at `column`: their
    newest token is there, and their keys and values end before it. Column `base` is the buffers' first."""

    def __init__(
        self,
        models: list[Any],
        share: float | None,
        rows: list[Row],
        sampling: Sampling,
        tokenizer: Any,
        vocabulary: int,
        slots: int,
        done: dict[int, Completion],
    ) -> None:
        self.share = share
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        first: Any = unwrap(models[0])
        self.device = first.get_input_embeddings().weight.device
        # Longest first; what is waiting is taken from the end.
        self.waiting = sorted(rows, key=lambda row: len(row.tokens))
        self.batch: list[Row] = []
        self.done = done
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

    def run(self) -> None:
        slots = self.view.slots
        group = max(1, slots // 8)  # joining costs a forward of its own
        while self.waiting or self.batch:
            if self.waiting and slots - len(self.batch) >= min(group, len(self.waiting)):
                self._admit()
            else:
                self._step()
            self._retire()

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
        history, scored_B = None, None
        if sampling.penalises or self._early(rows):
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
            tokens_B, scored_B = draw_scored(served_BV, uniforms(key_B, gamma_B, self.column - start_B))
        column = self.column - self.base
        self.tokens_ST[rows, column] = tokens_B
        for logprobs_ST, logits_BV in zip(self.logprobs_MST, logits_MBV, strict=True):
            if scored_B is not None and served_BV is logits_BV:  # drawn as it is: the sum over the vocabulary is known
                logprobs_ST[rows, column] = scored_B
            else:
                logprobs_ST[rows, column] = token_logprobs(logits_BV, tokens_B)

    def _early(self, rows: slice) -> bool:
        """Whether a row is still too short to stop."""
        return any(self.sampling.early(self.column - row.start) for row in self.batch[rows])

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
            newest = self.tokens_ST[:active, max(0, column - self.sampling.tail) : column + 1].tolist()
            written = [self.column + 1 - row.start for row in self.batch]
            completed = self.sampling.completes(self.tokenizer, newest, written)
            stopped.update(slot for slot, ended in enumerate(completed) if ended)
        return stopped

    def _finish(self, slot: int, reason: Literal["stop", "length"]) -> None:
        row = self.batch[slot]
        columns = self._columns(row.start, self.column + 1)
        tokens, logprobs_MT = self.tokens_ST[slot, columns].tolist(), self.logprobs_MST[:, slot, columns].tolist()
        self.done[row.place] = finished(row, tokens, logprobs_MT, reason)

    def _check_served(self, served_BV: torch.Tensor, rows: slice) -> None:
        """RolloutError where the penalties have left no token."""
        empty_B = (served_BV == -torch.inf).all(-1)
        if empty_B.any():
            slot = rows.start + int(empty_B.int().argmax())
            row = self.batch[slot]
            raise nothing_to_draw(row, self.column - row.start, self.vocabulary)

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
