"""All that a stream keeps from one task to the next."""

import operator
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.report.record import StreamReport
from lightning_odem.snapshot import Snapshot, cut_snapshot, whole_snapshot


@dataclass
class StreamState:
    """The state of a stream of tasks; everything else can be derived from it or is the user's.

    Args:
        buffer: Calibration samples of the tasks merged.
        base: Parameters and buffers of the base model but for the task-specific ones, None before the first fit.
        merged: The same of the merged model, None before the first merge.
        task_parameters: What each task keeps for itself: its excluded, trainable parameters as its training left them.
        fixed: Excluded parameters that are frozen, as the heads of all tasks that are probes of the base model.
        report: What was measured.
        method: State of the merge method.
        dirpath: Directory the stream writes to, None until the first fit has chosen it.
        started: The task whose training has begun and is not merged yet: ``task``, ``weight`` and the accuracies
            measured before its training. Empty between tasks.
        random: The random state after the last merge under ``state``, under ``began`` the digest of the one in which
            the stream's first process began, and under ``reseeded`` whether random numbers were drawn or seeds set
            between two tasks. Empty before the first merge.
    """

    buffer: CalibrationBuffer
    base: Snapshot | None = None
    merged: Snapshot | None = None
    task_parameters: dict[str, Snapshot] = field(default_factory=dict)
    fixed: Snapshot = field(default_factory=dict)
    report: StreamReport = field(default_factory=StreamReport)
    method: dict[str, Any] = field(default_factory=dict)
    dirpath: str | None = None
    started: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)

    @property
    def own_names(self) -> set[str]:
        """Names of all parameters that are not merged."""
        return set(self.fixed).union(*self.task_parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only, so that checkpoints load with ``weights_only=True``."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        changing = {
            "started": dict(self.started),
            "buffer": self.buffer.state_dict(),
            "report": self.report.as_dict(),
        }
        return {"version": 1, **plain, **changing}

    def whole(self, module: nn.Module) -> "StreamState":
        """The state with whole tensors in the first process, where several share the parameters of the module."""
        own = {task: whole_snapshot(module, snapshot) for task, snapshot in self.task_parameters.items()}
        base, merged = (snapshot and whole_snapshot(module, snapshot) for snapshot in (self.base, self.merged))
        method = {
            key: whole_snapshot(module, kept) if _is_snapshot(kept) else kept for key, kept in self.method.items()
        }
        return replace(self, base=base, merged=merged, task_parameters=own, method=method)

    def cut(self, module: nn.Module) -> None:
        """Keep this process's shards only, where several share the parameters of the module."""
        self._replace_snapshots(partial(cut_snapshot, module))

    def _replace_snapshots(self, change: Callable[[Snapshot], Snapshot]) -> None:
        self.base, self.merged = (snapshot and change(snapshot) for snapshot in (self.base, self.merged))
        self.fixed = change(self.fixed)
        self.task_parameters = _changed(self.task_parameters, change)
        self.method = _changed(self.method, change)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a :meth:`state_dict`.

        Raises:
            ValueError: If it was written by a newer version of the package.
        """
        if state["version"] != 1:
            raise ValueError(f"The stream's state has version {state['version']}; this package reads version 1.")
        for name in _PLAIN:
            setattr(self, name, {"random": {}, "fixed": {}, **state}[name])  # which older states lack
        self.started = dict(state["started"])
        self.buffer.load_state_dict(state["buffer"])
        self.report = StreamReport.from_dict(deepcopy(state["report"]))


# What is replaced as a whole, never changed in place.
_PLAIN = ("base", "merged", "task_parameters", "fixed", "method", "dirpath", "random")


def _changed(values: dict[str, Any], change: Callable[[Snapshot], Snapshot]) -> dict[str, Any]:
    """The same dict if no snapshot in it has changed: what is saved already is known by its identity."""
    changed = {name: change(value) if _is_snapshot(value) else value for name, value in values.items()}
    return values if all(map(operator.is_, changed.values(), values.values())) else changed


def _is_snapshot(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())
