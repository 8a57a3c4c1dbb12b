"""Records in, one self-contained HTML page, its SVGs and terminal tables out. Never torch."""

from __future__ import annotations

from keepshot.report.figures import tasks_chart, training_chart, trajectory_chart
from keepshot.report.finding import headline
from keepshot.report.page import compare, write_report

__all__ = [
    "compare",
    "headline",
    "tasks_chart",
    "training_chart",
    "trajectory_chart",
    "write_report",
]
