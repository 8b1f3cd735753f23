"""The trajectory study as table, figure and files."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_odem.metrics import ACCURACY
from lightning_odem.report.drawing import BLUE, new_figure, open_frame, shown
from lightning_odem.report.tables import RULE_BELOW_HEADER, column_widths, columns_per_block
from lightning_odem.studies.report_files import save_report
from lightning_odem.studies.trajectory import LINE, PairPath

_COLUMNS = ("start", "end", "method", "t", "accuracy_start", "accuracy_end", "mean", "loss")


def render_trajectory(paths: Sequence[PairPath], width: int | None = None) -> str:
    """Render accuracies along the paths in the layout of the paper's Table 6, in percent, one table per method.

    Columns are the times t. Columns that do not fit beside each other continue below.

    Args:
        paths: What to show. All have the same times.
        width: Characters per line, the terminal's by default.

    Example:
        >>> path = PairPath("ode", [0.0, 0.5, 1.0], [1.0] * 3, {"a": [0.9, 0.8, 0.1], "b": [0.1, 0.7, 0.9]})
        >>> print(render_trajectory([path], width=80))
        Accuracy (%) along the path: ode
        <BLANKLINE>
        pair   metric   0.0    0.5   1.0
        --------------------------------
        a → b  a       90.0   80.0  10.0
               b       10.0   70.0  90.0
               mean    50.0  *75.0  50.0
        <BLANKLINE>
        t = 0 is the model fine-tuned on the first task, t = 1 that on the second. *:
        first best mean along the path.
        <BLANKLINE>
    """
    width = width or Console().width
    text = StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False, markup=False, highlight=False)
    for method in dict.fromkeys(path.method for path in paths):
        console.print(f"Accuracy (%) along the path: {method}")
        rows = [row for path in paths if path.method == method for row in _rows(path)]
        decimals = 1 if len(paths[0].t) <= 11 else 2
        header = ["pair", "metric", *(f"{t:.{decimals}f}" for t in paths[0].t)]
        labels, metrics, *others = column_widths([header, *rows])
        size = columns_per_block([labels + metrics, *others], width)
        for first in range(2, len(header), size):
            table = Table(box=RULE_BELOW_HEADER, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
            for index, name in enumerate([*header[:2], *header[first : first + size]]):
                table.add_column(name, justify="right" if index > 1 else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row[:2], *row[first : first + size])
            console.print()
            console.print(table)
        console.print()
    caption = "t = 0 is the model fine-tuned on the first task, t = 1 that on the second."
    console.print(f"{caption} *: first best mean along the path.")
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def plot_trajectory(paths: Sequence[PairPath]) -> Figure:
    """Draw mean accuracy on the two tasks, in percent, and calibration loss against t, one column per pair.

    Args:
        paths: What to show.
    """
    pairs = list(dict.fromkeys(path.pair for path in paths))
    blocks = math.ceil(len(pairs) / 4)
    columns = math.ceil(len(pairs) / blocks)
    figure = new_figure(1.2 + 2.6 * columns, 0.6 + 4.2 * blocks)
    grid = figure.subplots(2 * blocks, columns, sharex=True, squeeze=False)
    for unused in range(len(pairs), blocks * columns):
        for axes in grid[2 * blocks - 2 :, unused % columns]:
            axes.set_axis_off()
    handles: dict[str, Any] = {}
    for index, pair in enumerate(pairs):
        row, column = 2 * (index // columns), index % columns
        upper, lower = grid[row : row + 2, column]
        for path in (path for path in paths if path.pair == pair):
            style = {"color": "0.4", "ls": "--"} if path.method == LINE else {"color": BLUE, "marker": "o", "ms": 3}
            handles[path.method] = upper.plot(path.t, [100 * mean for mean in path.mean], lw=1.6, **style)[0]
            lower.plot(path.t, path.loss, lw=1.6, **style)
        upper.set_title(f"{shown(pair[0])} → {shown(pair[1])}", fontsize="medium")
        lower.set_xlabel("time t")
        lower.xaxis.set_tick_params(labelbottom=True)
        if column == 0:
            upper.set_ylabel("mean accuracy (%)")
            lower.set_ylabel("calibration loss")
        for axes in (upper, lower):
            open_frame(axes)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def save_trajectory(paths: Sequence[PairPath], directory: str | os.PathLike) -> list[Path]:
    """Write ``trajectory.json``, ``.csv`` (one row per path and point), ``.txt`` and ``.png``.

    Accuracies are fractions in the JSON and CSV files.

    Args:
        paths: What to write.
        directory: Directory to write to. It is created if it does not exist.

    Returns:
        The files written.
    """
    rows = (
        dict(zip(_COLUMNS, (*path.pair, path.method, *values), strict=True))
        for path in paths
        for values in zip(path.t, *path.accuracy.values(), path.mean, path.loss, strict=True)
    )
    return save_report(
        "trajectory",
        directory,
        data=[asdict(path) for path in paths],
        columns=_COLUMNS,
        rows=rows,
        table=render_trajectory(paths, width=140),
        figure=plot_trajectory(paths),
    )


def _rows(path: PairPath) -> list[list[str]]:
    (start, first), (end, second) = path.accuracy.items()
    mean = [f"{'*' if index == path.best else ''}{ACCURACY.text(value)}" for index, value in enumerate(path.mean)]
    return [
        [f"{start} → {end}", start, *map(ACCURACY.text, first)],
        ["", end, *map(ACCURACY.text, second)],
        ["", "mean", *mean],
    ]
