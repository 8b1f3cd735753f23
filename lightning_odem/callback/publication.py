"""What a user sees of a merge: a report, numbers and figures in the loggers, and one line."""

import math
import re
from pathlib import Path
from urllib.parse import urlparse

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image

from lightning_odem.metrics import ACCURACY
from lightning_odem.report import StreamReport
from lightning_odem.report.conclusions import worse_than_expected
from lightning_odem.report.plain import plain
from lightning_odem.report.scalars import latest_scalars
from lightning_odem.stream.directory import RunDirectory


def publish(trainer: L.Trainer, directory: RunDirectory, report: StreamReport) -> None:
    """Show the last merge of a stream; the step of the loggers is the number of its task."""
    files = directory.save_report(trainer, report)
    scalars = latest_scalars(report)
    for logger in trainer.loggers:
        logger.log_metrics(_names_for(logger, scalars), step=len(report.tasks))
        for file in files:
            if file.suffix == ".png":
                log_figure(logger, file, step=len(report.tasks))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
    rank_zero_info(_summary(report, has_others=trainer.checkpoint_callback is not None))
    if doubts := worse_than_expected(report):
        rank_zero_warn(f"After task {plain(report.tasks[-1])}: {'; '.join(doubts)}.")


def _names_for(logger: Logger, scalars: dict[str, float]) -> dict[str, float]:
    """The scalars under names that a logger accepts."""
    if not isinstance(logger, MLFlowLogger):
        return scalars
    named = {re.sub(r"[^\w.\- :/]|(?<=/)\.*(?=/|$)", "_", name): value for name, value in scalars.items()}
    if urlparse(logger.experiment.tracking_uri).scheme not in ("", "file"):
        return named
    # MLflow's file store has a file for each name, which cannot be the folder of other names too.
    folders = {name for name in named for other in named if other.startswith(f"{name}/")}
    return {f"{name}.mean" if name in folders else name: value for name, value in named.items()}


def log_figure(logger: Logger, file: Path, step: int) -> None:
    """Give a figure to a logger that takes images: TensorBoard, MLflow, or one with W&B's ``log_image``.

    The figures of all merges have one name, ``merge/path``, and differ in their step.
    """
    name = f"merge/{file.stem.partition('-')[0]}"
    if isinstance(logger, TensorBoardLogger):
        with Image.open(file) as image:
            logger.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        # An artifact has no step: the folder tells it.
        logger.experiment.log_artifact(logger.run_id, str(file), f"merge/{step:02d}")
    elif callable(log_image := getattr(logger, "log_image", None)):
        log_image(key=name, images=[str(file)], step=step)


def _summary(report: StreamReport, has_others: bool) -> str:
    record = report.merges[-1]
    parts = [
        f"Merged task {len(report.tasks)} ({plain(record.task)}) at t = {record.t:.3g} in {record.merge_seconds:.1f} s"
    ]
    if record.evaluation_seconds:
        parts.append(f"measured in {record.evaluation_seconds:.1f} s")
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
    others = " (ModelCheckpoint's files hold unmerged ones)" if has_others else ""
    return ", ".join(parts) + (f". Merged weights: {record.checkpoint}{others}" if record.checkpoint else "")
