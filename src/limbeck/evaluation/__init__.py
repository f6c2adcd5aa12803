"""Deterministic evaluation: scores with paired intervals, distance to held-out text and teacher, exposure bias,
calibration, speed."""

from limbeck.evaluation.at_k import FINAL_ANSWERS, final_answer, majority_at_k, pass_at_k
from limbeck.evaluation.calibration import label_calibration, labelled, token_calibration
from limbeck.evaluation.evaluate import Metrics, Scores, Write, build_metrics, evaluate
from limbeck.evaluation.exposure import EX_ACC_ERR, exposure
from limbeck.evaluation.held_out import HELD_OUT, held_out, held_out_intervals, held_out_together
from limbeck.evaluation.speed import speed
from limbeck.evaluation.statistics import mean_interval, paired_difference

__all__ = [
    "EX_ACC_ERR",
    "FINAL_ANSWERS",
    "HELD_OUT",
    "Metrics",
    "Scores",
    "Write",
    "build_metrics",
    "evaluate",
    "exposure",
    "final_answer",
    "held_out",
    "held_out_intervals",
    "held_out_together",
    "label_calibration",
    "labelled",
    "majority_at_k",
    "mean_interval",
    "paired_difference",
    "pass_at_k",
    "speed",
    "token_calibration",
]
