"""The merged weights of a stream as files that Lightning loads."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_odem.parameters.frozen_base import FROZEN, Digests, without_frozen
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import weights_checkpoint
from lightning_odem.report import StreamReport
from lightning_odem.stream.naming import file_name


def save_merged(trainer: L.Trainer, directory: Path, number: int, task: str, frozen: Digests | None = None) -> Path:
    """Save a Trainer's module as ``merged-<number>-<task>.ckpt``, without the optimizer's state; by all processes.

    Args:
        trainer: The Trainer; its module is the merged model.
        directory: Where.
        number: Number of the task, from 1.
        task: Name of the task.
        frozen: Fingerprints of the frozen base under adapters. The file has these instead of the base.

    Returns:
        The path of the file.
    """
    path = directory / f"merged-{number:02d}-{file_name(task)}.ckpt"
    checkpoint = weights_checkpoint(trainer)
    if frozen:
        checkpoint["state_dict"] = without_frozen(trainer.lightning_module, checkpoint["state_dict"], frozen)
        checkpoint[FROZEN] = dict(frozen)
    with Processes.current().together():
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
    return path


def remove_unnamed(directory: Path, named: StreamReport, kept: StreamReport) -> None:
    """Remove files that a report has named and another one does not name any more.

    Args:
        directory: The directory of the stream; files elsewhere stay.
        named: The report that has named them.
        kept: The report that names those to keep.
    """
    before, now = ({record.checkpoint for record in report.merges} for report in (named, kept))
    for name in {Path(path).name for path in before - now if path} - {Path(path).name for path in now if path}:
        try:
            (directory / name).unlink(missing_ok=True)
        except OSError as error:
            rank_zero_warn(f"An old checkpoint could not be removed: {error}.")
