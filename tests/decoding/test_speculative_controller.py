"""The controller in a simulated world of known costs: as fast as the best fixed choice, and no harm where none pays."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from limbeck.decoding import Adaptive, Fixed, NgramDraft, Request, Sampling
from limbeck.decoding.controller import Controller, Drafted, Round
from limbeck.decoding.live import Live


def live(name: str = "a", route: str | None = None, *, prompt: int = 3, most: int = 100_000) -> Live:
    row = Live(Request(name, (5,) * prompt, Sampling(most), route=route), prompt + most, 0)
    row.behind = dict.fromkeys(("draft", route or "draft"), prompt - 1)
    return row


@dataclass
class World:
    """A target and a draft with costs in seconds. A token's confidence says its chance of standing, honestly or not.
    Rounds without the draft leave it behind, and it reads a column in `read`."""

    chances: tuple[float, ...]
    plain: float = 0.12
    per_token: float = 0.003
    step: float = 0.012
    read: float = 0.0
    overhead: float = 0.002
    honest: bool = True
    seed: int = 0
    slow: float = 1.0
    version: int = 0
    clock: float = 0.0
    tokens: int = 0
    drafted_rounds: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def verify(self, width: int) -> float:
        return self.slow * (self.plain + self.per_token * (width - 1))

    def probe(self, controller: Controller) -> None:
        for width in (1, 2, 4, 8, 16):
            controller.probed(width, self.verify(width))

    def serve(self, controller: Controller, rounds: int, row: Live) -> None:
        for _ in range(rounds):
            self.round(controller, row)

    def round(self, controller: Controller, row: Live) -> int:
        """How many tokens were drafted in it."""
        choice = controller.plan([row])[0]
        confidence: list[float] = []
        stands: list[bool] = []
        while choice.draft is not None and len(confidence) < choice.gamma:
            chance = self.random.choice(self.chances)
            stands.append(self.random.random() < chance)
            confidence.append(chance if self.honest else self.random.random())
            if len(confidence) < choice.gamma and not controller.go_on(choice.draft, [row], [confidence]):
                break
        kept = stands.index(False) if False in stands else len(stands)
        width = len(confidence) + 1
        columns = row.behind.get("draft", 0) if choice.draft else 0
        reading, steps = self.slow * self.read * columns, self.slow * self.step * len(confidence)
        seconds = self.verify(width) + reading + steps + self.slow * self.overhead
        self.clock += seconds
        self.tokens += kept + 1
        self.drafted_rounds += bool(confidence)
        row.behind["draft"] = 0 if choice.draft else row.behind.get("draft", 0) + kept + 1
        row.tokens += [5] * (kept + 1)
        judged = min(kept + 1, len(stands))
        name = choice.draft or ""
        seen = [Drafted(row, name, confidence[:judged], stands[:judged], self.version)] if name else []
        drafting, step = ({name: reading + steps}, {name: self.slow * self.step}) if name else ({}, {})
        read = {name: (columns, reading)} if columns else {}
        controller.record(Round(1, width, kept + 1, seconds, self.verify(width), drafting, step, seen, read))
        return len(confidence)

    @property
    def speed(self) -> float:
        return self.tokens / self.clock

    @property
    def plain_speed(self) -> float:
        return 1 / (self.plain + self.overhead)


def best_fixed(world: dict[str, object], rounds: int = 3000) -> float:
    speeds: list[float] = []
    for gamma in range(13):
        one = World(**world)  # type: ignore[arg-type]
        one.serve(Fixed("draft", gamma), rounds, live())
        speeds.append(one.speed)
    return max(speeds)


@pytest.mark.parametrize(
    "world",
    [
        {"chances": (0.98, 0.98, 0.98, 0.5)},
        {"chances": (0.9,), "step": 0.02},
        {"chances": (0.95, 0.3), "per_token": 0.001},
        {"chances": (0.8, 0.6), "honest": False},
        {"chances": (0.99,), "step": 0.002},
    ],
)
def test_it_is_as_fast_as_the_best_fixed_choice(world: dict[str, object]):
    adaptive = World(**world)  # type: ignore[arg-type]
    adaptive.serve(probed(Adaptive("draft"), adaptive.per_token), 3000, live())
    assert adaptive.speed > 0.96 * best_fixed(world)


def test_confidence_that_says_something_is_used():
    world: dict[str, object] = {"chances": (0.99, 0.99, 0.99, 0.99, 0.2), "step": 0.02}
    adaptive = World(**world)  # type: ignore[arg-type]
    adaptive.serve(probed(Adaptive("draft"), adaptive.per_token), 3000, live())
    assert adaptive.speed > 1.04 * best_fixed(world)


@pytest.mark.parametrize("read", [0.0, 0.0017, 0.01])
@pytest.mark.parametrize("chance", [0.0, 0.05, 0.15])
def test_hopeless_traffic_costs_less_than_three_percent(chance: float, read: float):
    """In one long text, and in many short ones with long prompts."""
    one, many = World((chance,), step=0.03, read=read), World((chance,), step=0.03, read=read)
    one.serve(probed(Adaptive("draft")), 4000, live())
    controller = probed(Adaptive("draft"))
    for index in range(100):
        many.serve(controller, 40, live(str(index), prompt=300, most=40))
    assert one.speed > 0.97 * one.plain_speed and many.speed > 0.97 * many.plain_speed


@pytest.mark.parametrize("read", [0.0, 0.0017])
def test_traffic_that_becomes_good_again_is_noticed(read: float):
    world = World((0.02,), step=0.03, read=read)
    controller, row = probed(Adaptive("draft")), live()
    world.serve(controller, 400, row)
    assert world.drafted_rounds < 60
    world.chances, world.drafted_rounds = (0.95,), 0
    world.serve(controller, 600, row)
    assert world.drafted_rounds > 300


def test_the_first_plan_of_an_unknown_draft_is_to_try_it():
    choice = Adaptive("draft").plan([live()])[0]
    assert choice.draft == "draft" and choice.gamma > 1


def test_routes_choose_the_draft_and_none_is_no_draft():
    controller = Adaptive(None)
    rows = [live("a", "one"), live("b"), live("c", "two")]
    assert [choice.draft for choice in controller.plan(rows)] == ["one", None, "two"]
    assert [choice.draft for choice in Fixed("other", 2).plan(rows)] == ["one", "other", "two"]


def serve_rows(
    controller: Controller,
    chances: dict[Live, float],
    rounds: int,
    step: float = 0.012,
    per_token: float = 0.003,
    read: float = 0.0,
) -> tuple[float, list[list[str | None]]]:
    """(tokens a second, each round's drafts by row) of rows whose drafted tokens stand with these chances."""
    draw, rows, planned = random.Random(1), list(chances), list[list[str | None]]()
    clock = tokens = 0.0
    for _ in range(rounds):
        choices = controller.plan(rows)
        planned.append([choice.draft for choice in choices])
        blocks: list[list[float]] = [[] for _ in rows]
        drafting: dict[str, float] = {}
        for name in {choice.draft for choice in choices if choice.draft is not None}:
            places = [place for place, choice in enumerate(choices) if choice.draft == name]
            while True:
                for place in places:
                    blocks[place].append(0.9)
                drafting[name] = drafting.get(name, 0.0) + step
                confidence = [blocks[place] for place in places]
                if len(confidence[0]) == choices[places[0]].gamma:
                    break
                if not controller.go_on(name, [rows[place] for place in places], confidence):
                    break
        seen: list[Drafted] = []
        columns: dict[str, int] = {}
        for row, choice, block in zip(rows, choices, blocks, strict=True):
            stands = [draw.random() < chances[row] for _ in block]
            kept = stands.index(False) if False in stands else len(stands)
            tokens += kept + 1
            name = row.request.route or "draft"
            if choice.draft is not None:
                judged = min(kept + 1, len(block))
                seen.append(Drafted(row, choice.draft, block[:judged], stands[:judged]))
                columns[name] = columns.get(name, 0) + row.behind[name]
            row.behind[name] = 0 if choice.draft else row.behind[name] + kept + 1
        reading = {name: (count, read * count) for name, count in columns.items() if count}
        steps = dict.fromkeys(drafting, step)
        for name, (_, seconds) in reading.items():
            drafting[name] += seconds
        width = max(map(len, blocks)) + 1
        verify = 0.12 + per_token * (len(rows) * width - 1)
        seconds = verify + sum(drafting.values())
        emitted = len(rows) + sum(sum(drafted.kept) for drafted in seen)
        clock += seconds
        controller.record(Round(len(rows), width, emitted, seconds, verify, drafting, steps, seen, reading))
    return tokens / clock, planned


def probed(controller: Adaptive, per_token: float = 0.003) -> Adaptive:
    for width in (1, 2, 4, 8, 16, 64):
        controller.probed(width, 0.12 + per_token * (width - 1))
    return controller


def test_a_hopeless_route_beside_a_good_one_is_tried_now_and_then():
    """It costs the other as little as plain decoding would lose."""
    good = live("a", "good")
    speed, planned = serve_rows(probed(Adaptive(None)), {good: 0.95, live("b", "bad"): 0.0}, 1000, step=0.03)
    assert sum(names[0] == "good" for names in planned) > 950
    assert 10 < sum(names[1] == "bad" for names in planned) < 250
    without, _ = serve_rows(probed(Adaptive(None)), {good: 0.95, live("b"): 0.0}, 1000, step=0.03)
    assert speed > 0.97 * without


def test_what_many_rows_reached_is_not_asked_of_one():
    """Sixteen rows without a draft give many tokens a second; one alone with a good draft gives fewer, and drafts."""
    controller = probed(Adaptive("draft"))
    serve_rows(controller, {live(str(index)): 0.2 for index in range(16)}, 200)
    controller.records.clear()
    alone = {live("alone"): 0.9}
    speed, _ = serve_rows(controller, alone, 40)
    fresh, _ = serve_rows(probed(Adaptive("draft")), alone, 40)
    assert speed > 0.9 * fresh > 2 / 0.13


def test_a_token_is_priced_for_all_rows_of_the_pass():
    """One of sixteen rows has a draft: its tokens widen the pass for all, and so do not pay; alone they do."""
    rows = {live(str(index), "draft" if index == 0 else None): 0.9 for index in range(16)}
    _, planned = serve_rows(probed(Adaptive(None)), rows, 200, step=0.001)
    assert sum(names[0] == "draft" for names in planned) < 20
    _, planned = serve_rows(probed(Adaptive(None)), dict([next(iter(rows.items()))]), 200, step=0.001)
    assert sum(names[0] == "draft" for names in planned) > 180


def test_it_learns_at_which_place_of_a_block_tokens_fall():
    """The first two stand, later ones never, whatever the draft says of them."""
    controller, row = probed(Adaptive("draft")), live()
    for _ in range(300):
        kept, confidence = 0, [0.9]
        assert controller.plan([row])[0].draft == "draft"
        while len(confidence) < 12 and controller.go_on("draft", [row], [confidence]):
            confidence.append(0.9)
        kept = min(2, len(confidence))
        stands = [place < 2 for place in range(min(kept + 1, len(confidence)))]
        seconds = 0.12 + 0.003 * len(confidence)
        seen = [Drafted(row, "draft", confidence[: len(stands)], stands)]
        drafting = 0.02 * len(confidence)
        controller.record(
            Round(
                1,
                len(confidence) + 1,
                kept + 1,
                seconds + drafting,
                seconds,
                {"draft": drafting},
                {"draft": 0.02},
                seen,
            )
        )
    assert len(confidence) == 2
    record = controller.records["draft"]
    chances = [controller._share(row, record) * record.at(place) for place in range(3)]
    assert chances[0] == chances[1] > 2 * chances[2]


def test_a_place_where_tokens_fall_is_not_drafted_for():
    """The first two are sure and stand, the third never does."""
    controller, row = probed(Adaptive("draft")), live()
    for _ in range(300):
        seen = [Drafted(row, "draft", [0.97, 0.97, 0.5], [True, True, False])]
        controller.plan([row])
        controller.record(Round(1, 4, 3, 0.165, 0.129, {"draft": 0.036}, {"draft": 0.012}, seen))
    assert controller.go_on("draft", [row], [[0.97]])
    assert not controller.go_on("draft", [row], [[0.97, 0.97]])


@pytest.mark.parametrize("route", [None, "other"])
def test_a_long_match_is_taken_from_the_ngrams(route: str | None):
    ngram = NgramDraft(size=3)
    controller = Adaptive("draft", ngram=("ngram", ngram))
    for width in (1, 2, 4, 8, 16):
        controller.probed(width, 0.1 + 0.02 * width)
    row = live(route=route)
    row.tokens = [*range(3, 20), *range(3, 12)]
    ngram.open(row)
    assert controller.plan([row])[0].draft == "ngram"
    # Matches that never stand are left alone after a while.
    for _ in range(60):
        controller.record(Round(1, 4, 1, 0.18, 0.18, {}, {}, [Drafted(row, "ngram", [9 / 11], [False])]))
    assert controller.plan([row])[0].draft == (route or "draft")
