"""The samples of all tasks, and the loss that is measured on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.fastest_size import fastest_micro_batches
from lightning_odem.calibration.objective import BatchLoss, CalibrationObjective, Counted
from lightning_odem.calibration.placement import on_device
from lightning_odem.calibration.prediction_loss import LogitsLoss
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.parameters.task_parameters import OwnParameters
from lightning_odem.parameters.vector import ParameterVector


@dataclass(frozen=True)
class CalibrationSet:
    """What a merge measures its loss on.

    Args:
        buffer: Samples of every task seen, the incoming one included.
        batch_loss: Mean loss of a micro-batch at the module's current parameters. A
            :class:`~lightning_odem.calibration.prediction_loss.LogitsLoss` needs the logits of every task's own model.
        batch_size: Samples per micro-batch.
        loss_scale: Factor on the loss while it is differentiated, as fp16 needs it; see
            :func:`~lightning_odem.calibration.scaling.loss_scale`.
        as_task: Puts the parameters that a task keeps for itself into the module while its samples go through.
        keep_on_device: Whether an objective has its samples on the device, see
            :func:`~lightning_odem.calibration.placement.on_device`.
        finds_size: Whether the batch size is still to be found, by :meth:`fastest`.
    """

    buffer: CalibrationBuffer
    batch_loss: BatchLoss
    batch_size: int = 128
    loss_scale: float = 1.0
    as_task: OwnParameters = OwnParameters()
    keep_on_device: bool = False
    finds_size: bool = False

    def objective(self, vector: ParameterVector) -> CalibrationObjective:
        """The calibration loss as a function of the vector."""
        buffer = on_device(self.buffer, vector.device) if self.keep_on_device else self.buffer
        return CalibrationObjective(
            vector, buffer, self.batch_loss, self.batch_size, self.loss_scale, as_task=self.as_task
        )

    def fastest(self, vector: ParameterVector) -> "CalibrationSet":
        """The same samples in micro-batches of the fastest size, if the size is to be found."""
        if not self.finds_size:
            return self
        return replace(self, batch_size=fastest_micro_batches(self.objective(vector)), finds_size=False)

    def loss(self, batch: MicroBatch) -> Tensor | Counted:
        """Mean loss of a micro-batch; the module has the parameters of its task meanwhile."""
        with self.as_task(batch.task):
            return self.batch_loss(batch)

    def batches_of(self, task: str) -> Iterator[MicroBatch]:
        """The samples of a task in micro-batches; none if the buffer holds none."""
        return self.buffer.micro_batches_of(task, self.batch_size) if self.buffer.counts.get(task) else iter(())

    @torch.no_grad()
    def store_logits(self, task: str) -> None:
        """Keep the logits of a task's fine-tuned model with its samples, if the loss is measured against them.

        The module has to hold that model and to be in eval mode. The buffer is changed at the end, in one step.

        Raises:
            TypeError: If the module gives no class scores.
            NonFiniteLossError: If a logit is NaN or infinite. Minus infinity may mask a class.
        """
        if not isinstance(self.batch_loss, LogitsLoss) or not self.buffer.counts.get(task):
            return
        logits = torch.cat([self.batch_loss.scores(batch).cpu() for batch in self.batches_of(task)])
        if not logits.float().logsumexp(1).isfinite().all():
            raise NonFiniteLossError("a logit of the incoming model is not finite", 0, 0.0)
        self.buffer.store_logits(task, logits)
