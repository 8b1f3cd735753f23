"""The merged weights of a stream as files that Lightning loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_odem.parameters.files import replacing
from lightning_odem.parameters.frozen_base import FROZEN, Digests, without_frozen
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import weights_checkpoint
from lightning_odem.parameters.vector import canonical_name
from lightning_odem.parameters.weights_file import read_file
from lightning_odem.report import StreamReport
from lightning_odem.stream.naming import file_name
from lightning_odem.stream.state import StreamState


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


def rewrite_merged(path: Path, before: StreamState, state: StreamState, what: str) -> str | None:
    """Write the last checkpoint of a stream again, with the merged weights of another state and its last task's own.

    If that fails there is only a warning, since the weights are in the state as well.

    Args:
        path: Where; the last checkpoint lies beside it.
        before: The state that names the last checkpoint.
        state: The other state.
        what: What distinguishes it, for the warning.

    Returns:
        The path, or None if there is no checkpoint.
    """
    template = before.report.merges[-1].checkpoint
    if template is None:
        return None
    try:
        content = read_file(path.with_name(Path(template).name))
        content["state_dict"] = _replaced(content["state_dict"], before, state)
        with replacing(path) as draft:
            torch.save(content, draft)
    except (OSError, ValueError) as error:
        rank_zero_warn(
            f"No checkpoint of the merged weights {what} was written: {error} load_task of the callback writes them "
            "into a module."
        )
        return None
    return str(path)


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


def _replaced(saved: Mapping[str, Any], before: StreamState, state: StreamState) -> dict[str, Any]:
    """A module's state dict with the merged weights of a stream and the own parameters of its last task."""
    last = state.task_parameters.get(state.report.tasks[-1], {})
    known = {**state.fixed, **last, **(state.merged or {})}
    # Tied tensors share memory; the stream has them under one name.
    tied = {
        _place(value): known[canonical_name(name)] for name, value in saved.items() if canonical_name(name) in known
    }
    replaced = {}
    for name, value in saved.items():
        new = known.get(canonical_name(name), tied.get(_place(value)))
        if new is None and canonical_name(name) not in before.own_names and _is_floating(value):
            raise ValueError(f"{name} of the last checkpoint is not in the stream.")
        replaced[name] = value if new is None else new.to(value.dtype)
    there = set(map(canonical_name, saved))
    return {**replaced, **{name: tensor for name, tensor in last.items() if name not in there}}


def _place(value: Any) -> Any:
    """The place of a tensor in memory; any other object is its own place."""
    return (value.data_ptr(), value.shape) if isinstance(value, Tensor) else id(value)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
