"""What the figures have in common: colours, empty figures, names as matplotlib shows them, heat maps."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator

from lightning_odem.report.plain import plain
from lightning_odem.report.record import StreamReport

# Okabe and Ito's colour-blind-safe palette without its black, which marks the mean, and its yellow, which is too pale
# for a line
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
BLUE, ORANGE, GREEN, RED = COLORS[:4]
MARKERS = "osD^vP*Xp<>"
LONGEST_NAME = 44
LONG = 30  # tasks; more of them cannot be told apart by name, number and colour


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with a size in inches, without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since only drawing needs it

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def open_frame(axes: Axes) -> None:
    """Give axes the style of all figures: a pale grid, and no frame above and to the right."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shown(name: str) -> str:
    r"""A name as a figure shows it: no formula, no control character, its middle left out if it is very long.

    Example:
        >>> print(shown("$5"), shown("a" * 50 + "z"))
        \$5 aaaaaaaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaaaaaz
    """
    name = plain(name)
    if len(name) > LONGEST_NAME:
        half = (LONGEST_NAME - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    # Labels with a leading underscore are left out of legends.
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def task_labels(report: StreamReport) -> list[str]:
    """The tasks' names, with their utility weights unless these are equal."""
    names = list(map(shown, report.tasks))
    if len(set(report.weights)) == 1:
        return names
    return [f"{name} (w={weight:.4g})" for name, weight in zip(names, report.weights, strict=True)]


def map_size(tasks: int, wider: float = 1.0) -> tuple[float, float]:
    """Width and height in inches of a heat map of so many tasks; they stop growing at :data:`LONG` tasks."""
    return wider * cell_size(tasks) * min(tasks, LONG), 0.36 * min(tasks, LONG)


def cell_size(tasks: int) -> float:
    """Width in inches of a column of a heat map."""
    return 0.75 if tasks < 10 else 0.48


def name_columns(axes: Axes, report: StreamReport) -> None:
    """Write the tasks' names below a heat map, with their metrics if these differ; tilted if they are too long.

    More than :data:`LONG` tasks are numbered, along both axes.
    """
    axes.set_xlabel("task")
    if (size := len(report.tasks)) > LONG:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(np.linspace(0, size - 1, 6).round()))
            axis.set_major_formatter(lambda place, _: f"{place + 1:.0f}")
        return
    labels = task_labels(report)
    if report.metric() is None:
        pairs = zip(labels, report.tasks, strict=True)
        labels = [f"{label}\n{report.metric_of(task).name}" for label, task in pairs]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    is_tilted = 0.09 * longest > cell_size(len(labels))
    tilt: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if is_tilted else {}
    axes.set_xticks(range(len(labels)), labels, **tilt)


def heat_map(
    axes: Axes, values: np.ndarray, rows: list[str], cells: dict[tuple[int, int], str], style: dict[str, Any]
) -> AxesImage:
    """Draw a heat map with a text in each cell, in a colour that stands out from it.

    Args:
        axes: Where it is drawn.
        values: What the colours mean [rows, columns]; not finite ones have none.
        rows: Names of the rows.
        cells: Texts by row and column.
        style: ``norm`` and ``cmap``.
    """
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", **style)
    for (row, column), text in cells.items():
        is_dark = np.isfinite(values[row, column]) and _luminance(image.to_rgba(values[row, column])) < 0.42
        axes.text(column, row, text, ha="center", va="center", fontsize="small", color="white" if is_dark else "black")
    if len(rows) <= LONG:
        axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _luminance(color: Any) -> float:
    return float(np.dot(color[:3], (0.299, 0.587, 0.114)))
