"""Figures of a report; matplotlib's global state stays untouched, so they can be drawn in any thread."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_odem.metrics import TaskMetric
from lightning_odem.report.drawing import (
    BLUE,
    COLORS,
    GREEN,
    LONG,
    MARKERS,
    ORANGE,
    RED,
    heat_map,
    map_size,
    name_columns,
    new_figure,
    open_frame,
    shown,
    task_labels,
)
from lightning_odem.report.merge_record import MergeRecord
from lightning_odem.report.record import StreamReport


def plot_accuracy_matrix(report: StreamReport, joint: Mapping[str, float] | None = None) -> Figure:
    """Heat map of the score on each task, in percent or as it is: references on top, merged models below.

    References are the base model, the incoming models on their own tasks and, if it is given, joint training. Brighter
    is better. If tasks have different metrics, colours go from the worst to the best score of each task. A dash marks a
    score that was not measured. Of more than 30 tasks the colours are shown without names and numbers.

    Args:
        report: A report of at least one merge.
        joint: Score of joint training on each task, by name, as in
            :attr:`Comparison.joint <lightning_odem.studies.Comparison>`.
    """
    metrics, shared = [report.metric_of(task) for task in report.tasks], report.metric()
    scale = np.array([metric.scale for metric in metrics])
    rows = {"pretrained": report.pretrained, "fine-tuned": report.fine_tuned} | _joint_row(report, joint)
    references, merged = np.array(list(rows.values())), report.matrix().numpy()
    values = scale * np.vstack([references, merged])
    size, above = len(report.tasks), len(rows)
    width, height = map_size(size)
    figure = new_figure(3.2 + width, 1.8 + height + 0.36 * above)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[above, min(size, LONG)])
    norm = _norm(values, shared)
    style = {"norm": norm, "cmap": "viridis" if shared is None or shared.higher_is_better else "viridis_r"}
    colors = _from_worst_to_best(values, metrics) if shared is None else values
    image = heat_map(upper, colors[:above], list(rows), _cells(report, references), style)
    names = [f"after {shown(task)}" for task in report.tasks]
    heat_map(lower, colors[above:], names, _cells(report, merged, triangular=True), style)
    name_columns(lower, report)
    lower.set_ylabel("merged model")
    bar = figure.colorbar(
        image,
        ax=[upper, lower],
        label=shared.label if shared else "scores of each task",
        pad=0.02,
        aspect=30,
    )
    if shared is None:
        bar.set_ticks([0, 1], labels=["worst", "best"])
    return figure


def plot_accuracy_over_stream(report: StreamReport, joint: Mapping[str, float] | None = None) -> Figure:
    """ACC_w (eq. 2) and the score on each task against the number of merges, in percent or as it is.

    Steps are references: the same mean over the tasks merged so far for the base model, for the incoming models, and
    for joint training if it is given. If tasks have different metrics, each metric has axes of its own and there is no
    mean. Of more than 30 tasks the range of the scores is shown, and that of the middle half.

    Args:
        report: A report of at least one merge.
        joint: Score of joint training on each task, by name.
    """
    size = len(report.tasks)
    merges = np.arange(1, size + 1)
    matrix = report.matrix().numpy()
    shared = report.metric()
    panels = list(dict.fromkeys(map(report.metric_of, report.tasks)))
    colors = COLORS if size <= len(COLORS) else colormaps["viridis"](np.linspace(0.1, 0.9, size))
    labels = task_labels(report)
    height = max(2.0 + 2.0 * len(panels), 1.6 + 0.2 * min(size, LONG))
    longest = max(map(len, labels)) if size <= LONG else 0
    figure = new_figure(max(7.2, 5.0 + 0.1 * longest), height)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    if shared is not None:
        name = r"$\mathrm{ACC}_w$" if len(set(report.weights)) > 1 else "ACC"
        mean = [shared.scale * report.acc(merge) for merge in range(size)]
        dots = {"marker": "o", "ms": 8} if size <= LONG else {}
        grid[0].plot(merges, mean, color="black", lw=3.5, label=name, **dots)
        _draw_references(grid[0], report, shared.scale, name, joint)
    if size > LONG:
        for axes, metric in zip(grid, panels, strict=True):
            of_metric = [report.metric_of(task) == metric for task in report.tasks]
            _plot_range(axes, merges, metric.scale * matrix[:, of_metric])
    else:
        for index, (task, label) in enumerate(zip(report.tasks, labels, strict=True)):
            metric = report.metric_of(task)
            axes = grid[panels.index(metric)]
            color, marker = colors[index], MARKERS[index % len(MARKERS)]
            values = metric.scale * matrix[index:, index]
            axes.plot(merges[index:], values, color=color, marker=marker, lw=1.2, ms=5, label=label)
    for axes, metric in zip(grid, panels, strict=True):
        axes.set_ylabel(metric.label)
        axes.set_xlim(0.5, size + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        open_frame(axes)
    grid[-1].set_xlabel("number of merges")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def plot_path(record: MergeRecord) -> Figure:
    """One merge: the calibration loss along the path, with damping and alignment ratio of its steps below.

    For a method without damping, the lengths of the steps are shown instead.

    The loss is compared with the chord between the losses of its endpoints, above which the barrier is measured (Def.
    3.2), and with the envelope of Theorem 3.4. Both are drawn up to the operating time, where the path ends. Losses of
    minibatches are a thin line without a barrier of their own, since the barrier is measured at the ends. Held-out
    losses and steps that were taken back are drawn if the path has them.

    Args:
        record: A merge that followed a path: ``record.path["t"]`` has at least two points.

    Raises:
        ValueError: If the merge followed no path.

    Example:
        >>> path = {"t": [0.0, 0.05, 0.1], "loss": [1.0, 0.9, 0.95], "gamma": [1.0, 0.4], "alignment_ratio": [0.2, 0.3]}
        >>> figure = plot_path(MergeRecord("svhn", t=0.1, method="odem", path=path, loss_incoming=1.5))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['calibration loss', 'per step']
    """
    if len(record.path.get("t", [])) < 2:
        raise ValueError(f"The merge of task {record.task!r} ({record.method}) followed no path; nothing to plot.")
    t, loss = np.array(record.path["t"]), np.array(record.path["loss"])
    change = record.loss_incoming - loss[0]
    chord = loss[0] + t * change
    dense = len(t) > 60
    figure = new_figure(7.4, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])

    ends = t[[0, -1]]
    envelope = loss[0] + ends * max(change, 0.0)
    upper.plot(ends, envelope, color=ORANGE, lw=5, alpha=0.5, label="envelope (Theorem 3.4)")
    label = rf"chord to $L(\theta_1)$ = {record.loss_incoming:.4g} at t = 1"
    upper.plot(ends, chord[[0, -1]], color="black", lw=1.2, ls="--", label=label)
    if record.estimated:
        upper.plot(t, loss, color=BLUE, lw=0.8, alpha=0.5, label="path, losses of minibatches")
        upper.plot(ends, loss[[0, -1]], "o", color=BLUE, ms=6, label=r"$L(\theta(t))$ at the ends of the path")
    else:
        upper.plot(t, loss, color=BLUE, lw=2, marker="" if dense else "o", ms=4, label=r"path, $L(\theta(t))$")
    if "held_out_t" in record.path:
        held_out = record.path["held_out_t"], record.path["held_out_loss"]
        upper.plot(*held_out, color=GREEN, lw=1.2, marker="s", ms=3, label="held-out samples")
    if "rejected_t" in record.path:
        rejected = record.path["rejected_t"], record.path["rejected_loss"]
        upper.plot(*rejected, "x", color="black", ms=5, label="steps taken back")
    if record.barrier > 0:
        # The largest of many estimates would be noise.
        highest = -1 if record.estimated else int(np.argmax(loss - chord))
        label = f"barrier = {record.barrier:.3g}"
        upper.plot(t[[highest, highest]], [chord[highest], loss[highest]], color=RED, lw=2, marker="_", label=label)
    upper.axvline(record.t, color="0.4", lw=1, ls=":", label=f"operating time t = {record.t:.3g}")
    label = f"merged model, {loss[-1]:.4g} (before: {loss[0]:.4g})"
    upper.plot(t[-1:], loss[-1:], "o", color=RED, ms=11, mfc="none", label=label)
    upper.set_ylabel("calibration loss")
    upper.ticklabel_format(axis="y", useOffset=False)
    upper.set_title(f"merging {shown(record.task)}", loc="left", fontsize="medium")

    if record.path["gamma"]:
        gamma, ratio = record.path["gamma"], record.path["alignment_ratio"]
        lower.stairs(
            gamma, t, baseline=None, color=GREEN, lw=0.8 if dense else 2, label=r"damping factor $\gamma$ (1: undamped)"
        )
        label = r"alignment ratio $\Vert P_g u\Vert / \Vert u\Vert$"
        lower.stairs(ratio, t, baseline=None, color=RED, lw=0.8 if dense else 2, ls=(0, (3, 1)), label=label)
        lower.set_ylim(-0.05, 1.05)
    else:
        lower.stairs(
            record.path["step_norm"], t, baseline=None, color=GREEN, lw=0.8 if dense else 2, label="length of the step"
        )
    lower.axvline(record.t, color="0.4", lw=1, ls=":")
    lower.set_ylabel("per step")
    lower.set_xlabel("time t")
    for axes in (upper, lower):
        open_frame(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    return figure


def _joint_row(report: StreamReport, joint: Mapping[str, float] | None) -> dict[str, list[float]]:
    return {} if joint is None else {"joint training": [joint.get(task, math.nan) for task in report.tasks]}


def _draw_references(
    axes: Axes, report: StreamReport, scale: float, name: str, joint: Mapping[str, float] | None
) -> None:
    rows = {"pretrained": report.pretrained, "fine-tuned": report.fine_tuned} | _joint_row(report, joint)
    size = len(report.tasks)
    for (label, scores), style in zip(rows.items(), (":", "--", "-."), strict=False):
        means = [scale * report.weighted_accuracy(scores[: merge + 1]) for merge in range(size)]
        if any(map(math.isfinite, means)):
            edges = np.arange(size + 1) + 0.5
            axes.stairs(means, edges, baseline=None, color="0.4", lw=1.5, ls=style, label=f"{name} {label}")


def _norm(values: np.ndarray, metric: TaskMetric | None) -> Normalize:
    """Colour range: up to 100 for percent (from 0 for errors), the range of the values for other metrics."""
    measured = [value for value in values.flat if math.isfinite(value)]
    if metric is None:
        return Normalize(0, 1)
    if metric.unit != "%":
        return Normalize(min(measured, default=0), max(measured, default=1))
    if not metric.higher_is_better:
        return Normalize(0, 10 * math.ceil(max(measured, default=100) / 10))
    return Normalize(10 * math.floor(min(measured, default=0) / 10), 100)


def _from_worst_to_best(values: np.ndarray, metrics: list[TaskMetric]) -> np.ndarray:
    """Scores [rows, tasks] as positions in [0, 1] between the worst and the best of each task."""
    signed = values * [1 if metric.higher_is_better else -1 for metric in metrics]
    known = np.ma.masked_invalid(signed)
    lowest, highest = known.min(axis=0), known.max(axis=0)
    return ((known - lowest) / np.ma.where(highest == lowest, 1, highest - lowest)).filled(np.nan)


def _plot_range(axes: Axes, merges: np.ndarray, values: np.ndarray) -> None:
    """Quantiles of scores [merges, tasks], of those that were measured after each merge."""
    known = np.isfinite(values).any(axis=1)
    quantiles = np.full((5, len(values)), np.nan)
    quantiles[:, known] = np.nanquantile(values[known], (0, 0.25, 0.5, 0.75, 1), axis=1)
    lowest, lower, middle, upper, highest = quantiles
    axes.fill_between(merges, lowest, highest, color=BLUE, alpha=0.15, lw=0, label="all tasks")
    axes.fill_between(merges, lower, upper, color=BLUE, alpha=0.35, lw=0, label="middle half")
    axes.plot(merges, middle, color=BLUE, lw=1.2, label="median")


def _cells(report: StreamReport, values: np.ndarray, triangular: bool = False) -> dict[tuple[int, int], str]:
    """The texts in the cells of a heat map, by row and column; none for a long stream."""
    if len(report.tasks) > LONG:
        return {}
    texts = {}
    for (row, column), value in np.ndenumerate(values):
        if not (triangular and column > row):
            texts[row, column] = report.metric_of(report.tasks[column]).text(value)
    return texts
