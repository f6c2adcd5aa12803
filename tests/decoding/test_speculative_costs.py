"""What the controller knows of costs stays true: they are counted whole, and forgotten when they are old."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from speculative_helpers import DRAFTS, requests_of, serve, target
from test_speculative_controller import World, live, probed, serve_rows

from limbeck.decoding import Adaptive, Engine, Fixed, NgramDraft, Sampling, layers_draft
from limbeck.decoding.clock import now
from limbeck.decoding.controller import Drafted, Round
from limbeck.decoding.costs import Average, Curve, DraftRecord, VerifyCost
from limbeck.decoding.live import Live

# -- readings ----------------------------------------------------------------------------------------------------------


def test_costs_between_known_sizes_are_on_a_line():
    cost = Curve()
    assert cost(3) == 0
    cost.probe(2, 0.1)
    assert cost(1) == cost(9) == 0.1
    cost.probe(10, 0.5)
    assert cost(6) == pytest.approx(0.3) and cost(12) == pytest.approx(0.6) and cost(1) == 0.1
    for _ in range(200):
        cost.add(10, 0.9)
    assert cost(10) == pytest.approx(0.9, abs=0.02)  # the probe counts less and less


def test_what_was_measured_once_is_not_true_for_ever():
    """A size that looked dear is not avoided for good: its neighbours would be, too, and it would never come again."""
    cost = Curve()
    cost.probe(1, 0.10)
    cost.probe(16, 0.16)
    for _ in range(20):
        cost.add(9, 0.4)
        cost.tick()
    assert cost(9) > 0.25 and cost(5) > 0.18
    for _ in range(300):
        cost.add(4, 0.112)
        cost.tick()
    assert cost(9) == pytest.approx(0.132, abs=1e-3) and cost(7) == pytest.approx(0.124, abs=1e-3)
    lonely = Curve()
    lonely.add(3, 0.2)
    for _ in range(1000):
        lonely.tick()
    assert lonely(3) == 0.2  # nothing is known beside it


def test_a_slow_machine_is_slow_at_every_size():
    """An update in another process takes a core: sizes that do not come meanwhile are slower too, and no longer are
    when it is over."""
    cost = VerifyCost()
    for size in (1, 2, 4, 8, 16):
        cost.probe(size, 0.1 + 0.004 * size)
    for slow in (1.5, 1.0):
        for _ in range(150):
            cost.add(9, slow * (0.1 + 0.004 * 9))
            cost.tick()
        for size in (1, 8, 12):
            assert cost(size) == pytest.approx(slow * (0.1 + 0.004 * size), rel=0.08)
    cost.add(9, 10.0)  # one pass waited for something
    assert cost(1) < 0.115


def test_old_readings_count_less():
    average = Average(8.0, 10.0)
    average.shrink(0.5)
    assert (average.value, average.count) == (0.8, 5.0)
    average.shrink(0.5, least=4.0)
    assert average.count == 4.0
    average.shrink(0.5, least=4.0)
    assert average.count == 4.0 and average.value == pytest.approx(0.8)


def test_the_clock_waits_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = now(device)
    begin.record()
    for _ in range(20):
        torch.mm(matrix, matrix)
    end.record()
    took = now(device) - start
    assert took > 0.9e-3 * begin.elapsed_time(end)


# -- n-grams -----------------------------------------------------------------------------------------------------------


def repeating(name: str) -> Live:
    row = live(name)
    row.tokens = [*range(3, 20), *range(3, 12)]
    return row


def with_ngrams(rows: Sequence[Live], *, stands: bool = True, draft: str | None = None) -> Adaptive:
    """A controller that has seen matches stand nine times in ten; passes cost what they do for a model of 1.5 B."""
    ngram = NgramDraft(size=3)
    controller = Adaptive(draft, ngram=("ngram", ngram))
    for tokens in (1, 2, 4, 8, 16, 64):
        controller.probed(tokens, 0.115 + 0.0032 * tokens)
    for row in rows:
        ngram.open(row)
    for count in range(200):
        seen = Drafted(rows[0], "ngram", [9 / 11], [stands and count % 10 > 0])
        controller.record(Round(1, 2, 2, 0.12, 0.12, {"ngram": 0.0}, {}, [seen]))
    controller.verify = VerifyCost()
    for tokens in (1, 2, 4, 8, 16, 64):
        controller.probed(tokens, 0.115 + 0.0032 * tokens)
    return controller


def test_a_match_is_priced_for_the_row_that_has_it():
    """One of eight rows has a match. A round of 7 drafted tokens gives 7 + 5.7 tokens in .32 s, 40 tokens/s; a plain
    one 8 in .14 s, 57. Where all have one it gives 8 x 5.7 in the same time."""
    rows = [repeating("match"), *(live(str(index)) for index in range(7))]
    assert all(choice.draft is None for choice in with_ngrams(rows).plan(rows))
    rows = [repeating(str(index)) for index in range(8)]
    assert all(choice.draft == "ngram" and choice.gamma > 2 for choice in with_ngrams(rows).plan(rows))
    rows = [repeating("alone")]
    assert with_ngrams(rows).plan(rows)[0].gamma > 2


def test_matches_that_never_stood_are_tried_again():
    """And when they stand by then, they are what is drafted."""
    row = repeating("a")
    controller = with_ngrams([row], stands=False)
    seen: list[int] = []
    for count in range(600):
        choice = controller.plan([row])[0]
        seen.append(choice.gamma)
        stands = [count >= 300] * choice.gamma
        kept = sum(stands)
        width = 1 + choice.gamma
        seconds = 0.115 + 0.0032 * width
        drafted = [Drafted(row, "ngram", [9 / 11] * max(1, kept), stands[: max(1, kept)])] if choice.gamma else []
        controller.record(Round(1, width, 1 + kept, seconds, seconds, {"ngram": 0.0}, {}, drafted))
    assert 20 < sum(gamma > 0 for gamma in seen[:300]) < 250 and max(seen[:300]) == 1
    assert min(seen[-100:]) > 4


# -- drafts ------------------------------------------------------------------------------------------------------------


def read_at(controller: Adaptive, seconds: float) -> Adaptive:
    """One whose draft is known: it is right nine times in ten, a step takes .02 s, a column it is behind `seconds`."""
    world, row = World((0.9,), step=0.02, read=seconds), live("before", prompt=400)
    world.serve(controller, 100, row)
    return controller


def test_a_draft_that_must_read_too_much_is_not_used():
    """A prompt of 1000 tokens takes it 1.7 s. Eight tokens cost the target 1 s; of 400 it saves 30."""
    for most, drafts in ((8, False), (400, True)):
        row = live("a", prompt=1000, most=most)
        assert (read_at(probed(Adaptive("draft")), 0.0017).plan([row])[0].draft == "draft") == drafts
    row = live("a", prompt=1000, most=8)
    assert read_at(probed(Adaptive("draft")), 0.0).plan([row])[0].draft == "draft"


def test_answers_that_end_early_pay_for_no_long_reading():
    """They may have 400 tokens, and have 8."""
    controller = read_at(probed(Adaptive("draft")), 0.0017)
    controller.record(Round(1, 1, 1, 0.122, 0.12, {}, {}, [], {}, [8] * 50))
    assert controller.plan([live("a", prompt=1000, most=400)])[0].draft is None


def test_a_row_that_must_read_too_much_is_left_out_alone():
    rows = [live("a", prompt=3), live("b", prompt=1000, most=8)]
    choices = read_at(probed(Adaptive("draft")), 0.0017).plan(rows)
    assert [choice.draft for choice in choices] == ["draft", None]


def test_rows_that_are_behind_read_by_turns():
    """Everybody waits while a draft reads: of eight rows of 300 columns one reads in a round."""
    controller = read_at(probed(Adaptive("draft"), per_token=0.0001), 0.0001)
    rows = [live(str(index), prompt=301) for index in range(8)]
    rows.append(live("near"))
    rows[8].behind = {"draft": 3}
    names = [choice.draft for choice in controller.plan(rows)]
    assert names[8] == "draft" and names[:8].count("draft") == 1
    rows[0].behind = {"draft": 20_000}  # reads a piece, if nobody is before it
    assert controller.plan(rows[:1])[0].draft == "draft"


def test_a_step_that_looked_slow_is_measured_again():
    """By the number of rows, one-token blocks included, and not for ever."""
    controller, rows = probed(Adaptive("draft")), [live(str(index)) for index in range(8)]

    def round_of(count: int, step_s: float) -> None:
        seen = [Drafted(row, "draft", [0.9], [True]) for row in rows[:count]]
        controller.plan(rows[:count])
        seconds = controller.verify(2 * count)
        controller.record(
            Round(count, 2, 2 * count, seconds + step_s, seconds, {"draft": step_s}, {"draft": step_s}, seen)
        )

    for _ in range(50):
        round_of(1, 0.01)
        round_of(8, 0.08)
    assert controller._step_s("draft", 1) == pytest.approx(0.01, rel=0.05)
    assert controller._step_s("draft", 8) == pytest.approx(0.08, rel=0.05)
    assert controller._step_s("draft", 4) == pytest.approx(0.04, rel=0.05)
    for _ in range(300):
        round_of(1, 0.01)
    assert controller._step_s("draft", 8) == pytest.approx(0.01, rel=0.05)


def test_a_first_step_that_waits_for_the_disk_is_forgotten_at_once():
    cost = Curve()
    cost.add(1, 0.5)
    cost.add(1, 0.02)
    assert cost(1) == 0.02


@pytest.mark.parametrize("kind", ["layers", "feature"])
def test_the_engine_tells_what_reading_and_steps_take(kind: str):
    """Also of blocks of one token; what a draft is behind counts apart."""
    rounds: list[Round] = []

    class Watching(Fixed):
        def record(self, round_: Round) -> None:
            rounds.append(round_)

    model = target()
    engine = Engine(model, None, {"draft": DRAFTS[kind](model)}, Watching("draft", 1), max_batch=2)
    serve(engine, requests_of([[*range(3, 23)], [5, 6, 7]], Sampling(9, temperature=0)))
    first = rounds[0]
    # The newest token of each row is read by the first step; feature drafts read one column less than there are tokens.
    assert first.read["draft"][0] == (20 - 1) + (3 - 1) if kind == "feature" else 20 + 3
    assert 0 < first.read["draft"][1] < first.draft_seconds["draft"]
    for round_ in rounds:
        if round_.drafted:
            spent = round_.step_seconds["draft"] + round_.read.get("draft", (0, 0.0))[1]
            assert spent == pytest.approx(round_.draft_seconds["draft"], rel=0.1)
    assert not any(round_.read for round_ in rounds[1:])
    assert sorted(sum((list(round_.ended) for round_ in rounds), [])) == [9, 9]


def test_the_engine_tells_whose_weights_have_drafted():
    versions: list[int] = []

    class Watching(Fixed):
        def record(self, round_: Round) -> None:
            versions.extend(drafted.version for drafted in round_.drafted)

    model = target()
    draft = layers_draft(model, [0])
    weights = dict(draft.reader.model.named_parameters())
    engine = Engine(model, None, {"draft": draft}, Watching("draft", 1), max_batch=1)
    requests = requests_of([[5, 6]], Sampling(20, temperature=0))
    serve(engine, requests, after=lambda steps: draft.prepare(weights, 7 * steps)())
    assert len(versions) > 5 and versions == [7 * place for place in range(len(versions))]


def test_new_weights_are_judged_anew():
    """A draft that was useless is swapped: it is used after the first trial that shows it."""
    world, row, controller = World((0.02,), step=0.03), live(), probed(Adaptive("draft"))
    world.serve(controller, 600, row)
    world.chances, world.version, world.drafted_rounds = (0.95,), 1, 0
    while not world.round(controller, row):
        pass
    world.drafted_rounds = 0
    world.serve(controller, 40, row)
    assert world.drafted_rounds == 40
    # The other way round it is left as fast.
    world.chances, world.version, world.drafted_rounds = (0.02,), 2, 0
    world.serve(controller, 60, row)
    assert world.drafted_rounds < 20


def test_a_past_is_soon_outweighed_when_it_no_longer_says_much():
    """By as many tokens as a few trials have: after a swap, and after a long time without the draft."""
    for kind in ("swap", "rest", "neither"):
        record = DraftRecord()
        record.renew(1)
        for _ in range(100):
            record.judged([0.5, 0.5], [False, False])
        assert record.stands.value < 0.03
        if kind == "swap":
            assert record.renew(2) and not record.renew(2)
            assert record.probability(0.5) == pytest.approx(0.55) and record.at(3) == 1.0
        for _ in range(150 if kind == "rest" else 0):
            record.rest()
        record.judged([0.9] * 8, [True] * 8)
        assert (record.stands.value > 0.45) == (kind != "neither")


def test_many_rows_that_are_off_are_tried_one_at_a_time():
    """Sixteen rows of a hopeless draft, each behind by what it has not read: trials cost the others next to nothing."""
    rows = {live(str(index)): 0.0 for index in range(16)}
    speed, planned = serve_rows(probed(Adaptive("draft")), rows, 1500, step=0.03, read=0.0017)
    plain, _ = serve_rows(probed(Adaptive(None)), rows, 1500)
    tried = [sum(name is not None for name in names) for names in planned[100:]]
    assert max(tried) == 1 and sum(tried) > 5
    assert speed > 0.97 * plain


def test_a_short_row_is_tried_before_a_long_one():
    """What a trial costs is above all what must be read for it."""
    controller = probed(Adaptive("draft"))
    World((0.0,), step=0.03, read=0.0017).serve(controller, 600, live())
    rows = [live("long", prompt=1000), live("short", prompt=30), live("longer", prompt=1500)]
    rounds = 0
    while not any(chosen := [choice.draft for choice in controller.plan(rows)]):
        controller.record(Round(3, 1, 3, 0.13, 0.13, {}, {}))
        rounds += 1
    assert chosen == [None, "draft", None] and 0 < rounds < 200
