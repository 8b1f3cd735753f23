"""The calibration loss and its gradient as functions of a flat parameter vector."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lightning_odem.calibration.batches import count
from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.joint import Joining
from lightning_odem.calibration.process_part import Piece, partition, partition_each, read_tail, tail, tail_length
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.calibration.scaling import LossScale
from lightning_odem.flow.deferred import Deferred, settle
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.task_parameters import OwnParameters
from lightning_odem.parameters.vector import NoGradientError, ParameterVector


@dataclass(frozen=True)
class Counted:
    """The loss of a micro-batch as a mean over tokens, masks or pairs instead of samples, with their number.

    Args:
        loss: The mean, a scalar. It is not used, and may be NaN, if the count is 0.
        count: Their number in the micro-batch.
    """

    loss: Tensor
    count: float


BatchLoss = Callable[[MicroBatch], Tensor | Counted]

_T = TypeVar("_T")


class CalibrationObjective:
    r"""The calibration loss L(theta) on the buffer's samples, with each task counted by its share, and its gradient.

    .. math:: L(\theta) = \sum_j s_j \frac{1}{n_j} \sum_{x \in D_j} \ell_j(x; \theta), \qquad \sum_j s_j = 1

    One evaluation is one pass over the whole buffer in micro-batches, or over the micro-batches given. Tasks share
    micro-batches where :class:`~lightning_odem.calibration.joint.Joining` allows it. The module stays at the point
    evaluated last. If the losses of micro-batches are :class:`Counted`, a task's loss is the mean over all
    that is counted in its samples.

    In a job of several processes, all call an evaluation with the same arguments. Each runs a part of the samples, and
    one all-reduce gives all of them the same result to the last bit. An error in one process is raised in all.

    Args:
        vector: The parameters that theta stands for.
        buffer: The calibration samples, the same in every process.
        batch_loss: Mean loss of a micro-batch at the module's current parameters, a scalar with a gradient.
        batch_size: Samples per micro-batch; it bounds the memory of a pass. If losses are counted, or means over
            samples, it changes the result by rounding only.
        loss_scale: Factor on losses before ``backward``, see :class:`~lightning_odem.calibration.scaling.LossScale`.
            Results do not contain it.
        processes: The processes that share the evaluations; by default all of the job.
        as_task: Puts a task's own parameters into the module while its micro-batches go through; by default none.

    Attributes:
        gradient_evaluations: Passes with a gradient so far.
        loss_evaluations: Passes without a gradient so far.
        sample_gradients: Samples in the passes with a gradient so far, in all processes together.
        seconds: Wall time of the passes.
    """

    def __init__(
        self,
        vector: ParameterVector,
        buffer: CalibrationBuffer,
        batch_loss: BatchLoss,
        batch_size: int = 128,
        loss_scale: float = 1.0,
        processes: Processes | None = None,
        as_task: OwnParameters | None = None,
    ) -> None:
        self.vector = vector
        self.buffer = buffer
        self.batch_loss = batch_loss
        self.batch_size = batch_size
        self.loss_scale = LossScale(loss_scale)
        self.processes = processes or Processes.current()
        self.as_task = as_task or OwnParameters()
        self.gradient_evaluations = 0
        self.loss_evaluations = 0
        self.sample_gradients = 0
        self.seconds = 0.0
        self._counts: dict[str, float] = {}
        self._micro_batches: list[MicroBatch] = []
        self._whole: Sequence[MicroBatch] | None = None
        self._joining = Joining(getattr(batch_loss, "joins_tasks", False), self.as_task.__contains__)

    def micro_batches(self) -> list[MicroBatch]:
        """The whole buffer, task by task, always in the same order; shares sum to 1."""
        if not self._micro_batches:
            self._micro_batches = list(self.buffer.micro_batches(self.batch_size))
        return self._micro_batches

    def loss_and_grad(self, theta: Tensor, batches: Sequence[MicroBatch] | None = None) -> tuple[float, Tensor]:
        """Loss and gradient at ``theta`` [d]; the gradient is a new vector in the dtype of theta.

        Args:
            theta: The point.
            batches: The micro-batches; by default those of the whole buffer. The loss is the sum of theirs, each times
                its share.

        Raises:
            ValueError: If the loss depends on none of the parameters.
        """
        return settle(partial(self.differentiate, theta, batches))

    def differentiate(
        self, theta: Tensor, batches: Sequence[MicroBatch] | None = None
    ) -> tuple[Deferred[float], Tensor]:
        """As :meth:`loss_and_grad`, but the loss is still on the device, and so is whether a gradient overflowed.

        In a job of several processes, their losses are read here.
        """
        batches = self._in_few(theta, batches)
        shards = self.vector.shards
        return self.loss_scale.attempt(
            lambda scale: self._loss_and_grad(theta, batches, scale), None if shards is None else shards.sum_
        )

    def loss(self, theta: Tensor, batches: Sequence[MicroBatch] | None = None) -> float:
        """Loss at ``theta``, without a gradient; ``batches`` as in :meth:`loss_and_grad`."""
        batches = self._in_few(theta, batches)
        return _sum_by_share(self.losses(theta, batches), batches)

    def losses(self, theta: Tensor, batches: Sequence[MicroBatch]) -> list[float]:
        """Mean loss of each of the micro-batches at ``theta``, in one pass and without a gradient."""
        with self._pass(theta), torch.no_grad():
            self.loss_evaluations += 1
            if self.processes.size == 1:
                return self._losses(batches).tolist()
            pieces = self._pieces(batches)
            found, error = _attempt(lambda: self._losses([piece.batch for piece in pieces]).tolist())
            # One entry per micro-batch, and the number of processes that failed.
            sums = torch.zeros(len(batches) + 1, dtype=torch.float64)
            sums[-1] = error is not None
            for piece, loss in zip(pieces, found or (), strict=error is None):
                sums[piece.source] += piece.part * loss
            *means, failed = self.processes.sum_(sums.to(self.vector.device)).tolist()
            if failed:
                self._raise_everywhere(error)
            return means

    def joined(self, theta: Tensor, batches: Sequence[MicroBatch], size: int) -> Sequence[MicroBatch]:
        """The same samples in fewer micro-batches of at most ``size``, if tasks may share them; tried at ``theta``."""

        def losses(tried: Sequence[MicroBatch]) -> list[float]:
            with self.processes.together(), self._pass(theta), torch.no_grad():
                return self.processes.broadcast_(self._losses(tried)).tolist()

        return self._joining(batches, size, losses)

    def _in_few(self, theta: Tensor, batches: Sequence[MicroBatch] | None) -> Sequence[MicroBatch]:
        """Micro-batches of which only the sum matters, by default of the whole buffer."""
        if batches is not None and batches is not self._micro_batches:
            return self.joined(theta, batches, self.batch_size)
        if self._whole is None:
            self._whole = self.joined(theta, self.micro_batches(), self.batch_size)
        return self._whole

    def _loss_and_grad(
        self, theta: Tensor, batches: Sequence[MicroBatch], scale: float
    ) -> tuple[Deferred[float], Tensor]:
        """The loss, and its gradient times ``scale``."""
        with self._pass(theta):
            self.gradient_evaluations += 1
            self.sample_gradients += sum(count(batch.samples) for batch in batches)
            if self.processes.size == 1:
                return self._differentiate(batches, scale)
            return self._differentiate_together(batches, scale)

    def _differentiate(
        self, batches: Sequence[MicroBatch], scale: float, out: Tensor | None = None
    ) -> tuple[Deferred[float], Tensor]:
        with torch.enable_grad(), self.vector.collect_gradient(out) as grad:
            losses = self._losses(batches, scale)
            launched = time.perf_counter()

        def finish(losses: Tensor) -> float:
            if self.vector.device.type != "cpu":  # the device has worked since then
                self.seconds += time.perf_counter() - launched
            return _sum_by_share(losses.tolist(), batches)

        return Deferred(losses, finish), grad

    def _differentiate_together(self, batches: Sequence[MicroBatch], scale: float) -> tuple[Deferred[float], Tensor]:
        """As :meth:`_differentiate`, summed over the parts of all processes."""
        rank, size, d = self.processes.rank, self.processes.size, len(self.vector)
        own = [piece.batch for piece in self._pieces(batches)]
        flat = torch.zeros(d + tail_length(size), dtype=self.vector.dtype, device=self.vector.device)
        grad = flat[:d]
        found, error = _attempt(lambda: self._differentiate(own, scale, grad)[0].result())
        # A part without samples or with constant losses has no gradient, but the other parts may have one.
        reached, failed = error is None, error is not None and not isinstance(error, NoGradientError)
        flat[d:] = flat.new_tensor(tail(found or 0.0, rank, size, failed=failed, reached=reached))
        self._sum_over_processes_(flat)
        loss, any_failed, any_reached = read_tail(flat[d:].tolist())
        if any_failed:
            self._raise_everywhere(error if failed else None)
        if error is not None and not any_reached:
            raise error
        return Deferred.of(loss), grad

    def _sum_over_processes_(self, flat: Tensor) -> None:
        """Sum the processes' parts of a gradient [d], and the tail behind it, in place."""
        if self.vector.shards is None:
            self.processes.sum_(flat)
        else:
            # If parameters are sharded, the shards of the gradient are summed already.
            self.vector.shards.sum_(flat[len(self.vector) :])

    def _pieces(self, batches: Sequence[MicroBatch]) -> list[Piece]:
        """This process's part of a pass."""
        cut = partition if self.vector.shards is None else partition_each
        return cut(batches, self.processes.rank, self.processes.size)

    def _raise_everywhere(self, error: Exception | None) -> None:
        with self.processes.together():
            if error is not None:
                raise error

    def _losses(self, batches: Sequence[MicroBatch], scale: float | None = None) -> Tensor:
        """Mean loss of each micro-batch; with a ``scale``, ``backward`` of the loss times share and scale runs too."""
        losses = []
        for batch in batches:
            with self.as_task(batch.task):  # backward too, which may run parts of the module again
                with self.vector.collect_nothing():
                    found = self.batch_loss(batch)
                loss = self._in_proportion(found, batch) if isinstance(found, Counted) else found
                if scale is not None and loss.requires_grad:
                    (loss * (batch.share * scale)).backward()
            losses.append(loss.detach())
        # On the device, to be read once per pass.
        return torch.stack(losses) if losses else torch.empty(0)

    def _in_proportion(self, found: Counted, batch: MicroBatch) -> Tensor:
        """The loss times the count per sample of the micro-batch, relative to the count per sample of the task."""
        if found.count:
            return found.loss * (found.count / (count(batch.samples) * self._mean_count(batch.task)))
        if self.vector.shards is not None:  # every process has to run the same passes backwards
            return torch.where(found.loss.isfinite(), found.loss, 0.0) * 0.0
        return (self.vector.tensors[0].reshape(-1)[:1].sum() * 0.0).to(found.loss.dtype)

    def _mean_count(self, task: str) -> float:
        """Mean count per sample of a task; one pass finds it, since it does not depend on the point."""
        if task not in self._counts:
            with torch.no_grad():
                found = [self.batch_loss(batch) for batch in self.buffer.micro_batches_of(task, self.batch_size)]
            total = math.fsum(each.count for each in found if isinstance(each, Counted))
            self._counts[task] = total / self.buffer.counts[task]
        return self._counts[task]

    @contextmanager
    def _pass(self, theta: Tensor) -> Iterator[None]:
        start = time.perf_counter()
        self.vector.write_(theta)
        yield
        self.seconds += time.perf_counter() - start


def _attempt(function: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """The result of a function, or the error it raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _sum_by_share(losses: Sequence[float], batches: Sequence[MicroBatch]) -> float:
    return math.fsum(loss * batch.share for loss, batch in zip(losses, batches, strict=True))
