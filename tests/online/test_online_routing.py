"""Routing and coins."""

from __future__ import annotations

import math

from limbeck.online import Routing
from limbeck.online.coins import coin


def test_a_tag_names_its_draft() -> None:
    routing = Routing(["a", "b"], {"sql": "b"})
    assert [routing.choose(tag) for tag in ("a", "b", "sql")] == ["a", "b", "b"]
    assert routing.choose(None) is None and routing.choose("unknown") == "unknown"  # the engine says no


def test_the_fastest_draft_is_found_for_each_tag_and_found_again() -> None:
    routing = Routing(["a", "b"], learned=True, explore=0.1)
    speeds = {("x", "a"): 10.0, ("x", "b"): 30.0, (None, "a"): 20.0, (None, "b"): 10.0}

    def last(tag: str | None, draft: str) -> float:
        chosen = []
        for _ in range(400):
            name = routing.choose(tag)
            assert name is not None
            routing.record(tag, name, 100, 100 / speeds[tag, name])
            chosen.append(name)
        return chosen[-200:].count(draft) / 200

    assert last("x", "b") > 0.85 and last(None, "a") > 0.85
    speeds["x", "b"] = 5.0  # its traffic has changed
    assert last("x", "a") > 0.85


def test_the_main_draft_is_for_those_that_name_none() -> None:
    routing = Routing(["a", "b"], {"n": "n"}, main="a")
    assert [routing.choose(tag) for tag in (None, "b", "n", "unknown")] == ["a", "b", "n", "unknown"]
    learned = Routing(["a", "b"], {"n": "n"}, main="a", learned=True, explore=0.0)
    learned.record(None, "a", 100, 10.0)
    learned.record(None, "b", 100, 1.0)
    assert [learned.choose(tag) for tag in (None, "a", "n")] == ["b", "a", "n"]


def test_of_the_tags_that_clients_make_up_the_oldest_are_forgotten() -> None:
    routing = Routing(["a", "b"], learned=True, explore=0.0)
    for number in range(5000):
        for draft, seconds in (("a", 3.0), ("b", 1.0)):
            routing.record(f"tag {number}", draft, 10, seconds)
            if number % 900 == 0:  # heard of now and then
                routing.record(None, draft, 10, seconds)
    assert len(routing.speeds) <= 1000 and routing.speeds[None]["b"].tokens > 50
    assert [routing.choose(tag) for tag in (None, "tag 4999", "tag 4500")] == ["b", "b", "b"]
    assert routing.choose("tag 5") == "a"  # new again: nothing is known of either


def test_coins_are_counted_and_uniform() -> None:
    flips = [coin(3, "keep", count) for count in range(4000)]
    assert flips == [coin(3, "keep", count) for count in range(4000)]
    share = sum(flip < 0.05 for flip in flips) / 4000
    assert abs(share - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert coin(3, "role", 1) != coin(3, "keep", 1) != coin(4, "keep", 1)
