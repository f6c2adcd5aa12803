"""Numbers as a person reads them: rounded, with their unit. A number that is missing or not finite is a dash."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

DASH = "–"
MINUS = "\u2212"
NAMES = {
    "forward_kl": "Forward KL",
    "reverse_kl": "Reverse KL",
    "loss": "Loss",
    "eval_loss": "Loss",
    "student_entropy": "Student entropy",
    "agreement": "Teacher–student agreement",
    "completion_tokens": "Completion length",
    "length_limit_share": "Share at the length limit",
    "padding_share": "Padding",
    "student_share": "Share written by the student",
    "rollout_kl": "KL(writer || student)",
    "tokens_per_s": "Tokens a second",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "rouge_l": "ROUGE-L",
    "rouge_2": "ROUGE-2",
    "bleu": "BLEU",
    "training_reward": "Reward while training",
    "ex_acc_err": "Excess accumulated error, %",
}


def finite(value: object) -> float | None:
    """The value as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def name(key: str) -> str:
    """A metric's key as words."""
    bare = key.removeprefix("eval_")
    if bare.endswith("_greedy"):
        return f"{name(bare.removesuffix('_greedy'))}, greedy"
    return NAMES.get(key) or NAMES.get(bare) or bare.replace("_", " ").capitalize()


def decimals(half_widths: Iterable[float]) -> int:
    """How many decimals the numbers of one column deserve: the interval's half-width shows, to about half a unit."""
    known = [width for width in half_widths if width > 0]
    if not known:
        return 3
    return min(4, max(2, math.ceil(-math.log10(statistics.median(known) / 2))))


def fixed(value: float | None, places: int, *, sign: bool = False) -> str:
    """`places` decimals, with a real minus sign (and a plus where `sign`)."""
    if value is None:
        return DASH
    text = f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent between .0001 and a million; thousands are set apart."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if not -4 <= power < 6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    return f"{value:,.{max(0, digits - 1 - power)}f}".replace(",", "\u202f").replace("-", MINUS)


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{significant(value * 1000)} ms" if abs(value) < 1 else f"{significant(value)} s"


def size(value: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{significant(value)} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def count(value: float | None) -> str:
    """A count in thousands (k), millions (M) or billions (B)."""
    if value is None:
        return DASH
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{value:.0f}"


def ratio(value: float | None, base: float | None) -> str | None:
    """How many times the base, or None where one is missing or zero."""
    if value is None or not base:
        return None
    return f"{significant(value / base, 2)}×"
