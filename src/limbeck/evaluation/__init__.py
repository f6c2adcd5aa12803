"""Deterministic evaluation: scores with paired intervals, distance to held-out text and teacher, speed."""

from limbeck.evaluation.evaluate import Scores, completion_text, evaluate, references_of
from limbeck.evaluation.held_out import held_out
from limbeck.evaluation.speed import speed
from limbeck.evaluation.statistics import Difference, Interval, mean_interval, paired_difference

__all__ = [
    "Difference",
    "Interval",
    "Scores",
    "completion_text",
    "evaluate",
    "held_out",
    "mean_interval",
    "paired_difference",
    "references_of",
    "speed",
]
