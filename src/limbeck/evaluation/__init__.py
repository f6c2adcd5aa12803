"""Deterministic evaluation: scores with paired intervals, distance to held-out text and teacher, exposure bias,
calibration, speed."""

from limbeck.evaluation.at_k import final_answer, majority_at_k, pass_at_k
from limbeck.evaluation.calibration import Calibration, calibration, label_calibration, token_calibration
from limbeck.evaluation.evaluate import Scores, evaluate, references_of
from limbeck.evaluation.exposure import Exposure, exposure
from limbeck.evaluation.held_out import held_out
from limbeck.evaluation.speed import speed
from limbeck.evaluation.statistics import Difference, Interval, mean_interval, paired_difference

__all__ = [
    "Calibration",
    "Difference",
    "Exposure",
    "Interval",
    "Scores",
    "calibration",
    "evaluate",
    "exposure",
    "final_answer",
    "held_out",
    "label_calibration",
    "majority_at_k",
    "mean_interval",
    "paired_difference",
    "pass_at_k",
    "references_of",
    "speed",
    "token_calibration",
]
