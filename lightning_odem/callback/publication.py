"""What a user sees of a merge: a report, numbers in the loggers and one line."""

import math

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_odem.metrics import ACCURACY
from lightning_odem.report import StreamReport
from lightning_odem.report.conclusions import worse_than_expected
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
        summary = {acc: report.acc(), "BWT": report.bwt()}
        parts += [f"{name} {metric.text(value)}{unit}" for name, value in summary.items() if math.isfinite(value)]
    else:
        parts.append("no ACC and BWT of unlike metrics")
    where = f". Merged weights: {record.checkpoint} (ModelCheckpoint's files hold unmerged ones)"
    return ", ".join(parts) + (where if record.checkpoint else "")
