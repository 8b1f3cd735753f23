"""Parts of the calibration buffer, and gradients on random minibatches of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count

import torch
from torch import Tensor

from lightning_odem.arguments import check_integer, check_seed
from lightning_odem.calibration import CalibrationBuffer, batches
from lightning_odem.calibration.objective import CalibrationObjective
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.flow.deferred import Deferred, settle

Gradient = Callable[[Tensor], tuple[Deferred[float], Tensor]]


class CalibrationPart(CalibrationObjective):
    """The calibration loss on some of the samples, measured and counted by the objective of all samples.

    Args:
        objective: The calibration loss, or a part of one.
        buffer: The samples.
    """

    def __init__(self, objective: CalibrationObjective, buffer: CalibrationBuffer) -> None:
        super().__init__(
            objective.vector, buffer, objective.batch_loss, objective.batch_size, processes=objective.processes
        )
        self._objective = objective

    def differentiate(
        self, theta: Tensor, batches: Sequence[MicroBatch] | None = None
    ) -> tuple[Deferred[float], Tensor]:
        """Loss and gradient at ``theta`` [d] on these samples, unless others are given."""
        return self._objective.differentiate(theta, self.micro_batches() if batches is None else batches)

    def joined(self, theta: Tensor, batches: Sequence[MicroBatch], size: int) -> Sequence[MicroBatch]:
        """The same samples in fewer micro-batches, if tasks may share them."""
        return self._objective.joined(theta, batches, size)

    def losses(self, theta: Tensor, batches: Sequence[MicroBatch]) -> list[float]:
        """Mean loss of each of the micro-batches at ``theta`` [d], without a gradient."""
        return self._objective.losses(theta, batches)


def hold_out(objective: CalibrationObjective, fraction: float) -> tuple[CalibrationPart, CalibrationPart]:
    """Split the calibration loss into one on the samples to learn from and one on the held-out samples.

    The last samples of each task are held out. A buffer keeps samples in a random, class-balanced order, so this is a
    random, nearly balanced choice. It is the same in every merge until the task's quota shrinks. Nothing is copied. In
    both parts, the tasks that have samples there keep their shares of the loss relative to each other.

    Args:
        objective: The calibration loss; its buffer is not changed.
        fraction: Share of a task's samples to hold out, in (0, 1), rounded. A task with two samples or more keeps at
            least one on each side. A task with a single sample holds none out.

    Raises:
        ValueError: If no task that counts has two samples.
    """
    buffer = objective.buffer
    counts = buffer.counts
    held = {task: min(max(round(fraction * n), 1), n - 1) if n else 0 for task, n in counts.items()}
    if not any(held[task] for task in buffer.shares()):
        raise ValueError(
            f"Holding out calibration samples needs a task with at least two of them, the buffer has {counts}. "
            "Raise calibration_size, or choose another operating_time."
        )
    kept = {task: n - held[task] for task, n in counts.items()}
    return (
        _part(objective, {task: slice(n) for task, n in kept.items()}),
        _part(objective, {task: slice(n, None) for task, n in kept.items()}),
    )


def _part(objective: CalibrationObjective, index: dict[str, slice]) -> CalibrationPart:
    """The calibration loss on a range of the samples of each task."""
    return CalibrationPart(objective, objective.buffer.part(index))


def samples_per_epoch(buffer: CalibrationBuffer) -> int:
    """Count the samples of tasks that have a share of the loss."""
    counts = buffer.counts
    return sum(counts[task] for task in buffer.shares())


@dataclass(frozen=True)
class Minibatches:
    """Random minibatches of calibration samples, for gradients and for the memory that a pass takes.

    A pass over N samples is ceil(N / B) minibatches, each task in its share.

    Args:
        size: Samples B per minibatch, >= 1.
        seed: Seed of the minibatches. Each merge starts from it.

    Raises:
        ValueError: For a size below 1.
    """

    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1)
        check_seed("seed", self.seed)

    def per_epoch(self, buffer: CalibrationBuffer) -> int:
        """Number of minibatches in one pass over the samples that count in the loss."""
        return -(-samples_per_epoch(buffer) // self.size)

    def gradients(self, objective: CalibrationObjective) -> Callable[[Tensor], tuple[float, Tensor]]:
        """Return a function that takes loss and gradient on the next minibatch, epoch after epoch without end.

        Args:
            objective: The loss, measured on its own buffer; its ``batch_size`` bounds the samples that go through the
                module at once.
        """
        differentiate = self.deferred(objective)
        return lambda theta: settle(partial(differentiate, theta))

    def deferred(self, objective: CalibrationObjective) -> Gradient:
        """As :meth:`gradients`, but the losses are still on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        minibatches = chain.from_iterable(objective.buffer.minibatches(self.size, generator) for _ in count())
        return lambda theta: objective.differentiate(theta, list(_pieces(next(minibatches), objective.batch_size)))


def _pieces(minibatch: Iterable[MicroBatch], size: int) -> Iterator[MicroBatch]:
    """The same samples in micro-batches of a size that fits on the device."""
    for batch in minibatch:
        n = batches.count(batch.samples)
        if n <= size:
            yield batch
            continue
        for index in torch.arange(n).split(size):
            yield replace(batch.select(index), share=batch.share * len(index) / n)
