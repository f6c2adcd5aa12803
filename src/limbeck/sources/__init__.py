"""Who writes the sequences that the student trains on."""

from limbeck.sources.dataset import dataset
from limbeck.sources.mixed import Mixed
from limbeck.sources.student import Student
from limbeck.sources.teacher import Teacher

SOURCES = {"dataset": dataset, "teacher": Teacher, "student": Student, "mixed": Mixed}

__all__ = ["SOURCES", "Mixed", "Student", "Teacher", "dataset"]
