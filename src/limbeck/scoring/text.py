"""Likeness of a completion to a reference text, as a fraction."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
# Punctuation but the point and the minus that begin digits: 3.5 is not 35, and -5 is not 5.
PUNCTUATION = re.compile(r"(?![.\-−][0-9])[^\w\s]")


@cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def rouge_l(completion: str, reference: str) -> float:
    """ROUGE-L F1 with the Porter stemmer (Lin, 2004; the package rouge-score): longest common subsequence of words."""
    return _rouge("rougeL").score(reference, completion)["rougeL"].fmeasure


def rouge_2(completion: str, reference: str) -> float:
    """ROUGE-2 F1 with the Porter stemmer (Lin, 2004; the package rouge-score): overlap of word pairs."""
    return _rouge("rouge2").score(reference, completion)["rouge2"].fmeasure


def bleu(completion: str, reference: str) -> float:
    """Sentence BLEU, 0 to 1 (sacreBLEU: 13a, exponential smoothing, effective order). Its mean is not corpus BLEU."""
    from sacrebleu import sentence_bleu

    return sentence_bleu(completion, [reference]).score / 100


def _normalised(text: str) -> str:
    words = ARTICLES.sub(" ", PUNCTUATION.sub("", text.casefold())).split()
    # A text of punctuation or articles alone keeps them: "+" is not "-".
    return " ".join(words or text.casefold().split())


def exact_match(completion: str, reference: str) -> float:
    """1 where the texts agree but for case, articles, white space and punctuation (as in SQuAD, but signs and decimal
    points of numbers count), else 0."""
    return float(_normalised(completion) == _normalised(reference))


def length(completion: str, reference: str) -> float:
    """Characters of the completion; the reference plays no part."""
    return float(len(completion))
