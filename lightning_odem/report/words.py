"""What happened in a stream, in a few sentences."""

import math
from pathlib import Path

from lightning_odem.report.plain import plain
from lightning_odem.report.record import StreamReport


def in_words(report: StreamReport, dirpath: Path | None = None) -> str:
    """What the merged model can do, beside the base model and the fine-tuned ones, and what it has forgotten.

    It is told if tasks share a metric and all were measured after the last merge; otherwise only the files are named.

    Args:
        report: A stream's report.
        dirpath: The stream's directory, if it has one.

    Returns:
        Lines of text; none if there is nothing to tell.
    """
    lines = []
    metric = report.metric()
    if report.accuracy and metric is not None and not math.isnan(report.acc()):
        pretrained, fine_tuned = map(report.weighted_accuracy, (report.pretrained, report.fine_tuned))
        count = len(report.tasks)
        unit = f" {metric.unit}" if metric.unit else ""
        merged, base, own = (f"{metric.text(score)}{unit}" for score in (report.acc(), pretrained, fine_tuned))
        remark = "" if metric.higher_is_better else " (lower is better)"
        lines += [
            f"Mean {metric.name}{remark} on {count} {'tasks' if count > 1 else 'task'}: {merged} by the one merged "
            f"model, {base} by the base model, {own} by each task's own fine-tuned model.",
            *_forgotten(report),
        ]
    if dirpath is not None:
        lines += [
            f"Merged weights: {dirpath / 'merged-*.ckpt'}",
            f"Everything on one page, to open in a browser: {dirpath / 'report.html'}",
            "Beside it: table.txt, report.json, accuracy_matrix.png and other figures",
        ]
    return "\n".join(lines)


def _forgotten(report: StreamReport) -> list[str]:
    """The task that has lost most since it was merged, if one has lost anything."""
    metric = report.metric()
    sign = 1.0 if metric is None or metric.higher_is_better else -1.0
    changes = {
        task: sign * (report.accuracy[-1][number] - report.accuracy[number][number])
        for number, task in enumerate(report.tasks[:-1])
    }
    changes = {task: change for task, change in changes.items() if not math.isnan(change)}
    if metric is None or not changes:
        return []
    task = min(changes, key=changes.__getitem__)
    number = report.tasks.index(task)
    first, last = (metric.text(report.accuracy[row][number]) for row in (number, -1))
    bwt = metric.text(report.bwt())
    if changes[task] >= 0:
        return ["No task has lost anything since it was merged."]
    return [f"Most was forgotten of {plain(task)}: {first} when it was merged, {last} now (BWT {bwt})."]
