"""What each merge changed for each task."""

import math

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lightning_odem.report.drawing import LONG, heat_map, map_size, name_columns, new_figure, shown
from lightning_odem.report.record import StreamReport


def plot_changes(report: StreamReport) -> Figure:
    """Heat map of the score on each task after a merge minus before it, in percentage points or as it is.

    Blue is better and red is worse, also where lower scores are better. If tasks have different metrics, the colours of
    each task go up to its own largest change. Of more than 30 tasks the colours are shown without names and numbers.

    Args:
        report: A report of at least one merge.
    """
    shared, size = report.metric(), len(report.tasks)
    metrics = [report.metric_of(task) for task in report.tasks]
    found = np.array([row + [math.nan] * (size - len(row)) for row in changes(report)])
    better = found * [metric.scale if metric.higher_is_better else -metric.scale for metric in metrics]
    largest = np.ma.masked_invalid(np.abs(better)).max(axis=None if shared else 0, keepdims=True).filled(0.0)
    colors = better / np.where(largest == 0.0, 1.0, largest)
    texts = {
        (row, column): metrics[column].text(found[row, column], "+")
        for row in range(size if size <= LONG else 0)
        for column in range(row + 1)
    }
    width, height = map_size(size, wider=1.2)
    figure = new_figure(3.4 + width, 2.2 + height)
    axes = figure.subplots()
    names = [f"merge of {shown(task)}" for task in report.tasks]
    image = heat_map(axes, colors, names, texts, {"norm": Normalize(-1, 1), "cmap": "RdBu"})
    name_columns(axes, report)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=[-1, 0, 1])
    bar.set_ticks([-1, 0, 1], labels=["worse", "same", "better"])
    title = "score after minus before each merge"
    if shared is not None:
        way = "higher is better" if shared.higher_is_better else "lower is better"
        unit = "percentage points, " if shared.unit == "%" else ""
        title = f"{shared.name} after minus before each merge\n({unit}{way})"
        signed = largest.item() if shared.higher_is_better else -largest.item()
        labels = [f"{shared.text(sign * signed / shared.scale, '+')}" for sign in (-1, 0, 1)]
        bar.set_ticks([-1, 0, 1], labels=labels)
    figure.suptitle(title, fontsize="medium")
    return figure


def changes(report: StreamReport) -> list[list[float]]:
    """Score on each task after each merge minus before it; rows are merges, as in ``report.accuracy``.

    Before its own merge, a task's score is ``before_training``, or that of the base model for the first task. A merge
    after which a task was not measured has NaN, and the next one at which it was is compared with the measurement
    before.

    Example:
        >>> report = StreamReport(["a", "b"], [1.0, 1.0], [[0.75], [0.5, 0.875]], [0.25, 0.375], [1.0, 1.0], [0.0, 0.5])
        >>> changes(report)
        [[0.5], [-0.25, 0.375]]
    """
    # No merged model was there before the first merge.
    last, rows = [*report.pretrained[:1], *report.before_training[1:]], []
    for scores in report.accuracy:
        rows.append([after - before for after, before in zip(scores, last, strict=False)])
        last[: len(scores)] = [
            before if math.isnan(after) else after for after, before in zip(scores, last, strict=False)
        ]
    return rows
