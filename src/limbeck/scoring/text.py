"""Likeness of a completion to a reference text, as a fraction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
# Punctuation but the point and the minus that begin digits: 3.5 is not 35, and -5 is not 5.
PUNCTUATION = re.compile(r"(?![.\-−][0-9])[^\w\s]")
ORDER = 4
"""Words of an n-gram."""


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


def normalised(text: str) -> str:
    """What `exact_match` compares."""
    words = ARTICLES.sub(" ", PUNCTUATION.sub("", text.casefold())).split()
    # A text of punctuation or articles alone keeps them: "+" is not "-".
    return " ".join(words or text.casefold().split())


def exact_match(completion: str, reference: str) -> float:
    """1 where the texts agree but for case, articles, white space and punctuation (as in SQuAD, but signs and decimal
    points of numbers count), else 0."""
    return float(normalised(completion) == normalised(reference))


def length(completion: str, reference: str) -> float:
    """Characters of the completion; the reference plays no part."""
    return float(len(completion))


def repetition(completion: str, reference: str) -> float:
    """The share of the completion's word 4-grams that it has written before, 0 without any (`seq-rep-4` of Welleck et
    al. 2020, arXiv 1908.04319, on words). The reference plays no part."""
    return 1 - distinct_4([completion]) if len(completion.split()) >= ORDER else 0.0


def distinct_4(completions: Sequence[str]) -> float:
    """Distinct word 4-grams by all 4-grams of all completions together (Li et al. 2016, arXiv 1510.03055; Dist-4 of
    MiniLLM, arXiv 2306.08543): 1 where none comes twice, 0 without any. It falls as texts are added: compare equal
    numbers of them."""
    found: Counter[tuple[str, ...]] = Counter()
    for completion in completions:
        words = completion.split()
        found.update(zip(*(words[start:] for start in range(ORDER)), strict=False))
    return len(found) / max(found.total(), 1)
