"""The one trainer, and how a recipe becomes its parts."""

from limbeck.training.build import Parts, build
from limbeck.training.callbacks import Budget
from limbeck.training.run import train
from limbeck.training.trainer import Trainer

__all__ = ["Budget", "Parts", "Trainer", "build", "train"]
