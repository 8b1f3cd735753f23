"""Merging models that are trained already, one after the other, outside of any training."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.calibration.prediction_loss import calibration_loss
from lightning_odem.calibration.source import draw_by_index
from lightning_odem.flow import operating_time
from lightning_odem.methods import MergeMethod, resolve_method
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot
from lightning_odem.report import MergeRecord
from lightning_odem.stream.merging import Calibration, merging
from lightning_odem.stream.trace import TrainingTrace


class Folding:
    """Folds models into one, in the order in which they are given: what the callback does, without a training.

    It holds the base model, the merged model and the calibration buffer; an incoming model only while it is merged.

    Args:
        module: A module of the models' architecture, whose own weights do not matter; afterwards it is the merged
            model. Methods that measure a loss need a LightningModule attached to a Trainer.
        method: Merge method or its name; an instance starts a new stream.
        base: Parameters and buffers of the base model by name, for methods that need it.
        calibration_size: Samples kept of all tasks together.
        exclude: Patterns of parameters that are not merged, besides the module's ``task_specific``.
        batch_norm: Policy for running statistics, see :class:`~lightning_odem.calibration.BatchNormStatistics`.
        calibration: Further settings of the calibration.

    Attributes:
        merged: Parameters and buffers of the merged model by name, parameters in half precision as they were before
            they were rounded; None before the first.
        weights: Utility weights of the tasks merged.

    Example:
        >>> import torch
        >>> folding = Folding(nn.Linear(1, 1, bias=False), "average")
        >>> for task, value in {"a": 0.0, "b": 3.0, "c": 6.0}.items():
        ...     record = folding.fold({"weight": torch.tensor([[value]])}, task)
        >>> folding.merged["weight"], record.t
        (tensor([[3.]]), 0.3333333333333333)
    """

    def __init__(
        self,
        module: nn.Module,
        method: MergeMethod | str,
        *,
        base: Snapshot | None = None,
        calibration_size: int = 1024,
        exclude: tuple[str, ...] = (),
        batch_norm: str = "average",
        calibration: CalibrationOptions = CalibrationOptions(),
    ) -> None:
        self.module = module
        self.method = resolve_method(method)
        self.method.load_state_dict({})
        self.base = base or {}
        self.merged: Snapshot | None = None
        self.weights: list[float] = []
        self._division = Division(exclude)
        self._batch_norm = batch_norm
        self._calibration = calibration
        self._buffer = calibration.buffer(calibration_size)
        self._division.check(module)

    def fold(
        self,
        incoming: Snapshot,
        task: str,
        weight: float = 1.0,
        samples: Any = None,
        trace: TrainingTrace = TrainingTrace(),
        on_step: Callable[[int, int], None] | None = None,
    ) -> MergeRecord:
        """Merge the next model; if that fails, the stream is what it was.

        Args:
            incoming: Parameters and buffers of the incoming model by name; of what is not merged those of the module
                stay.
            task: Name of its task.
            weight: Utility weight.
            samples: Samples of the task for the calibration buffer, first dimension their number, on the CPU; with
                labels if the calibration loss reads them.
            trace: What the incoming model's training left behind.
            on_step: Told (steps done, steps in all).

        Raises:
            ValueError: If names or shapes differ, or the method needs what was not given.
        """
        load_snapshot(self.module, incoming, self._division.shared(self.module))
        buffer = self._buffer.copy()
        if samples is not None:
            buffer.add(task, samples, weight=weight)
        with merging(
            self.module,
            self.method,
            task=task,
            t=operating_time([*self.weights, weight]),
            merged=self.merged,
            base=self.base,
            calibration=self._measured_on(buffer),
            exclude=self._division.patterns(self.module),
            batch_norm=self._batch_norm,
            trace=trace,
            on_step=on_step,
        ) as merge:
            merged = merge.snapshot()
        self.merged, self._buffer = merged, buffer
        self.weights.append(weight)
        return merge.record

    def draw(self, dataset: Any, weight: float = 1.0) -> Any:
        """Calibration samples of the next task from its dataset of ``(input, label)``, as many as it will get.

        Class-balanced where the dataset has integer ``targets`` and the calibration loss reads labels; the same samples
        for every method.
        """
        room = max(self._buffer.room_for_next(weight), 1)
        return draw_by_index(dataset, room, self._buffer.generator(), balanced=self._buffer.balanced)

    def _measured_on(self, buffer: CalibrationBuffer) -> Calibration | None:
        if not len(buffer):
            return None
        loss = calibration_loss(self.module, self._calibration.loss)  # type: ignore[arg-type]
        return Calibration(buffer, loss, self._calibration.micro_batch_size())
