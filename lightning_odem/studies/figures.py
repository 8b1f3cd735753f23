"""Figures of a comparison, and everything about it as files in a directory."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from lightning_odem.metrics import ACCURACY
from lightning_odem.report.figures import COLORS, MARKERS, new_figure, open_frame
from lightning_odem.studies.results import CellResult, Comparison, mean_and_std, one_per_stream
from lightning_odem.studies.tables import markdown_comparison, render_comparison, render_sizes

# the first six are the report's; the others stay apart from them and from the black and grey of the references
_METHOD_COLORS = (*COLORS, "#882255", "#999933", "#7B4A12", "#332288")
_ACC = {"uniform": "ACC", "dirichlet": r"$\mathrm{ACC}_w$"}
_PATH_LABELS = {
    "gamma": r"damping factor $\gamma$ (1: undamped)",
    "alignment_ratio": r"alignment ratio $\Vert P_g u\Vert / \Vert u\Vert$",
}


def radar(comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform") -> Figure:
    """Accuracy of the final merged models on each task, as a mean over the streams, in percent (Fig. 2 of the paper).

    Spokes are tasks, in the first stream's order; the outlines of the base model and of the fine-tuned models are
    those on the same streams. The radial axis does not start at 0. Of several calibration sizes, the largest is shown.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default; more than about eight are hard to read.
        weighting: Cells of which weighting.

    Raises:
        ValueError: If a method or the weighting does not occur.
    """
    cells = _largest_size(comparison, weighting)
    styles = _styles(comparison, methods)
    tasks = cells[0].report.tasks
    streams = one_per_stream(cells)
    curves: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "pretrained": (_task_means(tasks, streams, "pretrained"), {"color": "0.55", "ls": "--", "lw": 1.8}),
        "fine-tuned": (_task_means(tasks, streams, "fine_tuned"), {"color": "black", "ls": "--", "lw": 1.8}),
    }
    for method, style in styles.items():
        ours = [cell for cell in cells if cell.method == method]
        if ours:
            curves[method] = (_task_means(tasks, ours, "merged"), {"lw": 1.4, "ms": 5, **style})

    figure = new_figure(5.6 + 0.2 * max(map(len, tasks)) + 0.1 * max(map(len, curves)), 5.8)
    axes: Any = figure.subplots(subplot_kw={"projection": "polar"})
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    for label, (values, style) in curves.items():
        axes.plot(np.append(angles, angles[:1]), np.append(values, values[:1]), label=label, **style)
    metric = comparison.metric
    if metric is not None and metric.unit == "%":
        lowest = min((value for values, _ in curves.values() for value in values if math.isfinite(value)), default=0.0)
        center = max(10 * math.floor(lowest / 10 - 0.5), 0)
        axes.set_ylim(center, 100)
        axes.set_yticks([tick for tick in range(0, 100, 20 if center < 60 else 10) if tick > center])
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, tasks)
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


def accuracy_over_tasks(
    comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform"
) -> Figure:
    """ACC (eq. 2) against the number of tasks merged, in percent: mean over the streams, band of one deviation.

    Methods that were not evaluated after every merge are left out. Of several calibration sizes, the largest is shown.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.
        weighting: Cells of which weighting.

    Raises:
        ValueError: If a method or the weighting does not occur, or no method was evaluated after every merge.
    """
    cells = _largest_size(comparison, weighting)
    figure = new_figure(7.6, 4.4)
    axes = figure.subplots()
    evaluated, scale = _fully_evaluated(cells), _scale(comparison)
    for method, style in _styles(comparison, methods).items():
        if method not in evaluated:
            continue
        accs = [[scale * cell.report.acc(k) for cell in evaluated[method]] for k in range(len(cells[0].report.tasks))]
        mean, std = np.array([mean_and_std(values) for values in accs]).T
        tasks = np.arange(1, len(mean) + 1)
        axes.plot(tasks, mean, lw=1.6, ms=5, label=method, **style)
        axes.fill_between(tasks, mean - std, mean + std, color=style["color"], alpha=0.12, lw=0)
    if not axes.lines:
        raise ValueError("No method was evaluated after every merge; nothing to plot.")
    axes.set_xlabel("number of tasks merged")
    axes.set_ylabel(_acc_label(comparison, weighting))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def path_histogram(comparison: Comparison, name: str) -> Figure:
    """How often a quantity of the path took which value at which time, over all steps of all cells (Fig. 5, 6).

    One panel per method. Each step counts once, at the middle of its time; the colour is logarithmic and empty bins
    stay blank.

    Args:
        comparison: What to show; methods that follow no path do not enter.
        name: ``"gamma"`` or ``"alignment_ratio"``.

    Raises:
        ValueError: If the name is another one, or no path has this quantity.
    """
    if name not in _PATH_LABELS:
        raise ValueError(f"Unknown quantity {name!r} of a path: choose one of {', '.join(_PATH_LABELS)}.")
    paths = _paths(comparison, name)
    if not paths:
        raise ValueError(f"No merge recorded {name!r} along a path; nothing to plot.")
    values = {method: np.concatenate([path[name] for path in found]) for method, found in paths.items()}
    everything = np.concatenate(list(values.values()))
    top = max(math.ceil(10 * everything.max() - 1e-6), 1) / 10
    value_edges = np.linspace(min(everything.min(), 0), top, 41)
    histograms = {}
    for method, found in paths.items():
        t = np.concatenate([(np.array(path["t"])[1:] + np.array(path["t"])[:-1]) / 2 for path in found])
        histograms[method] = np.histogram2d(t, values[method], bins=[_time_edges(found), value_edges])

    columns = min(len(paths), 3)
    rows = math.ceil(len(paths) / columns)
    figure = new_figure(1.4 + (5.2 if columns == 1 else 3.6 * columns), 4.2 if rows == 1 else 3.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = LogNorm(1, max(10, *(counts.max() for counts, _, _ in histograms.values())))
    for axes in grid.flat[len(paths) :]:
        axes.set_axis_off()
    for axes, (method, (counts, t_edges, _)) in zip(grid.flat, histograms.items(), strict=False):
        image = axes.pcolormesh(t_edges, value_edges, np.ma.masked_equal(counts, 0).T, norm=norm, cmap="viridis")
        axes.set_title(f"{method}: {len(values[method]):,} steps", loc="left", fontsize="medium")
        axes.set_xlabel("time t")
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(_PATH_LABELS[name])
    figure.colorbar(image, ax=grid, label="steps per bin")
    return figure


def sizes(comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform") -> Figure:
    """ACC of the final merged models against the number of calibration samples: mean and deviation over the streams.

    The points of different methods stand slightly beside each other so that their error bars can be told apart.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.
        weighting: Cells of which weighting.

    Raises:
        ValueError: If a method or the weighting does not occur.
    """
    _largest_size(comparison, weighting)
    styles, scale = _styles(comparison, methods), _scale(comparison)
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
            axes.errorbar(x, mean, std, lw=1.4, ms=5, elinewidth=1, capsize=2, label=method, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(comparison.calibration_sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("calibration samples")
    axes.set_ylabel(_acc_label(comparison, weighting))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def cost(comparison: Comparison, methods: Sequence[str] | None = None, weighting: str = "uniform") -> Figure:
    """ACC of the final merged models against the gradients of single samples per merge: what gradients buy.

    One point per calibration size, mean and deviation over the streams; methods without gradients are level lines.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.
        weighting: Cells of which weighting.

    Raises:
        ValueError: If a method or the weighting does not occur, or no method took a gradient.
    """
    _largest_size(comparison, weighting)
    scale = _scale(comparison)
    figure = new_figure(7.6, 4.4)
    axes = figure.subplots()
    for method, style in _styles(comparison, methods).items():
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
            axes.errorbar(x, mean, std, lw=1.4, ms=5, elinewidth=1, capsize=2, label=method, **style)
        else:
            axes.axhline(mean[-1], color=style["color"], lw=1.4, ls="--", label=method)
    if not axes.containers:
        raise ValueError("No method took a gradient; nothing to plot.")
    axes.set_xscale("log")
    axes.set_xlabel("gradients of single samples per merge")
    axes.set_ylabel(_acc_label(comparison, weighting))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def save(comparison: Comparison, directory: str | os.PathLike) -> list[Path]:
    """Write data, tables and figures; files of the same names are replaced.

    Beside the files of :meth:`Comparison.save`: ``comparison.txt``, ``comparison.md`` and, where there is data for
    them, ``radar.png`` (from three tasks), ``accuracy_over_tasks.png``, ``cost.png`` (from one method that takes
    gradients) and ``sizes.png`` (from two calibration sizes), each also as ``..._w.png`` for drawn utility weights,
    ``path_gamma.png`` and ``path_alignment_ratio.png``. Of unlike metrics there are only the last two.

    Args:
        comparison: What to write.
        directory: Made if it does not exist.

    Returns:
        The files written.
    """
    directory = Path(directory)
    written = [*comparison.save(directory), directory / "comparison.txt", directory / "comparison.md"]
    several = len(comparison.calibration_sizes) > 1
    text = render_comparison(comparison, width=140) + (f"\n{render_sizes(comparison, width=140)}" if several else "")
    written[-2].write_text(text, encoding="utf-8")
    written[-1].write_text(markdown_comparison(comparison), encoding="utf-8")
    figures = {}
    for weighting in comparison.weightings:
        suffix = "" if weighting == "uniform" else "_w"
        cells = _largest_size(comparison, weighting)
        if comparison.metric is None:
            continue
        if len(cells[0].report.tasks) > 2:
            figures[f"radar{suffix}"] = radar(comparison, weighting=weighting)
        if _fully_evaluated(cells):
            figures[f"accuracy_over_tasks{suffix}"] = accuracy_over_tasks(comparison, weighting=weighting)
        if any(cell.per_merge()["sample_gradients"] > 0 for cell in cells):
            figures[f"cost{suffix}"] = cost(comparison, weighting=weighting)
        if several:
            figures[f"sizes{suffix}"] = sizes(comparison, weighting=weighting)
    for name in _PATH_LABELS:
        if _paths(comparison, name):
            figures[f"path_{name}"] = path_histogram(comparison, name)
    for name, figure in figures.items():
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1])
    return written


def _largest_size(comparison: Comparison, weighting: str) -> list[CellResult]:
    """The cells with one weighting and the largest calibration size it was run with."""
    cells = comparison.select(weighting=weighting)
    if not cells:
        found = ", ".join(comparison.weightings) or "none"
        raise ValueError(f"No cell has the weighting {weighting!r}; weightings in this comparison: {found}.")
    largest = max(cell.calibration_size for cell in cells)
    return [cell for cell in cells if cell.calibration_size == largest]


def _scale(comparison: Comparison) -> float:
    """What ACC is multiplied by to be drawn."""
    return (comparison.metric or ACCURACY).scale


def _acc_label(comparison: Comparison, weighting: str) -> str:
    metric = comparison.metric or ACCURACY
    return f"{_ACC[weighting]} (%)" if metric == ACCURACY else f"{_ACC[weighting]}: {metric.label}"


def _styles(comparison: Comparison, methods: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Look of each method to draw, by its place in the comparison: the same in all figures."""
    styles = {
        method: {
            "color": _METHOD_COLORS[index % len(_METHOD_COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        for index, method in enumerate(comparison.methods)
    }
    unknown = [method for method in methods or () if method not in styles]
    if unknown:
        raise ValueError(f"No cell has the method {unknown[0]!r}; methods in this comparison: {', '.join(styles)}.")
    return {method: styles[method] for method in methods or styles}


def _task_means(tasks: list[str], cells: list[CellResult], model: str) -> np.ndarray:
    """Mean score on each task, as drawn and of shape [K], of the pretrained, fine-tuned or final merged models."""
    rows = []
    for cell in cells:
        report = cell.report
        values = report.accuracy[-1] if model == "merged" else getattr(report, model)
        accuracies = dict(zip(report.tasks, values, strict=True))
        rows.append([report.metric_of(task).scale * accuracies[task] for task in tasks])
    return np.mean(rows, axis=0)


def _fully_evaluated(cells: list[CellResult]) -> dict[str, list[CellResult]]:
    """Cells by method, without the methods that have a cell that was not evaluated after every merge."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(cell.method, []).append(cell)
    unmeasured = {cell.method for cell in cells if any(math.isnan(a) for row in cell.report.accuracy for a in row)}
    return {method: group for method, group in groups.items() if method not in unmeasured}


def _paths(comparison: Comparison, name: str) -> dict[str, list[dict[str, list[float]]]]:
    """Paths on which the quantity was recorded, by method."""
    paths: dict[str, list[dict[str, list[float]]]] = {}
    for cell in comparison.cells:
        found = [record.path for record in cell.report.merges if record.path.get(name)]
        if found:
            paths.setdefault(cell.method, []).extend(found)
    return paths


def _time_edges(paths: list[dict[str, list[float]]]) -> np.ndarray:
    """Edges of at most 60 bins in time, as wide as a step: then all along a path hold equally many of its steps."""
    step = max(np.diff(path["t"]).max() for path in paths)
    end = max(path["t"][-1] for path in paths)
    edges = step * np.arange(max(math.ceil(end / step - 1e-6), 1) + 1)
    return edges if len(edges) <= 61 else np.linspace(0, edges[-1], 61)
