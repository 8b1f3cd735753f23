"""A comparison as plain text and as Markdown."""

import math
import textwrap
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from rich.console import Console

from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.report.tables import number, render
from lightning_odem.studies.results import CellResult, Comparison, mean_and_std, one_per_stream, paired_difference

METRICS = {"uniform": ("ACC", "BWT"), "dirichlet": ("ACC_w", "BWT_w")}
"""Names of final accuracy (eq. 2) and backward transfer (eq. 3) for each weighting."""

BASELINE = "average"
"""Label of the method that other methods are compared with."""


class _Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


def render_comparison(comparison: Comparison, width: int | None = None) -> str:
    """Render accuracy, backward transfer and costs of each method, one table per calibration size.

    Rows are the base model, the fine-tuned models on their own tasks, joint training, and the methods in order of
    appearance. ACC and BWT are means over cells with equal utility weights. ACC_w and BWT_w are means over cells with
    drawn weights, each computed with its own weights. The caption below the table says what the numbers are. A dash
    marks a value that is undefined or was not measured. Columns without any cell are left out.

    Args:
        comparison: What to show.
        width: Characters per line, the terminal's by default.

    Example:
        >>> from lightning_odem.report import MergeRecord, StreamReport
        >>> def cell(method, order, acc):
        ...     report = StreamReport(
        ...         ["a", "b"], [1.0, 1.0], [[0.9], [acc, acc]], [0.25, 0.75], [0.9, 0.8], [0.0, 0.0],
        ...         [MergeRecord(task, 0.5, method, merge_seconds=0.5) for task in "ab"],
        ...     )
        ...     return CellResult(method, 0, order, "uniform", 64, report, [])
        >>> cells = [cell("average", 0, 0.5), cell("average", 1, 0.6), cell("odem", 0, 0.7), cell("odem", 1, 0.81)]
        >>> print(render_comparison(Comparison(cells), width=100).split("Accuracies")[0])
        2 tasks, 64 calibration samples
        <BLANKLINE>
                                       ACC vs               s per  gradients    peak MB
                           ACC        average          BWT  merge  per merge  per merge
        -------------------------------------------------------------------------------
        pretrained  50.0 ± 0.0
        fine-tuned  85.0 ± 0.0
        average     55.0 ± 7.1                 -35.0 ± 7.1   0.50          0          —
        odem        75.5 ± 7.8  +20.50 ± 0.50  -14.5 ± 7.8   0.50          0          —
        <BLANKLINE>
        <BLANKLINE>
    """
    return _text([_comparison_table(comparison, size) for size in comparison.calibration_sizes], width)


def render_sizes(comparison: Comparison, width: int | None = None) -> str:
    """Render ACC of each method by the number of calibration samples (Table 3 of the paper), a table per weighting.

    Args:
        comparison: What to show.
        width: Characters per line, the terminal's by default.
    """
    return _text([_sizes_table(comparison, weighting) for weighting in comparison.weightings], width)


def markdown_comparison(comparison: Comparison) -> str:
    """Render the tables of :func:`render_comparison` in Markdown, and of :func:`render_sizes` if there are several."""
    tables = [_comparison_table(comparison, size) for size in comparison.calibration_sizes]
    if len(tables) > 1:
        tables += [_sizes_table(comparison, weighting) for weighting in comparison.weightings]
    return _join([_markdown(table) for table in tables], [f"{table.caption}\n" for table in tables])


def _comparison_table(comparison: Comparison, size: int) -> _Table:
    cells, metric = comparison.select(calibration_size=size), comparison.metric
    weightings = [weighting for weighting in comparison.weightings if any(c.weighting == weighting for c in cells)]
    compared = any(cell.method == BASELINE for cell in cells)
    header = [""]
    for acc, bwt in (METRICS[weighting] for weighting in weightings):
        header += [acc, *([f"{acc} vs\n{BASELINE}"] if compared else []), bwt]
    header += ["s per\nmerge", "gradients\nper merge", "peak MB\nper merge"]

    references: dict[str, Callable[[CellResult], float]] = {
        "pretrained": lambda cell: cell.report.weighted_accuracy(cell.report.pretrained),
        "fine-tuned": lambda cell: cell.report.weighted_accuracy(cell.report.fine_tuned),
    }
    if comparison.joint:
        references["joint"] = lambda cell: _joint_acc(comparison, cell)
    rows = []
    for name, acc_of in references.items():
        row = [name]
        for weighting in weightings:
            streams = [cell for cell in one_per_stream(cells) if cell.weighting == weighting]
            if name == "joint":
                streams = [cell for cell in streams if cell.seed in comparison.joint]
            row += [spread_text([acc_of(cell) for cell in streams], metric=metric), *[""] * (compared + 1)]
        rows.append(row + [""] * 3)
    for method in dict.fromkeys(cell.method for cell in cells):
        row = [method]
        for weighting in weightings:
            ours = [cell for cell in cells if (cell.method, cell.weighting) == (method, weighting)]
            both = [cell for cell in cells if cell.weighting == weighting]
            row.append(spread_text([cell.report.acc() for cell in ours], metric=metric))
            row += [_difference(both, method, metric) if ours else ""] if compared else []
            row.append(spread_text([cell.report.bwt() for cell in ours], "+", metric))
        rows.append(row + _costs([cell for cell in cells if cell.method == method]))
    title = f"{len(cells[0].report.tasks)} tasks, {size} calibration samples"
    return _Table(title, header, rows, _caption(cells, weightings, compared, metric))


def _sizes_table(comparison: Comparison, weighting: str) -> _Table:
    cells = comparison.select(weighting=weighting)
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        row = [method]
        for size in comparison.calibration_sizes:
            ours = [cell for cell in cells if (cell.method, cell.calibration_size) == (method, size)]
            row.append(spread_text([cell.report.acc() for cell in ours], metric=comparison.metric))
        rows.append(row)
    header = ["", *map(str, comparison.calibration_sizes)]
    return _Table(
        f"{METRICS[weighting][0]} by calibration samples", header, rows, _spread_caption(cells, comparison.metric)
    )


def _joint_acc(comparison: Comparison, cell: CellResult) -> float:
    accuracies = comparison.joint[cell.seed]
    return cell.report.weighted_accuracy([accuracies.get(task, math.nan) for task in cell.report.tasks])


def _difference(cells: list[CellResult], method: str, metric: TaskMetric | None) -> str:
    if method == BASELINE:
        return ""
    mean, error = paired_difference(cells, method, BASELINE)
    if math.isnan(error):
        return difference_text(mean, "+", metric)
    mark = "≈ " if abs(mean) <= 2 * error else ""
    return f"{mark}{difference_text(mean, '+', metric)} ± {difference_text(error, metric=metric)}"


def difference_text(difference: float, sign: str = "", metric: TaskMetric | None = ACCURACY) -> str:
    """Format a difference with one more decimal than scores, because paired differences are more exact."""
    return (metric or ACCURACY).text(difference, sign, digits=1)


def spread_text(values: list[float], sign: str = "", metric: TaskMetric | None = ACCURACY) -> str:
    """Format the mean of values and their sample standard deviation, if there is one."""
    if not values:
        return ""
    mean, std = mean_and_std(values)
    text = (metric or ACCURACY).text
    return text(mean, sign) if math.isnan(std) else f"{text(mean, sign)} ± {text(std)}"


def _costs(cells: list[CellResult]) -> list[str]:
    costs = [cell.per_merge() for cell in cells]
    specs = {"seconds_per_merge": ".2f", "sample_gradients": ",.0f", "peak_memory_mb": ",.1f"}
    return [number(fmean(cost[name] for cost in costs), spec) for name, spec in specs.items()]


def _caption(cells: list[CellResult], weightings: list[str], compared: bool, metric: TaskMetric | None) -> str:
    parts = [_spread_caption(cells, metric)]
    if "dirichlet" in weightings:
        parts.append(
            "ACC_w and BWT_w are under each stream's own utility weights, drawn from a Dirichlet distribution."
        )
    if compared:
        points = ", in percentage points" if metric is not None and metric.unit == "%" else ""
        parts.append(
            f"vs {BASELINE}: mean ± standard error{points}, of the difference to {BASELINE!r} on the "
            "same stream (same seed, order, weights and calibration size). A mean marked ≈ is at most two standard "
            "errors from 0, within the noise of these streams; one without a ± is of a single pair, its noise is "
            "unknown."
        )
    parts.append(
        "Costs are means over all merges but the first of each stream: wall time, gradients of single samples, and "
        "memory at the peak beyond that at the start of the merge (10^6 bytes)."
    )
    return " ".join(parts)


def _spread_caption(cells: list[CellResult], metric: TaskMetric | None) -> str:
    if metric is None:
        return "No ACC and BWT: the tasks are measured by unlike metrics."
    what = "Accuracies in percent" if metric == ACCURACY else metric.label
    groups = [(cell.method, cell.weighting, cell.calibration_size) for cell in cells]
    counts = {groups.count(group) for group in groups}
    number = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    if counts == {1}:
        return f"{what}, of one stream."
    return f"{what}: mean ± sample standard deviation over {number} streams (seeds and task orders)."


def _text(tables: list[_Table], width: int | None) -> str:
    width = width or Console().width
    parts = [render(table.title, table.header, table.rows, width) for table in tables]
    return _join(parts, [f"{textwrap.fill(table.caption, width)}\n" for table in tables])


def _markdown(table: _Table) -> str:
    rows = [table.header, *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    lines.insert(1, "|:--" + "|--:" * (len(table.header) - 1) + "|")
    return "\n".join([f"**{table.title}**", "", *lines, ""])


def _join(tables: list[str], captions: list[str]) -> str:
    """Join tables and captions. Tables in a row that share a caption have it below the last of them."""
    parts = []
    for table, caption, following in zip(tables, captions, [*captions, ""][1:], strict=True):
        parts += [table] if caption == following else [table, caption]
    return "\n".join(parts) or "No cell yet.\n"
