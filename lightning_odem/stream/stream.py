"""The stream: what merges one more model."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.calibration.prediction_loss import calibration_loss
from lightning_odem.calibration.scaling import loss_scale
from lightning_odem.calibration.source import draw_by_index
from lightning_odem.flow import operating_time
from lightning_odem.methods import MergeMethod, resolve_method
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.kept_state import copy_containers
from lightning_odem.metrics import TaskMetric
from lightning_odem.parameters.adapters import Adapters
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.frozen_base import check_frozen_base, frozen_base
from lightning_odem.parameters.low_rank import FactorPair
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot
from lightning_odem.parameters.task_parameters import own_parameters
from lightning_odem.parameters.vector import canonical_name
from lightning_odem.report import MergeRecord
from lightning_odem.stream.merging import Merge, merging
from lightning_odem.stream.removal import fingerprint_to_keep, names_to_keep
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.trace import TrainingTrace


class Stream:
    """Merges models into one, one after the other: the same for callback, comparisons, studies and merges of files.

    The stream holds the base model, the merged model, the calibration samples, what tasks keep for themselves, the
    method's state and the report. An incoming model is there only while it is merged.

    Args:
        method: A merge method or its name. The method is taken to where the stream is before each merge, so one
            instance may serve several streams in turn.
        base: Parameters and buffers of the base model by name, for methods that need it.
        calibration_size: Samples kept of all tasks together.
        exclude: Patterns of parameters that are not merged, besides the module's ``task_specific``.
        batch_norm: Policy for running statistics, see :class:`~lightning_odem.calibration.BatchNormStatistics`.
        calibration: Further settings of the calibration.

    Attributes:
        state: All that the stream keeps, a :class:`~lightning_odem.stream.state.StreamState`. A merge replaces it.
        division: Which parameters are merged.

    Example:
        >>> stream = Stream("average")
        >>> for task, value in {"a": 0.0, "b": 3.0, "c": 6.0}.items():
        ...     record = stream.merge(nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[value]])}, task)
        >>> stream.state.merged["weight"], record.t
        (tensor([[3.]]), 0.3333333333333333)
    """

    def __init__(
        self,
        method: MergeMethod | str,
        *,
        base: Snapshot | None = None,
        calibration_size: int = 1024,
        exclude: tuple[str, ...] = (),
        batch_norm: str = "average",
        calibration: CalibrationOptions = CalibrationOptions(),
    ) -> None:
        self.method = resolve_method(method)
        self.division = Division(exclude, self._frozen_names)
        self.batch_norm = batch_norm
        self.calibration = calibration
        self.state = StreamState(calibration.buffer(calibration_size), base=base)

    @property
    def needs_samples(self) -> bool:
        """Whether a merge looks at calibration samples."""
        return any(need.from_samples for need in self.method.needs) or self.batch_norm == "recalibrate"

    def check(self, module: nn.Module) -> None:
        """Refuse, before any training, a module that could not be merged after it.

        Raises:
            ValueError: As :meth:`~lightning_odem.parameters.Division.check`; if an adapter has another scale than in
                the merged model; or if the frozen base of a model with adapters is another one.
        """
        self.division.check(module)
        self.check_fixed(module)
        pairs = Adapters(module, self.division.patterns(module)).pairs
        known = self.state.merged or {}
        new = [name for name, pair in pairs.items() if {name, pair.second} <= known.keys() - self.state.adapters.keys()]
        if new and self.state.method:
            rank_zero_warn(
                f"{new[0]} and its partner were merged one by one so far, and will be by their product. Sums of the "
                "single factors are of no use for that: the merged model counts as one task from here on."
            )
            self.state.method = {}

    def check_fixed(self, module: nn.Module) -> None:
        """Check what the state's adapters rely on: their scales, and the frozen base under them.

        Raises:
            ValueError: If the module has others.
        """
        known = {name: FactorPair(*plain) for name, plain in self.state.adapters.items()}
        found = Adapters(module, self.division.patterns(module)).pairs if known else {}
        for name in found.keys() & known.keys():
            if found[name] != known[name]:
                raise ValueError(
                    f"The update of {name} is {found[name].scale:g} times the product of its factors, and was "
                    f"{known[name].scale:g} times it in the merges before. Use the same alpha and r as there."
                )
        check_frozen_base(module, self.state.frozen)

    def begin(self, module: nn.Module) -> None:
        """Take a module's weights as the base model; of a model with adapters, the frozen ones by fingerprint."""
        self.state.frozen = frozen_base(module, self.division.patterns(module))
        self.state.base = take_snapshot(module, self.division.shared(module))

    def thaw(self, module: nn.Module) -> None:
        """Take into the base and the merged model what was frozen so far and is trained from now on."""
        state, frozen = self.state, self.state.frozen
        trained = {canonical_name(name) for name, tensor in module.named_parameters() if tensor.requires_grad}
        new = take_snapshot(module, lambda name: name in frozen and name in trained)
        if new:
            state.frozen = {name: digest for name, digest in frozen.items() if name not in new}
            state.base = {**(state.base or {}), **new}
            state.merged = None if state.merged is None else {**state.merged, **new}
            state.fingerprints = {}  # those known are of the other tensors alone

    def _frozen_names(self) -> dict[str, str]:
        return self.state.frozen

    def load_method(self) -> None:
        """Take the method to where the stream is."""
        self.method.load_state_dict(copy_containers(self.state.method))

    def merge(
        self,
        module: nn.Module,
        incoming: Snapshot,
        task: str,
        weight: float = 1.0,
        samples: Any = None,
        trace: TrainingTrace = TrainingTrace(),
        on_step: Callable[[int, int], None] | None = None,
    ) -> MergeRecord:
        """Merge the next model; if that fails, the stream is what it was. Nothing is measured.

        Args:
            module: A module of the model's architecture, with the task's own parameters; the other weights do not
                matter. Afterwards it is the merged model. Methods that measure a loss need a LightningModule attached
                to a Trainer.
            incoming: Parameters and buffers of the incoming model by name.
            task: Name of its task.
            weight: Utility weight.
            samples: Samples of the task for the calibration buffer, first dimension their number, on the CPU; with
                labels if the calibration loss reads them.
            trace: What the incoming model's training left behind.
            on_step: Told (steps done, steps in all).

        Raises:
            ValueError: If names or shapes differ, or the method needs what was not given.
        """
        load_snapshot(module, incoming, self.division.shared(module))
        buffer = self.buffer_with(task, samples, weight)
        with self.merging(module, task, weight, buffer=buffer, trace=trace, on_step=on_step) as addition:
            state = addition.state(accuracy=[math.nan] * (len(self.state.report.tasks) + 1))
        self.state = state
        return addition.record

    @contextmanager
    def merging(
        self,
        module: nn.Module,
        task: str,
        weight: float,
        *,
        buffer: CalibrationBuffer | None = None,
        trace: TrainingTrace = TrainingTrace(),
        on_step: Callable[[int, int], None] | None = None,
        fingerprint: bool = False,
    ) -> Iterator["Addition"]:
        """Merge the module's weights, as a transaction, see :func:`~lightning_odem.stream.merging.merging`.

        The stream itself stays as it is: who merges gives it the addition's state when all is well.

        Args:
            module: Holds the incoming model, and the merged one within the block.
            task: Name of its task.
            weight: Utility weight.
            buffer: Calibration samples of all tasks, this one included, see :meth:`buffer_with`.
            trace: What the training left behind.
            on_step: Told (steps done, steps in all).
            fingerprint: Note the SHA-256 of the incoming model, by which a model is known when it is to be removed.
        """
        check_frozen_base(module, self.state.frozen)
        names = names_to_keep(module, self.division.patterns(module), self.batch_norm)
        names["parameters"] = [name for name in names["parameters"] if name not in self.state.frozen]
        digest = fingerprint_to_keep(module, names) if fingerprint else None
        own = take_snapshot(module, self.division.task_specific(module))
        self.load_method()
        with merging(
            module,
            self.method,
            task=task,
            t=operating_time([*self.state.report.weights, weight]),
            merged=self.state.merged,
            base=self.state.base or {},
            calibration=self.measured_on(module, buffer) if buffer is not None else None,
            exclude=self.division.patterns(module),
            batch_norm=self.batch_norm,
            trace=trace,
            on_step=on_step,
        ) as merge:
            yield Addition(self, merge, task, weight, own, buffer, names, digest)

    def buffer_with(self, task: str, samples: Any, weight: float = 1.0) -> CalibrationBuffer | None:
        """The calibration samples with those of one more task; None if there are none at all."""
        buffer = self.state.buffer.copy()
        if samples is not None:
            buffer.add(task, samples, weight=weight)
        return buffer if len(buffer) else None

    def measured_on(self, module: nn.Module, buffer: CalibrationBuffer) -> CalibrationSet:
        """The loss on samples; those of earlier tasks go through the module with their own parameters in place."""
        loss = calibration_loss(module, self.calibration.loss)  # type: ignore[arg-type]
        as_task = own_parameters(module, self.state.task_parameters)
        trainer: L.Trainer = module.trainer  # type: ignore[assignment]
        size = self.calibration.micro_batch_size(trainer.train_dataloader)
        return CalibrationSet(buffer, loss, size, loss_scale(trainer), as_task)

    def draw(self, dataset: Any, weight: float = 1.0) -> Any:
        """Calibration samples of the next task from its dataset of ``(input, label)``, as many as it will get.

        Class-balanced where the dataset has integer ``targets`` and the calibration loss reads labels; the same samples
        for every method.
        """
        buffer = self.state.buffer
        room = max(buffer.room_for_next(weight), 1)
        return draw_by_index(dataset, room, buffer.generator(), balanced=buffer.balanced)


@dataclass(frozen=True)
class Addition:
    """One merge more, which is made but not yet part of its stream.

    Args:
        stream: The stream, as it was before.
        merge: The merge.
        task: Name of the task.
        weight: Its utility weight.
        own: What the task keeps for itself.
        buffer: Calibration samples of all tasks; None if the merge had none.
        names: Which tensors merges move.
        fingerprint: SHA-256 of these of the incoming model, or None.
    """

    stream: Stream
    merge: Merge
    task: str
    weight: float
    own: Snapshot
    buffer: CalibrationBuffer | None
    names: dict[str, list[str]]
    fingerprint: str | None

    @property
    def record(self) -> MergeRecord:
        """What happened in the merge."""
        return self.merge.record

    @property
    def task_parameters(self) -> dict[str, Snapshot]:
        """What every task keeps for itself, this one included."""
        return {**self.stream.state.task_parameters, self.task: self.own}

    def state(
        self,
        *,
        accuracy: list[float],
        metrics: Mapping[str, TaskMetric] = {},
        pretrained: float = math.nan,
        fine_tuned: float = math.nan,
        before_training: float = math.nan,
    ) -> StreamState:
        """The stream's state with this merge and what was measured after it; called within the transaction.

        Args:
            accuracy: Score on every task, this one the last; NaN for one that was not measured.
            metrics: What was measured, by task, where it is not accuracy.
            pretrained: Score of the base model on the task.
            fine_tuned: Score of the incoming model on it.
            before_training: Score of the merged model before.
        """
        state, module = self.stream.state, self.merge.module
        known = {self.task: self.fingerprint} if self.fingerprint else {}
        return replace(
            state,
            merged=self.merge.snapshot(self.stream.division.shared(module)),
            task_parameters=self.task_parameters,
            fixed=_unless_same(state.fixed, take_snapshot(module, self.stream.division.fixed(module))),
            method=copy_containers(self.stream.method.state_dict()),
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
            settings=describe_method(self.stream.method),
            fingerprints={**state.fingerprints, **known},
            adapters={**state.adapters, **{name: pair.plain() for name, pair in self.merge.pairs.items()}},
        )


def _unless_same(before: Snapshot, now: Snapshot) -> Snapshot:
    """The snapshot before if nothing has changed: it is on disk already."""
    same = before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in now)
    return before if same else now
