"""What is taken back when live acceptance falls, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from online_helpers import VOCABULARY, with_versions

from limbeck.decoding import Sampling
from limbeck.decoding.requests import Observed, Request
from limbeck.errors import CheckpointError
from limbeck.online import Learning
from limbeck.online.gate import Verdict
from limbeck.online.updater import Result


def _served(learning: Learning, alpha: float, count: int, start: int = 0, mixed: bool = False) -> None:
    """Requests of which each has its first drafted tokens accepted so; by another draft, and further on in a block, it
    is otherwise, which does not count. `mixed`: the version before drafted too."""
    for place in range(start, start + count):
        request = Request(f"{alpha}-{place}", (1,), Sampling(4))
        raw = alpha + 0.001 * (place % 7)
        for version, own, value in (*([(0, True, raw)] if mixed else []), *[(1, False, 1 - raw), (1, True, raw)] * 10):
            many: Any = ((2,) * 3, 3, (0.0,) * 3, (value, 1 - value, 1 - value))  # drafted, accepted, alpha, alpha_raw
            shown = Observed(request, [1] * 21, 1, torch.zeros(3, VOCABULARY), *many, version=version)
            learning.observe(shown, own=own)
        learning.close(request)


@pytest.mark.parametrize(("kind", "back"), [("better", True), ("undecided", False), ("worse", False)])
def test_a_fall_of_live_acceptance_rolls_back_unless_the_traffic_changed(tmp_path: Path, kind: Any, back: bool) -> None:
    learning, fake = with_versions(tmp_path, [Result(Verdict(kind, 0.05, 1.0, 9))])
    learning.serving, learning.backoff = 1, 8
    learning.buffer.traces.clear()
    learning.buffer.held["gate"].clear()
    _served(learning, 0.6, 64)
    learning.watch.swapped()
    learning._swapped_at = learning.buffer.count
    _served(learning, 0.2, 40, mixed=True)  # what was begun by another version is not watched
    _served(learning, 0.6, 40)
    assert not learning._doubt
    before = learning.buffer.count
    _served(learning, 0.2, 20)
    assert learning._doubt and learning._judgeable()
    learning._swapped_at = learning.buffer.count - learning.gate.least + 1
    assert not learning._judgeable()  # too few requests since the swap to say why
    learning._swapped_at = before
    learning._look_back()
    assert {trace.number > before for trace in fake.jobs[0].lot.gate} == {True} and not fake.jobs[0].lot.train
    assert fake.jobs[0].other == 0 and learning.tally.rollbacks == int(back)
    assert learning.serving == (0 if back else 1) and learning.backoff == (8 if back else 1)
    assert learning.versions.numbers() == ([0] if back else [0, 1])


def test_what_was_said_of_one_version_is_not_done_to_the_next(tmp_path: Path) -> None:
    """A swap comes between an alarm, or the wish to go back, and the look back."""
    for asked in (True, False):
        better = Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5)
        learning, fake = with_versions(tmp_path / str(asked), [better])
        if asked:
            learning.ask_roll_back()
        else:
            learning._doubt = True
        learning._update()
        assert learning.serving == 1
        learning._look_back()
        assert learning.serving == 1 and learning.versions.numbers() == [0, 1] and len(fake.jobs) == 1


def test_a_swap_ends_a_doubt_and_a_pause_holds_again(tmp_path: Path) -> None:
    learning, fake = with_versions(tmp_path, [Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5)])
    learning._doubt = True
    learning.pause()
    assert not fake.held
    learning._update()
    assert fake.held


def test_a_pause_keeps_no_fallen_version_in_service(tmp_path: Path) -> None:
    """Neither while the two are compared, nor by an update that stands still before."""
    learning, fake = with_versions(tmp_path, [Result(Verdict("better", 0.2, 50.0, 9))])
    learning.serving = 1
    learning.pause()
    assert fake.held
    seen: list[bool] = []
    answer = fake.run
    fake.run = lambda job: (learning.pause(), seen.append(fake.held), answer(job))[2]  # pressed again meanwhile
    _served(learning, 0.6, 64)
    _served(learning, 0.2, 30)
    assert learning._doubt and not fake.held
    learning._look_back()
    assert seen == [False] and learning.serving == 0 and fake.held


def test_without_a_comparison_it_rolls_back_and_says_so(tmp_path: Path) -> None:
    for answer in (CheckpointError("not whole"), Result(Verdict("undecided", 0.0, 1.0, 0), error="not whole")):
        learning, _ = with_versions(tmp_path / type(answer).__name__, [answer])
        learning.serving, learning._doubt = 1, True
        learning._look_back()
        assert learning.serving == 0 and learning.tally.rollbacks == 1
        assert (learning.tally.failures, learning.tally.last_error) == (1, "CheckpointError: not whole")
