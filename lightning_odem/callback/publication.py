"""What a user sees of a merge: a report, numbers in the loggers and one line."""

import math

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.report import StreamReport
from lightning_odem.report.plain import plain
from lightning_odem.report.scalars import latest_scalars
from lightning_odem.stream.directory import RunDirectory


def publish(trainer: L.Trainer, directory: RunDirectory, report: StreamReport) -> None:
    """Show the last merge of a stream; the step of the loggers is the number of its task."""
    directory.save_report(trainer, report)
    scalars = latest_scalars(report)
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=len(report.tasks))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
    rank_zero_info(_summary(report))
    if doubts := worse_than_expected(report):
        rank_zero_warn(f"After task {plain(report.tasks[-1])}: {'; '.join(doubts)}.")


def worse_than_expected(report: StreamReport) -> list[str]:
    """What the numbers of the last merge say against it, in words; empty if nothing.

    Named are tasks on which the merged model is worse than the pretrained one, and a fine-tuning that made its own task
    worse.

    Example:
        >>> from lightning_odem.report import MergeRecord
        >>> measured = {"weight": 1.0, "accuracy": [0.5], "pretrained": 0.625, "fine_tuned": 0.75}
        >>> report = StreamReport().with_merge(MergeRecord("a", 1.0, "ode"), before_training=0.25, **measured)
        >>> worse_than_expected(report)
        ['the merged model is worse than the pretrained one on a (50.0 % instead of 62.5 %)']
    """
    found = []
    metric = report.metric_of(report.tasks[-1])
    if _is_worse(report.fine_tuned[-1], report.pretrained[-1], metric):
        scores = _instead(report.fine_tuned[-1], report.pretrained[-1], metric)
        found.append(f"fine-tuning made its own task worse than the pretrained model is on it ({scores})")
    triples = zip(report.tasks, report.accuracy[-1], report.pretrained, strict=True)
    worse = [
        f"{plain(task)} ({_instead(score, before, report.metric_of(task))})"
        for task, score, before in triples
        if _is_worse(score, before, report.metric_of(task))
    ]
    if worse:
        more = f" and {len(worse) - 3} tasks more" if len(worse) > 3 else ""
        found.append(f"the merged model is worse than the pretrained one on {', '.join(worse[:3])}{more}")
    return found


def _is_worse(score: float, before: float, metric: TaskMetric) -> bool:
    return score < before if metric.higher_is_better else score > before


def _instead(score: float, before: float, metric: TaskMetric) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.text(score)}{unit} instead of {metric.text(before)}{unit}"


def _summary(report: StreamReport) -> str:
    record = report.merges[-1]
    parts = [
        f"Merged task {len(report.tasks)} ({plain(record.task)}) at t = {record.t:.3g} in {record.merge_seconds:.1f} s"
    ]
    if record.path:
        parts.append(f"loss {record.loss_before:.4g} -> {record.loss_after:.4g} (incoming {record.loss_incoming:.4g})")
    if scale := record.path.get("scale_taken"):
        parts.append(f"scale {scale[0]:.3g}" if scale[0] else "the running average")
    if pieces := record.path.get("descent_taken"):
        parts.append(f"{pieces[0]:.0f} of {len(record.path['descent_loss']) - 1} pieces of descent")
    if record.discarded > 0.0:
        parts.append(f"{record.discarded:.1%} of the adapters' updates cut to keep their rank")
    if metric := report.metric():
        acc = "ACC" if metric == ACCURACY else f"ACC ({metric.name})"
        unit = f" {metric.unit}" if metric.unit else ""
        means = report.summaries()
        summary = {acc: means["acc"][-1], "BWT": means["bwt"][-1]}
        parts += [f"{name} {metric.text(value)}{unit}" for name, value in summary.items() if math.isfinite(value)]
    else:
        parts.append("no ACC and BWT of unlike metrics")
    where = f". Merged weights: {record.checkpoint} (ModelCheckpoint's files hold unmerged ones)"
    return ", ".join(parts) + (where if record.checkpoint else "")
