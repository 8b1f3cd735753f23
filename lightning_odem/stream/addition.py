"""The addition of one merge to a stream of tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.kept_state import copy_containers
from lightning_odem.metrics import TaskMetric
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import Snapshot, take_snapshot
from lightning_odem.report import MergeRecord
from lightning_odem.stream.merging import Merge
from lightning_odem.stream.state import StreamState


@dataclass(frozen=True)
class Addition:
    """A merge that is made but not yet part of its stream.

    Args:
        before: The stream's state before the merge; it is not changed.
        method: The merge method, which has the state after the merge.
        division: Tells which parameters are merged.
        merge: The merge.
        task: Name of the task.
        weight: Its utility weight.
        own: The parameters that the task keeps for itself.
        buffer: Calibration samples of all tasks; None if the merge had none.
        names: Names of the merged tensors, see :func:`~lightning_odem.stream.identity.merged_names`.
        fingerprint: Fingerprint of the incoming model, or None.
    """

    before: StreamState
    method: MergeMethod
    division: Division
    merge: Merge
    task: str
    weight: float
    own: Snapshot
    buffer: CalibrationBuffer | None
    names: dict[str, list[str]]
    fingerprint: str | None

    @property
    def record(self) -> MergeRecord:
        """The record of the merge."""
        return self.merge.record

    @property
    def task_parameters(self) -> dict[str, Snapshot]:
        """The parameters that each task keeps for itself, this one included."""
        return {**self.before.task_parameters, self.task: self.own}

    def state(
        self,
        *,
        accuracy: list[float],
        metrics: Mapping[str, TaskMetric] = {},
        pretrained: float = math.nan,
        fine_tuned: float = math.nan,
        before_training: float = math.nan,
    ) -> StreamState:
        """The stream's state with this merge and its scores; called within the transaction.

        Args:
            accuracy: Score on every task, this one last; NaN if it was not measured.
            metrics: The metric of each task whose score is not accuracy.
            pretrained: Score of the base model on the task.
            fine_tuned: Score of the incoming model on the task.
            before_training: Score of the merged model on the task before its training.
        """
        state, module = self.before, self.merge.module
        known = {self.task: self.fingerprint} if self.fingerprint else {}
        return replace(
            state,
            merged=self.merge.snapshot(self.division.shared(module)),
            task_parameters=self.task_parameters,
            fixed=_unless_same(state.fixed, take_snapshot(module, self.division.fixed(module))),
            method=copy_containers(self.method.state_dict()),
            buffer=self.buffer or state.buffer,
            report=state.report.with_merge(
                self.record,
                weight=self.weight,
                accuracy=accuracy,
                metrics=metrics,
                pretrained=pretrained,
                fine_tuned=fine_tuned,
                before_training=before_training,
            ),
            started={},
            names=self.names,
            layout=self.merge.layout,
            measured={**state.measured, **self.merge.measured},
            settings=describe_method(self.method),
            fingerprints={**state.fingerprints, **known},
            adapters={**state.adapters, **{name: pair.plain() for name, pair in self.merge.pairs.items()}},
        )


def _unless_same(before: Snapshot, now: Snapshot) -> Snapshot:
    """The snapshot before if nothing has changed, since that object is on disk already."""
    same = before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in now)
    return before if same else now
