"""The schedule study as table, figure and files."""

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from lightning_odem.report.drawing import BLUE, new_figure, open_frame
from lightning_odem.report.tables import number, render
from lightning_odem.studies.report_files import save_report
from lightning_odem.studies.results import mean_and_std
from lightning_odem.studies.schedule import ScheduleStudy
from lightning_odem.studies.tables import difference_text, spread_text

_PER_MERGE = ("k", "task", "t_schedule", "t_best", "test_best", "test_schedule", "gain")


def render_schedule(studies: Sequence[ScheduleStudy], width: int | None = None) -> str:
    """Render operating times and accuracies by merge, and the rank correlation.

    If there are several orders, each value is the mean over them with the sample standard deviation.

    Args:
        studies: What to show. All have the same number of tasks.
        width: Characters per line, the terminal's by default.

    Example:
        >>> from lightning_odem.studies import OperatingPoint
        >>> t, merges = [0.0, 0.25, 0.5, 1.0], []
        >>> for k, validation in ((2, [0.1, 0.2, 0.4, 0.3]), (3, [0.2, 0.4, 0.3, 0.1])):
        ...     merges.append(OperatingPoint(k, "task", t, validation, test_best=0.75, test_schedule=0.7))
        >>> print(render_schedule([ScheduleStudy(0, ["a", "b", "c"], "schedule", merges)], width=80))
        Best operating time of each merge
        <BLANKLINE>
        k    1/k    t*  ACC at t*  ACC at 1/k   gain
        --------------------------------------------
        2  0.500  0.50       75.0        70.0  +5.00
        3  0.333  0.25       75.0        70.0  +5.00
        <BLANKLINE>
        t*: smallest time with the best mean validation accuracy over the tasks seen, of
        4 candidates on the path. ACC: mean test accuracy over the tasks seen, in
        percent. The stream continued from the model at t = 1/k. 1 order.
        <BLANKLINE>
        Spearman correlation of 1 - t* and (k - 1)/k: 1.000
        <BLANKLINE>
    """
    width = width or Console().width
    rows = []
    for merges in zip(*(study.merges for study in studies), strict=True):
        gain, deviation = mean_and_std([merge.gain for merge in merges])
        rows.append(
            [
                str(merges[0].k),
                f"{merges[0].t_schedule:.3f}",
                _number_and_std([merge.t_best for merge in merges], ".2f"),
                spread_text([merge.test_best for merge in merges]),
                spread_text([merge.test_schedule for merge in merges]),
                difference_text(gain, "+") + ("" if math.isnan(deviation) else f" ± {difference_text(deviation)}"),
            ]
        )
    header = ["k", "1/k", "t*", "ACC at t*", "ACC at 1/k", "gain"]
    spread = f"Mean ± sample standard deviation over {len(studies)} orders." if len(studies) > 1 else "1 order."
    caption = (
        "t*: smallest time with the best mean validation accuracy over the tasks seen, of "
        f"{len(studies[0].merges[0].t)} candidates on the path. ACC: mean test accuracy over the tasks seen, in "
        f"percent. The stream continued from the model at t = {'1/k' if studies[0].follow == 'schedule' else 't*'}. "
        f"{spread}"
    )
    correlations = [study.spearman for study in studies if not math.isnan(study.spearman)]
    undefined = len(studies) - len(correlations)
    spearman = f"Spearman correlation of 1 - t* and (k - 1)/k: {_number_and_std(correlations, '.3f')}"
    spearman += f" (undefined in {undefined} of {len(studies)} orders)" if undefined else ""
    table = render("Best operating time of each merge", header, rows, width)
    return f"{table}\n{textwrap.fill(caption, width)}\n\n{textwrap.fill(spearman, width)}\n"


def plot_schedule(studies: Sequence[ScheduleStudy]) -> Figure:
    """Draw the best operating times of every order, their mean and 1 / k against the number of tasks.

    Args:
        studies: What to show. All have the same number of tasks.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    k = [merge.k for merge in studies[0].merges]
    beside = 0.05
    for index, study in enumerate(studies):
        x = [number + beside * (index - (len(studies) - 1) / 2) for number in k]
        label = "single orders" if index == 0 else None
        axes.plot(x, [merge.t_best for merge in study.merges], ls="", marker="o", ms=4, alpha=0.45, c=BLUE, label=label)
    means = [fmean(merge.t_best for merge in merges) for merges in zip(*(s.merges for s in studies), strict=True)]
    axes.plot(k, means, color=BLUE, lw=1.8, label="mean")
    axes.plot(k, [1 / number for number in k], color="black", ls="--", lw=1.4, label="1 / k")
    axes.set_xlabel("number of tasks k")
    axes.set_ylabel(r"best operating time $t_k^\star$")
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    open_frame(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def save_schedule(studies: Sequence[ScheduleStudy], directory: str | os.PathLike) -> list[Path]:
    """Write ``schedule.json``, ``.csv`` (one row per order and merge), ``.txt`` and ``.png``.

    Accuracies are fractions in the JSON and CSV files.

    Args:
        studies: What to write.
        directory: Directory to write to. It is created if it does not exist.

    Returns:
        The files written.
    """
    rows = (
        {
            **{name: getattr(merge, name) for name in _PER_MERGE},
            "order": study.order,
            "validation_best": max(merge.validation),
        }
        for study in studies
        for merge in study.merges
    )
    return save_report(
        "schedule",
        directory,
        data=[{**asdict(study), "spearman": study.spearman} for study in studies],
        columns=("order", *_PER_MERGE, "validation_best"),
        rows=rows,
        table=render_schedule(studies, width=140),
        figure=plot_schedule(studies),
    )


def _number_and_std(values: list[float], spec: str) -> str:
    mean, std = mean_and_std(values)
    return number(mean, spec) + ("" if math.isnan(std) else f" ± {std:{spec}}")
