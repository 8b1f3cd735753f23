"""The calibration loss of each task by itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean

from torch import Tensor

from lightning_odem.calibration.buffer import MicroBatch
from lightning_odem.calibration.objective import CalibrationObjective


class TaskLosses:
    """The loss of every task in the calibration buffer, as the mean over its first micro-batches.

    Args:
        objective: The calibration loss; its ``batch_size`` is the size of the batches.
        limit: Batches per task.

    Attributes:
        batches: The batches of each task, in the order of arrival, each with a share of 1.
        shares: Each task's share of the calibration loss; they sum to 1.
    """

    def __init__(self, objective: CalibrationObjective, limit: int) -> None:
        self.objective = objective
        self.batches: dict[str, list[MicroBatch]] = {}
        self.shares: dict[str, float] = {}
        for batch in objective.micro_batches():
            batches = self.batches.setdefault(batch.task, [])
            if len(batches) < limit:
                batches.append(replace(batch, share=1.0))
            self.shares[batch.task] = self.shares.get(batch.task, 0.0) + batch.share

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """Loss of each task at ``theta`` [d], in one pass. All batches count equally, whatever their size."""
        losses = iter(self.objective.losses(theta, [batch for held in self.batches.values() for batch in held]))
        return {task: fmean(islice(losses, len(held))) for task, held in self.batches.items()}

    def gradient(self, theta: Tensor, batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the gradients on some of the batches at ``theta``, a new vector [d]."""
        return self.objective.loss_and_grad(theta, batches)[1]

    def mean(self, losses: Mapping[str, float]) -> float:
        """The mean over the tasks, weighted by their shares."""
        return math.fsum(share * losses[task] for task, share in self.shares.items())
