"""A report as plain text."""

import math
from io import StringIO
from statistics import fmean
from textwrap import fill

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.report.merge_record import MergeRecord
from lightning_odem.report.plain import plain
from lightning_odem.report.record import StreamReport

# rich's own open boxes draw the rule in characters that some file encodings lack
RULE_BELOW_HEADER = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_GAP = 2
LAST = 20
"""Merges of a longer stream that tables show; ``report.json`` has all."""


def render_table(report: StreamReport, width: int | None = None) -> str:
    """Accuracy matrix with ACC_w (eq. 2) and BWT_w (eq. 3) after every merge, in percent or in the metric's own unit.

    Columns have the task names if these fit. Otherwise columns are numbered, and the rows tell which number is which
    task. Columns that still do not fit beside each other continue in further blocks below. A dash marks a value that is
    undefined or was not measured. ACC and BWT are undefined if metrics differ. Of more than 20 tasks the last 20 are
    shown; ACC and BWT are those of all.

    Args:
        report: What to show.
        width: Characters per line; the terminal's by default.

    Example:
        >>> report = StreamReport(
        ...     tasks=["mnist", "svhn"], weights=[1.0, 1.0], accuracy=[[0.99], [0.95, 0.9]],
        ...     pretrained=[0.5, 0.25], fine_tuned=[0.99, 0.97], before_training=[0.5, 0.3],
        ... )
        >>> print(render_table(report, width=80))
        Accuracy (%)
        <BLANKLINE>
                     mnist  svhn   ACC   BWT
        ------------------------------------
        pretrained    50.0  25.0  37.5
        fine-tuned    99.0  97.0  98.0
        after mnist   99.0        99.0     —
        after svhn    95.0  90.0  92.5  -4.0
        <BLANKLINE>
    """
    if not report.tasks:
        return "No merge yet.\n"
    width = width or Console().width
    for numbered in (False, True):
        header, rows = accuracy_cells(report, numbered)
        if columns_per_block(column_widths([header, *rows]), width) == len(header) - 1:
            break
    below = [*left_out(report), *unlike(report), *removals(report)]
    return render(accuracy_title(report), header, rows, width) + "".join(f"\n{fill(line, width)}\n" for line in below)


def accuracy_title(report: StreamReport) -> str:
    """What the numbers of :func:`render_table` are."""
    shared = report.metric()
    return "Scores" if shared is None else f"Accuracy{shared.label[8:]}" if shared == ACCURACY else shared.label


def accuracy_cells(report: StreamReport, numbered: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of :func:`render_table`; names are as they are, and there may be control characters in them.

    Args:
        report: What to show.
        numbered: Whether columns have numbers instead of names, and the rows tell which number is which task.
    """
    header, labels = _accuracy_names(report, numbered)
    return header, [[label, *cells] for label, cells in zip(labels, _accuracy_rows(report), strict=False)]


def render_costs(report: StreamReport, width: int | None = None) -> str:
    """Table of the effect of each of the last 20 merges on the calibration loss, and of its cost.

    Args:
        report: What to show.
        width: Characters per line; the terminal's by default.
    """
    header = [
        "task", "t", "loss\nbefore", "loss\nafter", "loss\nincoming", "gamma\nmean (min)", "barrier",
        "gradient\nevaluations", "seconds", "overhead", "seconds of\nevaluation",
    ]  # fmt: skip
    title = "Merges (overhead: time beyond the gradient evaluations, relative to them)"
    return render(title, header, [_cost_row(record) for record in report.merges[-LAST:]], width or Console().width)


def render_summary(report: StreamReport, width: int | None = None) -> str:
    """:func:`render_table`, and :func:`render_costs` below it."""
    parts = [render_table(report, width)]
    if report.merges:
        parts.append(render_costs(report, width))
    return "\n".join(parts)


def left_out(report: StreamReport) -> list[str]:
    """How many tasks the table does not show, if there are any."""
    first = first_shown(report)
    return [f"These are the last {LAST} of {len(report.tasks)} tasks; report.json has all."] if first else []


def first_shown(report: StreamReport) -> int:
    """Index of the first task and merge that are shown: those of a long stream are left out."""
    return max(len(report.tasks) - LAST, 0)


def unlike(report: StreamReport) -> list[str]:
    """The reason why there is no mean over the tasks, if there is none."""
    if report.metric() is not None:
        return []
    found = ", ".join(dict.fromkeys(report.metric_of(task).label for task in report.tasks))
    return [f"No ACC and BWT: the tasks are measured by unlike metrics, {found}."]


def removals(report: StreamReport) -> list[str]:
    """A line for each task that was taken out of the stream again."""
    return [
        f"Taken out: {record.task}."
        + (f" It was in what was measured after {', '.join(record.measured_with)}." if record.measured_with else "")
        for record in report.removed
    ]


def _accuracy_names(report: StreamReport, numbered: bool) -> tuple[list[str], list[str]]:
    """Header and row labels of the accuracy table."""
    first = first_shown(report)
    tasks, weighted = report.tasks[first:], len(set(report.weights)) > 1
    columns = [f"#{k}" for k in range(first + 1, len(report.tasks) + 1)] if numbered else tasks
    merged = [f"{k} {task}" for k, task in zip(columns, tasks, strict=True)] if numbered else tasks
    if weighted:
        columns = [f"{column}\nw={weight:.4g}" for column, weight in zip(columns, report.weights[first:], strict=True)]
    if report.metric() is None:
        names = [f"{metric.name} {metric.unit}".strip() for metric in _metrics(report)[first:]]
        columns = [f"{column}\n{name}" for column, name in zip(columns, names, strict=True)]
    summary = ["ACC_w", "BWT_w"] if weighted else ["ACC", "BWT"]
    return ["", *columns, *summary], ["pretrained", "fine-tuned", *(f"after {name}" for name in merged)]


def _accuracy_rows(report: StreamReport) -> list[list[str]]:
    first, shared = first_shown(report), report.metric()
    metrics = _metrics(report)[first:]
    rows = []
    for reference in (report.pretrained, report.fine_tuned):
        rows.append([*_texts(reference[first:], metrics), _summary(shared, report.weighted_accuracy(reference)), ""])
    means = report.summaries()
    for merge, accuracies in list(enumerate(report.accuracy))[first:]:
        unseen = [""] * (len(report.tasks) - len(accuracies))
        so_far = report.metric(merge + 1)
        summary = [_summary(so_far, means["acc"][merge]), _summary(so_far, means["bwt"][merge], "+")]
        rows.append([*_texts(accuracies[first:], metrics), *unseen, *summary])
    return rows


def _metrics(report: StreamReport) -> list[TaskMetric]:
    return [report.metric_of(task) for task in report.tasks]


def _texts(scores: list[float], metrics: list[TaskMetric]) -> list[str]:
    return [metric.text(score) for score, metric in zip(scores, metrics, strict=False)]


def _summary(metric: TaskMetric | None, score: float, sign: str = "") -> str:
    return "—" if metric is None else metric.text(score, sign)


def _cost_row(record: MergeRecord) -> list[str]:
    gamma = record.path.get("gamma")
    overhead = record.merge_seconds / record.gradient_seconds - 1 if record.gradient_seconds else math.nan
    return [
        record.task,
        number(record.t, ".3f"),
        *(number(loss, ".4f") for loss in (record.loss_before, record.loss_after, record.loss_incoming)),
        f"{fmean(gamma):.2f} ({min(gamma):.2f})" if gamma else "—",
        number(record.barrier, ".4f"),
        str(record.gradient_evaluations),
        number(record.merge_seconds, ".2f"),
        number(overhead, ".0%"),
        number(record.evaluation_seconds or math.nan, ".2f"),
    ]


def number(value: float, spec: str) -> str:
    """A formatted number, or a dash for NaN."""
    return "—" if math.isnan(value) else format(value, spec)


def column_widths(rows: list[list[str]]) -> list[int]:
    """Width that each column needs, including the gap to the next one."""
    columns = zip(*rows, strict=True)
    return [_GAP + max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]


def columns_per_block(widths: list[int], width: int) -> int:
    """Number of columns beside the first one that gives the fewest blocks of about equal size that are not too wide."""
    label, *columns = [min(widths[0], width // 3), *widths[1:]]
    for blocks in range(1, len(columns) + 1):
        size = math.ceil(len(columns) / blocks)
        starts = range(0, len(columns), size)
        if all(label + sum(columns[start : start + size]) - _GAP <= width for start in starts):
            break
    return size


def render(title: str, header: list[str], rows: list[list[str]], width: int) -> str:
    """One table, or several below each other that repeat the first column."""
    header = ["\n".join(map(plain, name.split("\n"))) for name in header]  # headers have two lines if there are weights
    rows = [list(map(plain, row)) for row in rows]
    text = StringIO()
    console = Console(
        file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False,
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip
    console.print(title)
    size = columns_per_block(column_widths([header, *rows]), width)
    for start in range(1, len(header), size):
        block = slice(start, start + size)
        table = Table(box=RULE_BELOW_HEADER, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        table.add_column(header[0], no_wrap=True, overflow="ellipsis", max_width=width // 3 - _GAP)
        for name in header[block]:
            table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
        for row in rows:
            if any(row[block]):
                table.add_row(row[0], *row[block])
        console.print()
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
