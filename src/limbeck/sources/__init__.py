"""Who writes the sequences that the student trains on, and what they earn."""

from limbeck.sources.dataset import dataset
from limbeck.sources.mixed import Mixed
from limbeck.sources.rewarded import Rewarded
from limbeck.sources.student import Student
from limbeck.sources.teacher import Teacher
from limbeck.sources.token_mix import TokenMix

SOURCES = {"dataset": dataset, "teacher": Teacher, "student": Student, "mixed": Mixed, "token_mix": TokenMix}

__all__ = ["SOURCES", "Mixed", "Rewarded", "Student", "Teacher", "TokenMix", "dataset"]
