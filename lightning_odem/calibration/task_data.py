"""The incoming task's training batches, with the module's outputs and gradients on them at any point."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_odem.calibration.batches import copy
from lightning_odem.calibration.loss import move_to_device
from lightning_odem.calibration.prediction import predict, predict_with_targets
from lightning_odem.calibration.scaling import LossScale, loss_scale
from lightning_odem.parameters.vector import ParameterVector


class TaskData:
    """Training batches of one task, with outputs of the module and gradients at any point.

    The module is in eval mode while a merge uses it. It stays at the point evaluated last. Each time it gets a copy of
    the batch.

    Args:
        vector: The parameters theta stands for.
        module: The module, attached to its Trainer.
        task: Name of the task.
        batches: The task's training batches; iterated over once per epoch.

    Attributes:
        sample_gradients: Samples that went through a pass with gradient so far.
    """

    def __init__(self, vector: ParameterVector, module: L.LightningModule, task: str, batches: Iterable[Any]) -> None:
        self.vector = vector
        self.module = module
        self.task = task
        self.sample_gradients = 0
        self._loss_scale = LossScale(loss_scale(module.trainer))
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        """One epoch of batches on the module's device."""
        return (move_to_device(self.module, batch) for batch in self._batches)

    def predictions(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Predictions and targets at the module's present parameters; most modules predict class scores [B, C]."""
        return predict_with_targets(self.module, copy(batch), self.task)

    def features(self, batch: Any) -> Tensor:
        """The result of the module's ``features(inputs)``, or its predictions if it has no such method."""
        batch, features = copy(batch), getattr(self.module, "features", None)
        if features is None or not isinstance(batch, (tuple, list)):
            return predict(self.module, batch, self.task)[0]
        with self.module.trainer.precision_plugin.forward_context():
            return features(batch[0])

    def evaluate(self, theta: Tensor, function: Callable[[], Tensor]) -> Tensor:
        """``function()`` with the module's parameters at ``theta`` [d], without a gradient.

        Example::

            logits, _ = data.evaluate(merged, lambda: data.predictions(batch)[0])
        """
        self.vector.write_(theta)
        with torch.no_grad():
            return function()

    def value_and_grad(self, theta: Tensor, batch: Any, function: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """The scalar ``function()`` at ``theta`` [d] and its gradient, a new vector [d].

        Only the number of samples is read from ``batch``. In fp16 the function may be called more than once, see
        :class:`~lightning_odem.calibration.scaling.LossScale`.

        Raises:
            ValueError: If the value depends on none of the parameters.
        """

        def differentiate(scale: float) -> tuple[float, Tensor]:
            self.sample_gradients += len(batch[1]) if isinstance(batch, (tuple, list)) and len(batch) > 1 else 0
            with torch.enable_grad(), self.vector.collect_gradient() as grad:
                with self.vector.collect_nothing():
                    value = function()
                (value * scale).backward()
            return value.item(), grad

        self.vector.write_(theta)
        return self._loss_scale.differentiate(differentiate)
