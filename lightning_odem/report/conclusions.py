"""What the numbers say for and against the merges of a stream, in words."""

import math
from pathlib import Path

from lightning_odem.metrics import ACCURACY, TaskMetric
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
            *_most_forgotten(report, metric),
        ]
    if dirpath is not None:
        lines += [
            f"Merged weights: {dirpath / 'merged-*.ckpt'}",
            f"Everything on one page, to open in a browser: {dirpath / 'report.html'}",
            "Beside it: table.txt, report.json, accuracy_matrix.png and other figures",
        ]
    return "\n".join(lines)


def conclude(report: StreamReport) -> str:
    """How many tasks are merged, how well, and which one was forgotten most.

    A task is compared with its score after its own merge.

    Args:
        report: A report of at least one merge.

    Example:
        >>> from lightning_odem.report import MergeRecord
        >>> merges = [MergeRecord("mnist", 1.0, "ode"), MergeRecord("svhn", 0.5, "ode")]
        >>> print(conclude(StreamReport(["mnist", "svhn"], [1.0, 1.0], [[0.75], [0.5, 0.625]], merges=merges)))
        2 tasks are merged. ACC 56.2 %, BWT -25.0 %. Forgotten most: mnist (50.0 % instead of 75.0 %).
    """
    count, metric = len(report.tasks), report.metric()
    parts = [f"{count} tasks are merged." if count > 1 else "1 task is merged."]
    if metric is not None:
        name = "ACC" if metric == ACCURACY else f"ACC ({metric.label})"
        unit = f" {metric.unit}" if metric.unit else ""
        means = {name: report.acc(), "BWT": report.bwt()}
        told = [f"{name} {metric.text(mean)}{unit}" for name, mean in means.items() if math.isfinite(mean)]
        parts.append(f"{', '.join(told) or 'ACC was not measured'}.")
    else:
        parts.append("Their metrics differ, so there is no ACC.")
    if forgotten := _forgotten(report):
        parts.append(f"Forgotten most: {forgotten}." if metric is not None else f"Forgotten: {forgotten}.")
    elif count > 1:
        parts.append("No task that was measured is worse than after its own merge.")
    return " ".join(parts)


def _most_forgotten(report: StreamReport, metric: TaskMetric) -> list[str]:
    """The task that has lost most since its own merge, in a sentence; none for a stream of one task."""
    if losses := _losses(report):
        task = max(losses, key=lambda task: abs(losses[task][1] - losses[task][0]))
        first, last = map(metric.text, losses[task])
        bwt = metric.text(report.bwt())
        return [f"Most was forgotten of {plain(task)}: {first} when it was merged, {last} now (BWT {bwt})."]
    return ["No task has lost anything since it was merged."] if len(report.tasks) > 1 else []


def _forgotten(report: StreamReport) -> str:
    """The task that has lost most since its own merge; all of them if their scores are not comparable."""
    losses = {
        f"{plain(task)} ({instead(last, first, report.metric_of(task))})": abs(last - first)
        for task, (first, last) in _losses(report).items()
    }
    if report.metric() is None:
        return ", ".join(losses)
    return max(losses, key=losses.__getitem__, default="")


def _losses(report: StreamReport) -> dict[str, tuple[float, float]]:
    """First and last score of each task that is worse now than when it was first measured."""
    found = {}
    for index, task in enumerate(report.tasks):
        column = [score for row in report.accuracy[index:] if not math.isnan(score := row[index])]
        if column and _is_worse(column[-1], column[0], report.metric_of(task)):
            found[task] = column[0], column[-1]
    return found


def worse_than_expected(report: StreamReport, merge: int = -1) -> list[str]:
    """What the numbers of a merge say against it, in words; empty if nothing.

    Named are tasks on which the merged model is worse than the pretrained one, and a fine-tuning that made its own task
    worse.

    Args:
        report: A report of at least one merge.
        merge: 0-based index of the merge, the last one by default.

    Example:
        >>> from lightning_odem.report import MergeRecord
        >>> measured = {"weight": 1.0, "accuracy": [0.5], "pretrained": 0.625, "fine_tuned": 0.75}
        >>> report = StreamReport().with_merge(MergeRecord("a", 1.0, "ode"), before_training=0.25, **measured)
        >>> worse_than_expected(report)
        ['the merged model is worse than the pretrained one on a (50.0 % instead of 62.5 %)']
    """
    found = []
    metric = report.metric_of(report.tasks[merge])
    if _is_worse(report.fine_tuned[merge], report.pretrained[merge], metric):
        scores = instead(report.fine_tuned[merge], report.pretrained[merge], metric)
        found.append(f"fine-tuning made its own task worse than the pretrained model is on it ({scores})")
    triples = zip(report.tasks, report.accuracy[merge], report.pretrained, strict=False)  # rows are ragged
    worse = [
        f"{plain(task)} ({instead(score, before, report.metric_of(task))})"
        for task, score, before in triples
        if _is_worse(score, before, report.metric_of(task))
    ]
    if worse:
        more = f" and {len(worse) - 3} tasks more" if len(worse) > 3 else ""
        found.append(f"the merged model is worse than the pretrained one on {', '.join(worse[:3])}{more}")
    return found


def _is_worse(score: float, before: float, metric: TaskMetric) -> bool:
    return score < before if metric.higher_is_better else score > before


def instead(score: float, before: float, metric: TaskMetric) -> str:
    """Two scores as "50.0 % instead of 62.5 %"."""
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.text(score)}{unit} instead of {metric.text(before)}{unit}"
