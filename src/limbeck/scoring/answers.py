"""Is the final answer right?"""

from __future__ import annotations

import re
from decimal import Decimal

MARKER = "####"
# A minus is a sign unless a number, a word or a bracket stands before it: 10-3 holds 10 and 3.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−])?(?:[$€£](?P<sign_after>[-−])?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    """The number after the first `####` (GSM8K's mark; None if that line has no number), else the last number."""
    _, marked, answer = text.partition(MARKER)
    found = list(NUMBER.finditer(answer.strip().partition("\n")[0] if marked else text))
    if not found:
        return None
    number = found[0] if marked else found[-1]
    value = Decimal(number["digits"].replace(",", ""))
    return value.copy_negate() if number["sign"] or number["sign_after"] else value


def numeric_answer(completion: str, reference: str) -> float:
    """1 where the final numbers are equal in value (18 = 18.00), else 0. ValueError: a reference without a number."""
    expected = final_number(reference)
    if expected is None:
        raise ValueError(f"expected a number in the reference, found {reference[-80:]!r}")
    return float(final_number(completion) == expected)
