"""Counted coins: uniform, and the same wherever they are thrown."""

from __future__ import annotations

from scipy.stats import binom, kstest

from limbeck.online.coins import coin, held_out_of


def test_coins_are_uniform_and_differ_by_purpose_and_seed() -> None:
    thrown = [coin(3, "keep", count) for count in range(2000)]
    assert kstest(thrown, "uniform").pvalue > 1e-3
    assert thrown == [coin(3, "keep", count) for count in range(2000)]
    assert thrown[:50] != [coin(4, "keep", count) for count in range(50)]
    assert thrown[:50] != [coin(3, "role", count) for count in range(50)]


def test_more_is_held_out_while_the_gate_holds_too_few_and_a_prompt_stays_on_its_side() -> None:
    prompts = [(place % 7, place) for place in range(2000)]
    for positions, share in (("all", 0.25), ("rejected", 0.05)):
        held = held_out_of(positions)
        for hungry, expected in ((False, share), (True, 0.5)):
            kept = [held.keeps(0, prompt, hungry=hungry) for prompt in prompts]
            assert binom.ppf(1e-6, 2000, expected) <= sum(kept) <= binom.isf(1e-6, 2000, expected)
            assert kept == [held.keeps(0, list(prompt), hungry=hungry) for prompt in prompts]
            assert kept != [held.keeps(1, prompt, hungry=hungry) for prompt in prompts]
