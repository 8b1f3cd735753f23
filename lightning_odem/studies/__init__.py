"""Merge methods side by side, and the paths of the flow, on the same fine-tuned models."""

from lightning_odem.studies.comparison_report import save
from lightning_odem.studies.engine import run_comparison
from lightning_odem.studies.path import check_points
from lightning_odem.studies.plan import StreamPlan, plan_streams
from lightning_odem.studies.results import CellResult, Comparison
from lightning_odem.studies.schedule import (
    OperatingPoint,
    ScheduleStudy,
    run_schedule,
)
from lightning_odem.studies.schedule_report import render_schedule, save_schedule
from lightning_odem.studies.tables import markdown_comparison, render_comparison, render_sizes
from lightning_odem.studies.trajectory import PairPath, check_pairs, run_trajectory
from lightning_odem.studies.trajectory_report import render_trajectory, save_trajectory
from lightning_odem.studies.workbench import Workbench

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
