"""All that a stream keeps from one task to the next."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.report.record import StreamReport
from lightning_odem.snapshot import Snapshot


@dataclass
class StreamState:
    """The state of a stream of tasks; everything else can be derived from it or is the user's.

    Args:
        buffer: Calibration samples of the tasks merged.
        base: Parameters and buffers of the base model but for the task-specific ones, None before the first fit.
        merged: The same of the merged model, None before the first merge.
        task_parameters: What each task keeps for itself: its excluded, trainable parameters as its training left them.
        report: What was measured.
        method: State of the merge method.
        dirpath: Directory the stream writes to, None until the first fit has chosen it.
        started: The task whose training has begun and is not merged yet: ``task``, ``weight`` and the accuracies
            measured before its training. Empty between tasks.
    """

    buffer: CalibrationBuffer
    base: Snapshot | None = None
    merged: Snapshot | None = None
    task_parameters: dict[str, Snapshot] = field(default_factory=dict)
    report: StreamReport = field(default_factory=StreamReport)
    method: dict[str, Any] = field(default_factory=dict)
    dirpath: str | None = None
    started: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only, so that checkpoints load with ``weights_only=True``."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        changing = {
            "started": dict(self.started),
            "buffer": self.buffer.state_dict(),
            "report": self.report.as_dict(),
        }
        return {"version": 1, **plain, **changing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a :meth:`state_dict`.

        Raises:
            ValueError: If it was written by a newer version of the package.
        """
        if state["version"] != 1:
            raise ValueError(f"The stream's state has version {state['version']}; this package reads version 1.")
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.started = dict(state["started"])
        self.buffer.load_state_dict(state["buffer"])
        self.report = StreamReport.from_dict(deepcopy(state["report"]))


# What is replaced as a whole, never changed in place.
_PLAIN = ("base", "merged", "task_parameters", "method", "dirpath")
