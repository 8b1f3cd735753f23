"""Figures of the final accuracy: over the tasks, the calibration samples and the gradients."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from lightning_odem.report.drawing import new_figure, open_frame, shown
from lightning_odem.studies.figure_selection import (
    REFERENCE_STYLES,
    acc_label,
    acc_scale,
    cells_of_largest_size,
    fully_evaluated,
    method_styles,
    references,
)
from lightning_odem.studies.results import CellResult, Comparison, mean_and_std, one_per_stream


def accuracy_over_tasks(
    comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform"
) -> Figure:
    """Draw ACC (eq. 2) against the number of tasks merged, in percent.

    Lines are means over the streams, and bands are one sample standard deviation. Steps are ACC of the base model, the
    fine-tuned models and, if there was any, joint training on the same tasks. Methods that were not evaluated after
    every merge are left out. If there are several calibration sizes, the largest is shown.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.
        weighting: Weighting of the cells to show.

    Raises:
        ValueError: If a method or the weighting does not occur, or no method was evaluated after every merge.
    """
    cells = cells_of_largest_size(comparison, weighting)
    figure = new_figure(7.6, 4.4)
    axes = figure.subplots()
    evaluated, scale = fully_evaluated(cells), acc_scale(comparison)
    for method, style in method_styles(comparison, methods).items():
        if method not in evaluated:
            continue
        accs = [[scale * cell.report.acc(k) for cell in evaluated[method]] for k in range(len(cells[0].report.tasks))]
        mean, std = np.array([mean_and_std(values) for values in accs]).T
        tasks = np.arange(1, len(mean) + 1)
        axes.plot(tasks, mean, lw=1.6, ms=5, label=shown(method), **style)
        axes.fill_between(tasks, mean - std, mean + std, color=style["color"], alpha=0.12, lw=0)
    if not axes.lines:
        raise ValueError("No method was evaluated after every merge; nothing to plot.")
    for name, style in REFERENCE_STYLES.items():
        rows = [(cell.report, references(comparison, cell).get(name)) for cell in one_per_stream(cells)]
        count = len(cells[0].report.tasks)
        accs = [[scale * r.weighted_accuracy(row[: k + 1]) for r, row in rows if row] for k in range(count)]
        if all(accs):
            means = [mean_and_std(values)[0] for values in accs]
            axes.stairs(means, np.arange(count + 1) + 0.5, baseline=None, label=name, **style)
    axes.set_xlabel("number of tasks merged")
    axes.set_ylabel(acc_label(comparison, weighting))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def sizes(comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform") -> Figure:
    """Draw ACC of the final merged models against the number of calibration samples.

    Points are means over the streams with one sample standard deviation. Methods are drawn slightly beside each other,
    so that their error bars can be told apart.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.
        weighting: Weighting of the cells to show.

    Raises:
        ValueError: If a method or the weighting does not occur.
    """
    cells_of_largest_size(comparison, weighting)
    styles, scale = method_styles(comparison, methods), acc_scale(comparison)
    figure = new_figure(7.6, 4.4)
    axes = figure.subplots()
    for index, (method, style) in enumerate(styles.items()):
        cells = comparison.select(method=method, weighting=weighting)
        found = sorted({cell.calibration_size for cell in cells})
        spread = [
            mean_and_std([scale * cell.report.acc() for cell in cells if cell.calibration_size == size])
            for size in found
        ]
        if found:
            mean, std = np.array(spread).T
            beside = 1.025 ** (index - (len(styles) - 1) / 2)
            x = beside * np.array(found)
            axes.errorbar(x, mean, std, lw=1.4, ms=5, elinewidth=1, capsize=2, label=shown(method), **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(comparison.calibration_sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("calibration samples")
    axes.set_ylabel(acc_label(comparison, weighting))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def cost(comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform") -> Figure:
    """Draw ACC of the final merged models against the gradients of single samples per merge.

    Each calibration size is a point: the mean over the streams with one sample standard deviation. Methods that take no
    gradient are horizontal lines.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.
        weighting: Weighting of the cells to show.

    Raises:
        ValueError: If a method or the weighting does not occur, or no method took a gradient.
    """
    cells_of_largest_size(comparison, weighting)
    scale = acc_scale(comparison)
    figure = new_figure(7.6, 4.4)
    axes = figure.subplots()
    for method, style in method_styles(comparison, methods).items():
        groups: dict[int, list[CellResult]] = {}
        for cell in comparison.select(method=method, weighting=weighting):
            groups.setdefault(cell.calibration_size, []).append(cell)
        if not groups:
            continue
        spent = {size: [cell.per_merge()["sample_gradients"] for cell in group] for size, group in groups.items()}
        x = np.array([np.mean(spent[size]) for size in sorted(groups)])
        spread = [mean_and_std([scale * cell.report.acc() for cell in groups[size]]) for size in sorted(groups)]
        mean, std = np.array(spread).T
        if x.max() > 0:
            axes.errorbar(x, mean, std, lw=1.4, ms=5, elinewidth=1, capsize=2, label=shown(method), **style)
        else:
            axes.axhline(mean[-1], color=style["color"], lw=1.4, ls="--", label=shown(method))
    if not axes.containers:
        raise ValueError("No method took a gradient; nothing to plot.")
    axes.set_xscale("log")
    axes.set_xlabel("gradients of single samples per merge")
    axes.set_ylabel(acc_label(comparison, weighting))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
