"""(completion, reference) -> number: metrics and rewards, in one dict."""

from limbeck.scoring.answers import final_number
from limbeck.scoring.references import references_in
from limbeck.scoring.registry import CORPUS_SCORES, SCORES, lower_is_better, score
from limbeck.scoring.rewards import (
    RIGHT_OR_WRONG,
    TRAINING_REWARD,
    Reward,
    build_reward,
    check_reward,
    needs_reference,
    reward_name,
)
from limbeck.scoring.text import distinct_4, normalised
from limbeck.scoring.verifiers import given_answer

__all__ = [
    "CORPUS_SCORES",
    "RIGHT_OR_WRONG",
    "SCORES",
    "TRAINING_REWARD",
    "Reward",
    "build_reward",
    "check_reward",
    "distinct_4",
    "final_number",
    "given_answer",
    "lower_is_better",
    "needs_reference",
    "normalised",
    "references_in",
    "reward_name",
    "score",
]
