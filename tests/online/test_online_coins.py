"""Counted coins: uniform, and the same wherever they are thrown."""

from __future__ import annotations

from scipy.stats import binom, kstest

from limbeck.online.coins import HeldOut, coin


def test_coins_are_uniform_and_differ_by_purpose_and_seed() -> None:
    thrown = [coin(3, "keep", count) for count in range(2000)]
    assert kstest(thrown, "uniform").pvalue > 1e-3
    assert thrown == [coin(3, "keep", count) for count in range(2000)]
    assert thrown[:50] != [coin(4, "keep", count) for count in range(50)]
    assert thrown[:50] != [coin(3, "role", count) for count in range(50)]


def test_more_is_held_out_while_it_is_warm() -> None:
    held = HeldOut(share=0.05, warm_share=0.5, warm_requests=400)
    kept = [held.keeps(0, number) for number in range(1, 2401)]
    warm, later = sum(kept[:400]), sum(kept[400:])
    assert binom.ppf(1e-6, 400, 0.5) <= warm <= binom.isf(1e-6, 400, 0.5)
    assert binom.ppf(1e-6, 2000, 0.05) <= later <= binom.isf(1e-6, 2000, 0.05)
