"""The radar figure of a comparison: every task is a spoke."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_odem.metrics import ACCURACY
from lightning_odem.report.drawing import new_figure, shown
from lightning_odem.studies.figure_selection import (
    REFERENCE_STYLES,
    cells_of_largest_size,
    method_styles,
    references,
)
from lightning_odem.studies.results import CellResult, Comparison, one_per_stream


def radar(comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform") -> Figure:
    """Draw the accuracy of the final merged models on each task, in percent (Fig. 2 of the paper).

    Accuracies are means over the streams. Spokes are tasks, in the first stream's order. The outlines of the base
    model, of the fine-tuned models and of joint training, if there was any, are means over the same streams. The radial
    axis does not start at 0. If there are several calibration sizes, the largest is shown.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default. More than about eight are hard to read.
        weighting: Weighting of the cells to show.

    Raises:
        ValueError: If a method or the weighting does not occur.
    """
    cells = cells_of_largest_size(comparison, weighting)
    styles = method_styles(comparison, methods)
    tasks = cells[0].report.tasks
    streams = one_per_stream(cells)
    curves: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    for name, style in REFERENCE_STYLES.items():
        rows = [(cell, references(comparison, cell).get(name)) for cell in streams]
        if known := [(cell, row) for cell, row in rows if row]:
            curves[name] = _task_means(tasks, known), style
    for method, style in styles.items():
        ours = [cell for cell in cells if cell.method == method]
        if ours:
            merged = [(cell, cell.report.accuracy[-1]) for cell in ours]
            curves[method] = (_task_means(tasks, merged), {"lw": 1.4, "ms": 5, **style})

    figure = new_figure(
        5.6 + 0.2 * max(len(shown(task)) for task in tasks) + 0.1 * max(len(shown(label)) for label in curves), 5.8
    )
    axes: Any = figure.subplots(subplot_kw={"projection": "polar"})
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    for label, (values, style) in curves.items():
        axes.plot(np.append(angles, angles[:1]), np.append(values, values[:1]), label=shown(label), **style)
    metric = comparison.metric
    if metric is not None and metric.unit == "%":
        lowest = min((value for values, _ in curves.values() for value in values if math.isfinite(value)), default=0.0)
        center = max(10 * math.floor(lowest / 10 - 0.5), 0)
        axes.set_ylim(center, 100)
        axes.set_yticks([tick for tick in range(0, 100, 20 if center < 60 else 10) if tick > center])
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, list(map(shown, tasks)))
    axes.tick_params(axis="x", pad=1)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        side = math.sin(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axes.set_rlabel_position(180 / len(tasks))
    axes.tick_params(axis="y", labelsize="small", labelcolor="0.35")
    axes.grid(color="0.88")
    axes.spines["polar"].set_color("0.8")
    title = "accuracy of the final model (%, outer circle: 100)"
    if metric is not None and metric != ACCURACY:
        title = f"{metric.label} of the final model"
    axes.set_title(title, fontsize="medium", pad=18)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _task_means(tasks: list[str], scores: list[tuple[CellResult, list[float]]]) -> np.ndarray:
    """Mean score [K] on each task, scaled as drawn, of the models with these scores on the tasks of their cells."""
    rows = []
    for cell, values in scores:
        report = cell.report
        accuracies = dict(zip(report.tasks, values, strict=True))
        rows.append([report.metric_of(task).scale * accuracies[task] for task in tasks])
    return np.mean(rows, axis=0)
