"""The report of one run, of several side by side, or of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

from limbeck.report.environment import cpu_name, environment
from limbeck.report.figures import exposure_figure, reliability_figure, sweep_figure
from limbeck.report.page import write_report

__all__ = ["cpu_name", "environment", "exposure_figure", "reliability_figure", "sweep_figure", "write_report"]
