"""(completion, reference) -> number: metrics and rewards, in one dict."""

from limbeck.scoring.answers import final_number
from limbeck.scoring.references import REFERENCE_COLUMNS, references_in
from limbeck.scoring.registry import CORPUS_SCORES, RIGHT_OR_WRONG, SCORES, WITHOUT_REFERENCE, Score, resolve, score
from limbeck.scoring.rewards import Reward, build_reward, check_reward, needs_reference, reward_name
from limbeck.scoring.text import distinct_4, normalised

__all__ = [
    "CORPUS_SCORES",
    "REFERENCE_COLUMNS",
    "RIGHT_OR_WRONG",
    "SCORES",
    "WITHOUT_REFERENCE",
    "Reward",
    "Score",
    "build_reward",
    "check_reward",
    "distinct_4",
    "final_number",
    "needs_reference",
    "normalised",
    "references_in",
    "resolve",
    "reward_name",
    "score",
]
