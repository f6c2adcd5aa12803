"""Word problems with worked steps, made by a program: the task of `limbeck quickstart`.

A problem is a walk: a start, then two to four additions, subtractions and multiplications told in sentences about
people and things, sometimes with a fact that does not matter. The worked steps vary in wording too (order of the
operands, linking words), so that the text of a data set is one of many good answers. All numbers stay below 100.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TypeVar

from limbeck.errors import DataError

SEED = 2026
LARGEST = 99
SPLITS = ("train", "eval", "test")

NAMES = tuple(
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jane Kai Lena Max Nora Omar Pia Quinn Rosa Sam Tess Uma Vera Will Yara "
    "Zoe Amy Bob Cara Dora Erik Gwen Hugo".split()
)
THINGS = tuple(
    "apples books cards coins cups dolls drums eggs figs hats kites lamps nuts pears pens rings shells stamps bells "
    "boats keys plums stones beads".split()
)
STARTS = (
    "{a} has {n} {o}.",
    "{a} starts with {n} {o}.",
    "{a} has a box of {n} {o}.",
    "{a} and {b} see that {a} owns {n} {o}.",
)
GROUPS = (
    "{a} has {k} bags of {n} {o} each.",
    "{a} fills {k} boxes with {n} {o} each.",
    "{a} gets {n} {o} a day for {k} days.",
)
# The value changes, the person asked about does not.
CHANGES = {
    "+": (
        "{a} buys {n} more.",
        "{a} finds {n} more {o}.",
        "{b} gives {n} {o} to {a}.",
        "{a} gets {n} {o} from {b}.",
        "Then {n} {o} are added.",
    ),
    "-": (
        "{a} loses {n} of them.",
        "{a} gives {n} {o} to {b}.",
        "{a} sells {n}.",
        "{b} takes {n} {o} from {a}.",
        "Then {n} {o} are lost.",
    ),
    "*": ("Then {a} has {k} times as many.", "The number grows {k} times."),
}
# The value and the person asked about change: {b} is the new one.
COMPARISONS = {
    "+": ("{b} has {n} more {o} than {a}.", "{b} has as many as {a} and {n} more."),
    "-": ("{b} has {n} fewer {o} than {a}.", "{b} has as many as {a} but {n} fewer."),
    "*": ("{b} has {k} times as many {o} as {a}.", "For each of them {b} has {k}."),
}
ASIDES = ("{c} has {n} {p}.", "{c} is {n} years old.", "{c} wants to buy {n} {p}.")
QUESTIONS = ("How many {o} does {a} have now?", "How many {o} has {a} in the end?", "What number of {o} does {a} have?")
TOGETHER = ("How many {o} do {a} and {b} have together?", "What is the sum of both?")
LINKS = ("", "", "", " Then", " Next", " So")

T = TypeVar("T")
Calculation = tuple[int, str, int]  # left, operator, right


def _pick(random: Random, items: Sequence[T]) -> T:
    # `random()` alone is the same in every version of Python.
    return items[int(random.random() * len(items))]


def _between(random: Random, low: int, high: int) -> int:
    return low + int(random.random() * (high - low + 1))


def _shuffled(random: Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: random.random())


def _operand(random: Random, operator: str, value: int) -> int | None:
    """A number that keeps the result between 1 and 99, None if there is none."""
    low = 2
    high = {"+": min(40, LARGEST - value), "-": min(40, value - 1), "*": min(5, LARGEST // value)}[operator]
    return _between(random, low, high) if high >= low else None


def _apply(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _worked(random: Random, calculation: Calculation) -> str:
    left, operator, right = calculation
    result = _apply(left, operator, right)
    if operator != "-" and random.random() < 0.25:
        left, right = right, left
    return f"{left} {operator} {right} = {result}."


def _walk(random: Random) -> tuple[list[str], list[Calculation]]:
    """Sentences, the question last, and calculations of one problem."""
    names, things = _shuffled(random, NAMES), _shuffled(random, THINGS)
    a, o = names.pop(), things.pop()
    steps = _between(random, 2, 4)
    calculations: list[Calculation] = []
    if random.random() < 0.3:
        count, value = _between(random, 2, 6), _between(random, 2, 12)
        calculations.append((count, "*", value))
        sentences = [_pick(random, GROUPS).format(a=a, n=value, k=count, o=o)]
        value *= count
    else:
        value = _between(random, 2, 30)
        sentences = [_pick(random, STARTS).format(a=a, b=names[-1], n=value, o=o)]
    together = random.random() < 0.2 and steps - len(calculations) >= 2
    question = ""
    while len(calculations) < steps:
        operator = _pick(random, "++--*")
        operand = _operand(random, operator, value)
        if operand is None:
            continue
        last = together and len(calculations) == steps - 2
        compared = last or random.random() < 0.3
        b = names.pop() if compared else _pick(random, names)
        sentence = _pick(random, (COMPARISONS if compared else CHANGES)[operator])
        sentences.append(sentence.format(a=a, b=b, n=operand, k=operand, o=o))
        before, value = value, _apply(value, operator, operand)
        calculations.append((before, operator, operand))
        if last:
            calculations.append((before, "+", value))
            question = _pick(random, TOGETHER).format(a=a, b=b, o=o)
        a = b if compared else a
    if random.random() < 0.3:
        aside = _pick(random, ASIDES).format(c=names.pop(), n=_between(random, 2, 40), p=things.pop())
        sentences.insert(_between(random, 1, len(sentences)), aside)
    return [*sentences, question or _pick(random, QUESTIONS).format(a=a, o=o)], calculations


def split_of(calculations: Sequence[Calculation]) -> str:
    """Eight tenths are train, one tenth eval, one test; the same chain of calculations never stands in two of them."""
    chain = [(*((a, b) if operator == "-" else sorted((a, b))), operator) for a, operator, b in calculations]
    digest = hashlib.sha256(repr(chain).encode()).digest()
    return ("eval", "test", *["train"] * 8)[int.from_bytes(digest[:8], "big") % 10]


def rows(split: str, count: int) -> list[dict[str, str]]:
    """The first `count` problems of a split: prompt, completion (worked steps that end in the answer), answer.

    The same rows in every process, and the first rows of a longer list. Raises DataError for an unknown split.
    """
    if split not in SPLITS:
        raise DataError(f"expected a split among {', '.join(SPLITS)}, found {split!r}: use one of them")
    found: dict[str, dict[str, str]] = {}
    number = 0
    while len(found) < count:
        random = Random(f"{SEED}:{number}")
        number += 1
        sentences, calculations = _walk(random)
        answer = _apply(*calculations[-1])
        if answer > LARGEST or split_of(calculations) != split:
            continue
        prompt = " ".join(sentences) + "\n"
        worked = _worked(random, calculations[0])
        for calculation in calculations[1:]:
            worked += f"{_pick(random, LINKS)} {_worked(random, calculation)}"
        row = {"prompt": prompt, "completion": f"{worked} Answer: {answer}", "answer": str(answer)}
        found.setdefault(prompt, row)
    return list(found.values())
