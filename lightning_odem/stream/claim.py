"""What a fit asks of the directory that it takes: it is free or holds the same stream, and there is room."""

import errno
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_odem.parameters.files import make_writable
from lightning_odem.report import StreamReport
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import differences


def make_next_version(root: Path) -> Path:
    """Make the next free directory; two processes at the same time get different ones."""
    make_writable(root)
    while True:
        taken = [int(entry.name[8:]) for entry in root.glob("version_*") if entry.name[8:].isdigit()]
        path = root / f"version_{max(taken, default=-1) + 1}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def check_same_path(trainer: L.Trainer, path: Path) -> None:
    """Check that all processes take the same directory.

    Raises:
        MisconfigurationException: If this one takes another.
    """
    if str(path) != (first := trainer.strategy.broadcast(str(path))):
        raise MisconfigurationException(
            f"Process {trainer.global_rank} has dirpath {path}, process 0 has {first}. Give all processes the same "
            "one, without the time or a number of the process in it."
        )


def is_taken_further(
    path: Path, held: StreamReport, stored: dict[str, Any] | None, state: StreamState, trainer: L.Trainer, resumed: bool
) -> bool:
    """Whether another process has merged more tasks into a directory since the state in memory was read.

    Args:
        path: The directory.
        held: The report of the stream that it holds.
        stored: The state of that stream; None if the directory has a report alone.
        state: The state in memory.
        trainer: The Trainer that fits a task.
        resumed: Whether the state in memory comes from one of Lightning's checkpoints.

    Raises:
        MisconfigurationException: If the directory holds another stream, or if the resumed task is merged already and
            the datamodule does not name its task.
    """
    tasks, known = held.tasks, state.report.tasks
    same = tasks == known and len(held.removed) == len(state.report.removed)
    # The process that wrote the checkpoint may have merged the task that it had begun.
    here = state.dirpath is not None and Path(state.dirpath).absolute() == path
    again = here and tasks == [*known, state.started.get("task")]
    further = not resumed and stored is not None and is_same_stream(stored, state)
    if tasks and not (same or again or further):
        raise other_stream(path, held, state)
    if resumed and again and getattr(trainer.datamodule, "task_name", None) is None:  # type: ignore[attr-defined]
        task = state.started["task"]
        raise MisconfigurationException(
            f"The checkpoint was saved while task {task!r} was trained, and {path} has merged {task!r} already. Fit "
            f"the next task without ckpt_path. To merge {task!r} once more, give its datamodule a task_name, which "
            "says that the data is that of this task."
        )
    return further and not same


def other_stream(path: Path, held: StreamReport, state: StreamState) -> MisconfigurationException:
    """The refusal of a directory that holds another stream."""
    return MisconfigurationException(
        f"{path} holds another stream already (tasks merged there: {', '.join(held.tasks)}; in this stream: "
        f"{', '.join(state.report.tasks) or 'none'}). Choose another dirpath, or move that one away."
    )


def check_room(path: Path, module: nn.Module, state: StreamState) -> None:
    """Refuse to train a task where the disk has no room for what its merge writes.

    That is the merged model twice, in the state and as a checkpoint, and the base model if it is not there yet.

    Raises:
        OSError: With what is free and what is needed.
    """
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    needed = size * (2 if state.report.tasks else 3)
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"The merge of this task writes {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free for {path}. Make "
            "room, or choose another dirpath.",
        )


def is_same_stream(stored: dict[str, Any], state: StreamState) -> bool:
    """Whether a stream that was read is the one in memory, or that one taken further."""
    rows = {**state.rows, **stored.get("rows", {})}  # further rows change with every merge
    known, found = (
        {name: tensor[: rows[name]] if name in rows else tensor for name, tensor in (base or {}).items()}
        for base in (state.base if state.report.tasks else {}, stored["base"])
    )
    # Shards, which processes hold instead of whole tensors, are not compared.
    known = {name: tensor for name, tensor in known.items() if name not in found or tensor.shape == found[name].shape}
    same_base = not differences(known, {name: found[name] for name in known if name in found})
    return same_base and _goes_on(StreamReport.from_dict(stored["report"]), state.report)


def _goes_on(newer: StreamReport, older: StreamReport) -> bool:
    """Whether a stream may continue an older one; tasks that were taken out of it are not compared."""
    removed = {record.task for record in newer.removed}
    known, found = ([task for task in report.tasks if task not in removed] for report in (older, newer))
    return len(newer.removed) >= len(older.removed) and found[: len(known)] == known
