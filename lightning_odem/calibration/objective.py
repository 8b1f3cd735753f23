"""The calibration loss and its gradient as functions of a flat parameter vector."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_odem.calibration.buffer import CalibrationBuffer, MicroBatch
from lightning_odem.parameters import ParameterVector

BatchLoss = Callable[[MicroBatch], Tensor]


class CalibrationObjective:
    r"""L(theta), the buffer's samples with each task counted by its share, and its gradient.

    .. math:: L(\theta) = \sum_j s_j \frac{1}{n_j} \sum_{x \in D_j} \ell_j(x; \theta), \qquad \sum_j s_j = 1

    One evaluation is one pass over the whole buffer in micro-batches. The module is left at the point evaluated last.

    Args:
        vector: The parameters theta stands for.
        buffer: The calibration samples.
        batch_loss: Mean loss of a micro-batch at the module's current parameters, a scalar with a gradient.
        batch_size: Samples per micro-batch; bounds the memory of a pass, not its result beyond rounding.
    """

    def __init__(
        self, vector: ParameterVector, buffer: CalibrationBuffer, batch_loss: BatchLoss, batch_size: int = 128
    ) -> None:
        self.vector = vector
        self.buffer = buffer
        self.batch_loss = batch_loss
        self.batch_size = batch_size
        self.gradient_evaluations = 0
        self.loss_evaluations = 0
        self.seconds = 0.0

    def loss_and_grad(self, theta: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient at ``theta`` [d]; the gradient is a new vector in the dtype of theta.

        Raises:
            ValueError: If the loss depends on none of the parameters.
        """
        with self._pass(theta):
            self.gradient_evaluations += 1
            with torch.enable_grad(), self.vector.collect_gradient() as grad:
                return self._sum(backward=True), grad

    def loss(self, theta: Tensor) -> float:
        """Loss at ``theta``, without a gradient."""
        with self._pass(theta), torch.no_grad():
            self.loss_evaluations += 1
            return self._sum(backward=False)

    def _sum(self, backward: bool) -> float:
        losses, shares = [], []
        for batch in self.buffer.micro_batches(self.batch_size):
            loss = self.batch_loss(batch)
            if backward and loss.requires_grad:
                (loss * batch.share).backward()
            losses.append(loss.detach())
            shares.append(batch.share)
        # Read from the device once per pass.
        values = torch.stack(losses).tolist()
        return math.fsum(value * share for value, share in zip(values, shares, strict=True))

    @contextmanager
    def _pass(self, theta: Tensor) -> Iterator[None]:
        start = time.perf_counter()
        self.vector.write_(theta)
        yield
        # The loss has been read by now, so a device has finished what was asked of it.
        self.seconds += time.perf_counter() - start
