"""The calibration loss and its gradient as functions of a flat parameter vector."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_odem.calibration.batches import count
from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.parameters import ParameterVector

BatchLoss = Callable[[MicroBatch], Tensor]


class CalibrationObjective:
    r"""L(theta), the buffer's samples with each task counted by its share, and its gradient.

    .. math:: L(\theta) = \sum_j s_j \frac{1}{n_j} \sum_{x \in D_j} \ell_j(x; \theta), \qquad \sum_j s_j = 1

    One evaluation is one pass over the whole buffer in micro-batches, or over those micro-batches that are given: a
    single task, a random minibatch. The module is left at the point evaluated last.

    Args:
        vector: The parameters theta stands for.
        buffer: The calibration samples.
        batch_loss: Mean loss of a micro-batch at the module's current parameters, a scalar with a gradient.
        batch_size: Samples per micro-batch; bounds the memory of a pass, not its result beyond rounding.

    Attributes:
        gradient_evaluations: Gradients taken so far, of the whole buffer or a part of it.
        loss_evaluations: Passes without a gradient so far.
        sample_gradients: Samples that went through a pass with gradient so far.
        seconds: Wall time inside the passes.
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
        self.sample_gradients = 0
        self.seconds = 0.0

    def micro_batches(self) -> list[MicroBatch]:
        """The whole buffer, task by task and always in the same order; shares sum to 1."""
        return list(self.buffer.micro_batches(self.batch_size))

    def loss_and_grad(self, theta: Tensor, batches: Sequence[MicroBatch] | None = None) -> tuple[float, Tensor]:
        """Loss and gradient at ``theta`` [d]; the gradient is a new vector in the dtype of theta.

        Args:
            theta: The point.
            batches: Sum the losses of these micro-batches, each times its share, instead of the whole buffer's.

        Raises:
            ValueError: If the loss depends on none of the parameters.
        """
        batches = self.micro_batches() if batches is None else batches
        with self._pass(theta):
            self.gradient_evaluations += 1
            self.sample_gradients += sum(count(batch.samples) for batch in batches)
            with torch.enable_grad(), self.vector.collect_gradient() as grad:
                return _weighted(self._losses(batches, backward=True), batches), grad

    def loss(self, theta: Tensor, batches: Sequence[MicroBatch] | None = None) -> float:
        """Loss at ``theta``, without a gradient; ``batches`` as in :meth:`loss_and_grad`."""
        batches = self.micro_batches() if batches is None else batches
        return _weighted(self.losses(theta, batches), batches)

    def losses(self, theta: Tensor, batches: Sequence[MicroBatch]) -> list[float]:
        """Mean loss of each of the micro-batches at ``theta``, in one pass and without a gradient."""
        with self._pass(theta), torch.no_grad():
            self.loss_evaluations += 1
            return self._losses(batches, backward=False)

    def _losses(self, batches: Sequence[MicroBatch], backward: bool) -> list[float]:
        losses = []
        for batch in batches:
            loss = self.batch_loss(batch)
            if backward and loss.requires_grad:
                (loss * batch.share).backward()
            losses.append(loss.detach())
        # Read from the device once per pass.
        return torch.stack(losses).tolist()

    @contextmanager
    def _pass(self, theta: Tensor) -> Iterator[None]:
        start = time.perf_counter()
        self.vector.write_(theta)
        yield
        # The loss has been read by now, so a device has finished what was asked of it.
        self.seconds += time.perf_counter() - start


def _weighted(losses: Sequence[float], batches: Sequence[MicroBatch]) -> float:
    return math.fsum(loss * batch.share for loss, batch in zip(losses, batches, strict=True))
