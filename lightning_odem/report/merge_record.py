"""What is known about one merge, or one removal, as plain data."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


@dataclass
class MergeRecord:
    """One merge: what was requested, what the path did, what it cost.

    Args:
        task: Name of the task whose fine-tuned model came in.
        t: Operating time in [0, 1]; 1 for the first task of a stream (eq. 18 of the paper).
        method: Registered name of the merge method.
        path: Lists for the recorded path by name, as :class:`~lightning_odem.flow.Trajectory` describes them; empty
            for methods that follow no path and for the first task. Some methods add further lists.
        steps: Steps of the path.
        loss_before: Calibration loss of the merged model before this merge; NaN if never measured.
        loss_after: Calibration loss of the merged model after it.
        loss_incoming: Calibration loss of the incoming model.
        barrier: Largest excess of the path's loss over the chord between its endpoints' losses (Def. 3.2).
        envelope_excess: By how much the path exceeded the bound of Theorem 3.4; 0 if the bound held.
        estimated: Whether the path's losses between its ends are those of minibatches. Then barrier and envelope excess
            are those of the ends.
        gradient_evaluations: Gradients taken on calibration samples.
        loss_evaluations: Passes over calibration samples without a gradient.
        sample_gradients: Samples that went through a pass with gradient, the task's own data included.
        gradient_seconds: Wall time inside those evaluations.
        merge_seconds: Wall time of the merge, without measuring accuracies.
        evaluation_seconds: Wall time of measuring the fine-tuned model on its task, and the merged one on all that were
            due.
        calibration: Samples kept per task during this merge; empty if it is not one of the last 20.
        checkpoint: Path of the checkpoint with the merged weights; None if none was written, or it was removed because
            only the last few are kept.
        discarded: Part of the adapters' updates that was cut to keep their rank, relative to the norm of the updates;
            NaN without adapters.
        further: Further values of the tasks' metrics after the merge, besides their scores, by task and name.
        epoch: Epoch of the training, counted from 0, whose weights were merged; None for its end.
    """

    task: str
    t: float
    method: str
    path: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    loss_before: float = math.nan
    loss_after: float = math.nan
    loss_incoming: float = math.nan
    barrier: float = 0.0
    envelope_excess: float = 0.0
    estimated: bool = False
    gradient_evaluations: int = 0
    loss_evaluations: int = 0
    sample_gradients: int = 0
    gradient_seconds: float = 0.0
    merge_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    calibration: dict[str, int] = field(default_factory=dict)
    checkpoint: str | None = None
    discarded: float = math.nan
    further: dict[str, dict[str, float]] = field(default_factory=dict)
    epoch: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain containers of its own."""
        return {
            **vars(self),
            "path": {name: list(values) for name, values in self.path.items()},
            "calibration": dict(self.calibration),
            "further": {task: dict(values) for task, values in self.further.items()},
        }

    def stored(self) -> dict[str, Any]:
        """:meth:`as_dict` without what has its default value."""
        return {name: value for name, value in self.as_dict().items() if not _is_default(name, value)}


_DEFAULTS = {entry.name: entry.default for entry in fields(MergeRecord)}


def _is_default(name: str, value: Any) -> bool:
    default = {} if _DEFAULTS[name] is MISSING and isinstance(value, dict) else _DEFAULTS[name]
    return value == default or (isinstance(value, float) and math.isnan(value))


@dataclass
class RemovalRecord:
    """One task that was taken out of a stream again.

    Args:
        task: Its name.
        weight: The utility weight that it had.
        measured_with: Tasks of the stream that were merged after it. The measurements after their merges belong to
            models that contained the removed task.
    """

    task: str
    weight: float
    measured_with: list[str]
