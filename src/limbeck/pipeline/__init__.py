"""The whole way: distill() one recipe, compare() several methods."""

from limbeck.pipeline.comparing import compare
from limbeck.pipeline.distilling import Run, distill
from limbeck.pipeline.evaluating import evaluate_folder
from limbeck.pipeline.limit import Limit

__all__ = ["Limit", "Run", "compare", "distill", "evaluate_folder"]
