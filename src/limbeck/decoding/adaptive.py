"""A controller that drafts as much as pays, from what rounds have cost and brought.

One rule: what is done is what promises the most tokens a second, all that it costs counted, and a round without any
drafts is among the choices. Within a round, drafting is a renewal process: the next token is drafted as long as its
expected gain per second of its own cost is at least the speed reached so far (marginal value theorem, Charnov 1976):
whether the tokens before it stand, by the draft's confidence in each and how often such confidence was right, times how
often the next one stands.

What does not pay is tried now and then, for texts change and drafts learn. Trials live on an allowance: a share of the
time that is spent without the draft, and what they save. So they cost that share at most, and go on where they pay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from limbeck.decoding.controller import NOTHING, Choice, Drafted, Round
from limbeck.decoding.costs import Average, DraftRecord, VerifyCost
from limbeck.decoding.drafts.ngram import NgramDraft, ngram_confidence
from limbeck.decoding.live import Live
from limbeck.decoding.pieces import PIECE

_ROUND_DECAY = 0.97
_ROW_DECAY = 0.97
_ROW_TOKENS = 8.0  # of its draft's past that count beside a row's own
_NEGLIGIBLE = 0.01  # the chance of a token that no longer block is looked at for
_TRIALS = 0.02  # share of the time without a draft that its trials may cost
_TRIALS_AHEAD = 4  # trials that an allowance is for, at most


@dataclass(frozen=True)
class _Trial:
    """Seconds that it may lose, and those by which the plan in whose place it comes would have been faster."""

    loss: float
    forgone: float


class Adaptive:
    """Chooses for each round who drafts and how much, off included.

    draft: the name of the one that serves requests without a route; None: none does. ngram: its name and itself, used
    where a match promises more than the others do, whatever the route. max_gamma: tokens drafted at most.
    """

    def __init__(self, draft: str | None, *, ngram: tuple[str, NgramDraft] | None = None, max_gamma: int = 12) -> None:
        self.draft = draft
        self.ngram = ngram
        self.max_gamma = max_gamma
        self.records: defaultdict[str, DraftRecord] = defaultdict(DraftRecord)
        self.rows: WeakKeyDictionary[Live, Average] = WeakKeyDictionary()  # how often a token stands in this text
        self.verify = VerifyCost()
        self.reached: dict[int, tuple[float, float]] = {}  # by number of rows: tokens, seconds of the last rounds
        self.length = Average(decay=0.98)  # of completions
        self.planned = 1  # rows in this round
        self.speed = 0.0  # tokens a second that its plan promises, trials apart
        self.refused: set[str] = set()  # drafts that do not pay in it
        self.tried: dict[str, _Trial] = {}  # those of them that are tried nonetheless

    @property
    def names(self) -> Sequence[str]:
        ngram = [] if self.ngram is None else [self.ngram[0]]
        return ngram if self.draft is None else [self.draft, *ngram]

    # -- before a round ----------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[Live]) -> list[Choice]:
        self.planned, self.refused, self.tried = len(rows), set(), {}
        for row in rows:
            self.rows.setdefault(row, Average(decay=_ROW_DECAY)).shrink(_ROW_DECAY)
        planned = [NOTHING] * len(rows)
        groups: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            name = row.request.route or self.draft
            if name is not None:
                groups.setdefault(name, []).append(place)
        tokens, seconds = float(len(rows)), self.verify(len(rows))
        self.speed = tokens / seconds if seconds > 0 else 0.0
        for name, places in groups.items():
            worth, more, cost = self._best_block(name, [rows[place] for place in places])
            tokens, seconds = tokens + more, seconds + cost
            self.speed = tokens / seconds if seconds > 0 else 0.0
            for place in (places[index] for index in worth):
                planned[place] = Choice(name, self.max_gamma)
            if not worth:
                self.refused.add(name)
        if self.ngram is not None and (matched := self._by_matches(rows)) is not None:
            return matched
        for name in [name for name in groups if name in self.refused]:
            self.records[name].rest()
            place = min(groups[name], key=lambda place, name=name: rows[place].behind.get(name, 0))
            if self._affords(name, self._step_s(name, 1) + self._debt(name, rows[place])):
                planned[place] = Choice(name, self.max_gamma)
        return planned

    def _best_block(self, name: str, rows: Sequence[Live]) -> tuple[list[int], float, float]:
        """(which of these rows are worth drafting for, the tokens and the seconds that it adds to a round), by the
        length of block that gains the most over the speed of the plan so far. A row that is behind pays for what must
        be read with the tokens that are still to come, and where it cannot it is left out."""
        record = self.records[name]
        shares = [self._share(row, record) for row in rows]
        debts = [self._debt(name, row) / self._to_come(row) for row in rows]
        reach, gains = [1.0] * len(rows), [0.0] * len(rows)
        step_s = self._step_s(name, len(rows))
        found: tuple[list[int], float, float] = ([], 0.0, 0.0)
        surplus = 0.0
        for gamma in range(1, self.max_gamma + 1):
            likelier = record.at(gamma - 1)
            for place, stands in enumerate(shares):
                reach[place] *= min(1.0, stands * likelier)
                gains[place] += reach[place]
            paid = [debt * (1 + gain) for debt, gain in zip(debts, gains, strict=True)]
            worth = [place for place, gain in enumerate(gains) if gain > self.speed * paid[place]]
            tokens = sum(gains[place] for place in worth)
            seconds = gamma * step_s + self._wider(gamma) + sum(paid[place] for place in worth)
            if tokens - self.speed * seconds > surplus:
                surplus, found = tokens - self.speed * seconds, (worth, tokens, seconds)
            if max(reach) < _NEGLIGIBLE:
                break
        return self._in_turn(name, rows, found[0]), *found[1:]

    def _in_turn(self, name: str, rows: Sequence[Live], worth: list[int]) -> list[int]:
        """Of these rows those that one round can read for: everybody waits while a draft reads."""
        read, taken = 0, list[int]()
        for place in sorted(worth, key=lambda place: rows[place].behind.get(name, 0)):
            read += min(rows[place].behind.get(name, 0), PIECE)
            if read <= PIECE or not taken:
                taken.append(place)
        return taken

    def _by_matches(self, rows: Sequence[Live]) -> list[Choice] | None:
        """A round of n-grams, where one promises more than what is planned: those rows that have a match draft by it,
        the others not at all. Where none does, the longest match may be tried by a token."""
        assert self.ngram is not None
        name, draft = self.ngram
        record, found = self.records[name], dict[int, tuple[int, Average]]()
        for place, row in enumerate(rows):
            tokens, length = draft.look_up(row, self.max_gamma)
            if tokens:
                found[place] = len(tokens), record.bin_of(ngram_confidence(length))
        if not found:
            return None
        expected, reach = float(len(rows)), dict.fromkeys(found, 1.0)
        gamma = 0
        for count in range(1, max(most for most, _ in found.values()) + 1):
            for place, (most, stands) in found.items():
                reach[place] *= stands.value if count <= most else 0.0
                expected += reach[place]
            seconds = self.verify(self.planned * (count + 1))
            if seconds > 0 and expected / seconds > self.speed:
                self.speed, gamma = expected / seconds, count
        if not gamma:
            self.refused.add(name)
            for stands in {id(stands): stands for _, stands in found.values()}.values():
                record.rest(stands)
            if not self._affords(name, 0.0, alone=True):
                return None
            found, gamma = dict([max(found.items(), key=lambda item: item[1][1].value)]), 1
        return [Choice(name, min(gamma, found[place][0])) if place in found else NOTHING for place in range(len(rows))]

    def _affords(self, name: str, drafting_s: float, *, alone: bool = False) -> bool:
        """Whether a token may be tried for one row, all of whose cost is lost where it does not stand. `alone`: nobody
        else drafts then, whatever the plan."""
        record = self.records[name]
        forgone = self.verify(self.planned) - self.planned / self.speed if alone and self.speed > 0 else 0.0
        loss = forgone + drafting_s + self._wider(1)
        record.allowance = min(record.allowance, _TRIALS_AHEAD * loss)
        if loss > record.allowance:
            return False
        self.tried[name] = _Trial(loss, forgone)
        return True

    def _wider(self, tokens: int) -> float:
        """Seconds that a plain round takes more with so many drafted tokens: each row becomes as wide."""
        return max(self.verify(self.planned * (tokens + 1)) - self.verify(self.planned), 0.0)

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        record, gain = self.records[draft], 0.0
        steps = max(map(len, confidence))
        for row, values in zip(rows, confidence, strict=True):
            if len(values) == steps:  # others have ended
                reach = min(1.0, self._share(row, record) * record.at(steps))
                for value in values:
                    reach *= record.probability(value)
                gain += reach
        more_s = self.verify(self.planned * (steps + 2)) - self.verify(self.planned * (steps + 1))
        return gain >= self._reached() * (self._step_s(draft, len(rows)) + max(more_s, 0.0))

    def _reached(self) -> float:
        """Tokens a second that one more token must beat: plain decoding's, or what the last rounds with as many rows
        have reached."""
        plain_s = self.verify(self.planned)
        tokens, seconds = self.reached.get(self.planned, (0.0, 0.0))
        return max(self.planned / plain_s if plain_s > 0 else 0.0, tokens / seconds if seconds > 0 else 0.0)

    # -- what is known -----------------------------------------------------------------------------------------------

    def _share(self, row: Live, record: DraftRecord) -> float:
        """How often a token stands in this row's text."""
        own = self.rows.get(row)
        if own is None:
            return record.stands.value
        return (own.total + _ROW_TOKENS * record.stands.value) / (own.count + _ROW_TOKENS)

    def _step_s(self, name: str, rows: int) -> float:
        return self.verify.factor * self.records[name].step_s(rows)

    def _debt(self, name: str, row: Live) -> float:
        """Seconds that the draft must read before it can draft for this row: a step's, and more by the column."""
        columns = row.behind.get(name, 0)
        more_s = self.verify.factor * self.records[name].read_s.value * columns
        return self._step_s(name, 1) + more_s if columns else 0.0

    def _to_come(self, row: Live) -> float:
        """Tokens that are likely to come: ends are taken as equally likely everywhere."""
        return max(1.0, min(row.left, self.length.value) if self.length.count else row.left)

    # -- after a round -----------------------------------------------------------------------------------------------

    def record(self, round_: Round) -> None:
        self.verify.add(round_.rows * round_.width, round_.seconds - sum(round_.draft_seconds.values()))
        self.verify.tick()
        tokens, seconds = self.reached.get(round_.rows, (0.0, 0.0))
        self.reached[round_.rows] = (
            tokens * _ROUND_DECAY + round_.tokens,
            seconds * _ROUND_DECAY + round_.seconds,
        )
        for length in round_.ended:
            self.length.add(length)
        for name, step_s in round_.step_seconds.items():
            rows = sum(drafted.draft == name for drafted in round_.drafted)
            self.records[name].step_s.add(max(rows, 1), step_s / self.verify.factor)
        for name, (columns, read_s) in round_.read.items():
            more_s = max(read_s - self._step_s(name, 1), 0.0) / self.verify.factor
            self.records[name].read_s.add(more_s, columns)
        for drafted in round_.drafted:
            self._judge(drafted)
        for name, record in self.records.items():
            record.step_s.tick()
            if name in self.refused:
                record.allowance += _TRIALS * round_.seconds
            if name in self.tried:
                record.allowance += max(self._saved(name, round_), -2 * self.tried[name].loss)
        self.refused, self.tried = set(), {}

    def _saved(self, name: str, round_: Round) -> float:
        """Seconds that the plan would have taken for what the trial brought, without those that the trial took."""
        kept = [drafted.kept for drafted in round_.drafted if drafted.draft == name]
        worth = sum(map(sum, kept)) / self.speed if self.speed > 0 else 0.0
        took = round_.draft_seconds.get(name, 0.0) + self._wider(max(map(len, kept), default=0))
        return worth - took - self.tried[name].forgone

    def _judge(self, drafted: Drafted) -> None:
        record = self.records[drafted.draft]
        if record.renew(drafted.version):
            self.rows.clear()
        record.judged(drafted.confidence, drafted.kept)
        own = self.rows.get(drafted.row)
        if own is not None and (self.ngram is None or drafted.draft != self.ngram[0]):
            for kept in drafted.kept:
                own.add(kept)

    def probed(self, tokens: int, seconds: float) -> None:
        self.verify.probe(tokens, seconds)
