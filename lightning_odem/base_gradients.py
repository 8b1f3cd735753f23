"""Gradients of the calibration loss at the base model, from which every task was fine-tuned."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lightning_odem.batch_norm import BatchNormStatistics
from lightning_odem.calibration import CalibrationObjective, MicroBatch
from lightning_odem.calibration.further import FurtherSamples
from lightning_odem.calibration.prediction_loss import LogitsLoss
from lightning_odem.flow import NonFiniteLossError


class BaseGradients:
    """Gradients at the one point that all merges of a stream have in common, so that they can be kept and compared.

    The module has the base model's batch-norm statistics meanwhile. The base model is copied from main memory for each
    call and not held between them.

    Args:
        objective: The calibration loss, with the incoming task's samples in its buffer.
        base: Parameters and buffers of the base model by name.
        incoming: The incoming model [d]. Where the loss is measured against logits, the further samples' are its.
        statistics: The module's batch-norm statistics, at present the incoming model's.
        task: Name of the incoming task.
        further: Samples of the incoming task beyond those in the buffer.

    Attributes:
        task: Name of the incoming task.
    """

    def __init__(
        self,
        objective: CalibrationObjective,
        base: Mapping[str, Tensor],
        incoming: Tensor,
        statistics: BatchNormStatistics,
        task: str,
        further: FurtherSamples | None = None,
    ) -> None:
        self.task = task
        self._objective, self._base, self._incoming, self._further = objective, base, incoming, further
        self._statistics, self._incoming_statistics = statistics, statistics.read()

    def of(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Gradient [d] of the micro-batches' losses, each times its share, at the base model."""
        with self._undisturbed():
            return self._gradient(self._objective.vector.gather(self._base), batches)

    def of_task(self, on_step: Callable[[int, int], None] | None = None) -> tuple[Tensor, int]:
        """Gradient [d] of the incoming task's mean loss at the base model, and the number of samples it is taken on.

        These are the task's samples in the buffer and the further ones.

        Args:
            on_step: Told (micro-batches done, micro-batches in all).

        Raises:
            NonFiniteLossError: If the loss or the gradient is not finite.
        """
        objective, size = self._objective, self._objective.batch_size
        held, more = objective.buffer.counts[self.task], len(self._further or ())
        theta = objective.vector.gather(self._base)
        total, passes = torch.zeros_like(theta), math.ceil(held / size) + math.ceil(more / size)
        kept = objective.buffer.micro_batches_of(self.task, size, held / (held + more))
        with self._undisturbed():
            for done, batch in enumerate(chain(kept, self._more(more / (held + more)))):
                if on_step:
                    on_step(done, passes)
                total.add_(self._gradient(theta, [batch]))
        if not total.isfinite().all():
            raise NonFiniteLossError("the gradient at the base model is not finite", 0, 0.0)
        return total, held + more

    def _more(self, share: float) -> Iterator[MicroBatch]:
        """The further samples, their shares the parts of ``share``; with logits where the loss needs them."""
        loss, vector = self._objective.batch_loss, self._objective.vector
        for batch in self._further.micro_batches(self.task, self._objective.batch_size) if self._further else ():
            logits = None
            if isinstance(loss, LogitsLoss):
                vector.write_(self._incoming)
                self._statistics.write_(self._incoming_statistics)
                with torch.no_grad():
                    logits = loss.scores(batch).cpu()
            yield replace(batch, share=batch.share * share, logits=logits)

    def _gradient(self, theta: Tensor, batches: Sequence[MicroBatch]) -> Tensor:
        self._statistics.interpolate(self._base, 0.0)
        loss, gradient = self._objective.loss_and_grad(theta, batches)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss at the base model is {loss}", 0, 0.0)
        return gradient

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        statistics = self._statistics.read()
        try:
            yield
        finally:
            self._statistics.write_(statistics)
