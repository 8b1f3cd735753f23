"""The name and the utility weight of the task that a Trainer is about to fit."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_odem.arguments import shown

LONGEST = 73
"""Length to which a task's name is cut in the name of a file; file systems allow 255 letters in all."""

Weights = Mapping[str, float] | Sequence[float] | None


def next_task_name(datamodule: Any, tasks: Sequence[str], default: str | None = None) -> str:
    """The datamodule's ``task_name``, else ``default``, else ``task_<number>``.

    Raises:
        ValueError: If a task of that name is merged already, or no file can hold the name.

    Example:
        >>> next_task_name(None, ["task_1"])
        'task_2'
    """
    name = str(getattr(datamodule, "task_name", default or f"task_{len(tasks) + 1}"))
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The task name {name!a} has letters that cannot be written to a file: {error}.") from error
    if name in tasks:
        raise ValueError(
            f"Task {name!r} has been merged already, as task {list(tasks).index(name) + 1} of {len(tasks)}. Give each "
            "task's datamodule a task_name of its own, or start a new stream with a new ContinualMergeCallback."
        )
    return name


def next_task_weight(
    weights: Weights, datamodule: Any, tasks: Sequence[str], name: str, removed: Sequence[str] = ()
) -> float:
    """The utility weight of a task.

    It is looked up in ``weights`` by name or position. Without these it is the datamodule's ``task_weight``, else 1.

    Raises:
        ValueError: If there are weights but none for this task, or weights by position and a task was taken out.

    Example:
        >>> next_task_weight({"digits": 2.0}, None, [], "digits"), next_task_weight([1.0, 3.0], None, ["a"], "b")
        (2.0, 3.0)
    """
    if weights is None:
        return _number(getattr(datamodule, "task_weight", 1.0), name)
    if isinstance(weights, Mapping):
        if name not in weights:
            raise ValueError(f"No weight for task {name!r}; weights are given for {', '.join(weights)}.")
        return _number(weights[name], name)
    if removed:
        raise ValueError(
            f"Tasks were taken out of the stream ({', '.join(removed)}), so the position of {name!r} does not tell "
            "which of the weights is its own. Give weights by name."
        )
    if len(tasks) >= len(weights):
        raise ValueError(f"No weight for task {len(tasks) + 1} ({name!r}); {len(weights)} weights are given.")
    return _number(weights[len(tasks)], name)


def _number(weight: Any, task: str) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"The utility weight of task {task!r} must be a number, got {shown(weight)}.") from error


def file_name(task: str) -> str:
    """A task's name as part of the name of a file; a long one is cut and ends with a hash.

    Example:
        >>> file_name("cats & dogs/2"), file_name(250 * "x")[60:]
        ('cats_dogs_2', 'xxxx-086d4a1c')
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", task)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(task.encode(errors='replace')).hexdigest()[:8]}"
