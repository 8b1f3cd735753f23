"""Merge methods side by side, and the paths of the flow, on the same fine-tuned models."""

from lightning_odem.comparison.engine import run_comparison
from lightning_odem.comparison.figures import save
from lightning_odem.comparison.path import check_points
from lightning_odem.comparison.plan import StreamPlan, plan_streams
from lightning_odem.comparison.results import CellResult, Comparison
from lightning_odem.comparison.schedule import (
    OperatingPoint,
    ScheduleStudy,
    run_schedule,
)
from lightning_odem.comparison.schedule_report import render_schedule, save_schedule
from lightning_odem.comparison.tables import markdown_comparison, render_comparison, render_sizes
from lightning_odem.comparison.trajectory import PairPath, check_pairs, run_trajectory
from lightning_odem.comparison.trajectory_report import render_trajectory, save_trajectory
from lightning_odem.comparison.workbench import Workbench

__all__ = [
    "CellResult",
    "Comparison",
    "OperatingPoint",
    "PairPath",
    "ScheduleStudy",
    "StreamPlan",
    "Workbench",
    "check_pairs",
    "check_points",
    "markdown_comparison",
    "plan_streams",
    "render_comparison",
    "render_schedule",
    "render_sizes",
    "render_trajectory",
    "run_comparison",
    "run_schedule",
    "run_trajectory",
    "save",
    "save_schedule",
    "save_trajectory",
]
