"""The stream of tasks that are merged: its state, one merge as a transaction, its scores, and its directory."""

import warnings
from typing import Any

from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.stream import Stream

__all__ = ["RunDirectory", "Stream", "StreamState"]


def __getattr__(name: str) -> Any:
    # Until version 0.5 the tasks were here, and configurations name their classes; to be removed with version 1.0.
    from lightning_odem import tasks

    if name not in tasks.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"lightning_odem.stream.{name} is now lightning_odem.tasks.{name}; the old path goes with version 1.0."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(tasks, name)
