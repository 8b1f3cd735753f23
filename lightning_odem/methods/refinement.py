"""A short supervised fine-tuning of a merged model on the calibration buffer, close to its starting point."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.buffer import MicroBatch
from lightning_odem.calibration.objective import CalibrationObjective
from lightning_odem.methods.linalg import norm


def refine(
    theta: Tensor,
    objective: CalibrationObjective,
    *,
    steps: int = 80,
    lr: float = 1e-6,
    radius: float = 1e-3,
    penalty: float = 1e-3,
    rise: float = 0.02,
) -> Tensor:
    r"""Refine a merged model as the released code of ODE-M does at its end.

    AdamW, without weight decay, minimises the loss on one random batch of every task, weighted by its share, plus
    :math:`\lambda \|\theta - \theta_a\|^2 / \|\theta_a\|^2`. The gradient is clipped to norm 1. The point is kept in a
    ball around the start :math:`\theta_a`. The best point is chosen by the loss on the first four batches of each task.
    The random batches depend on the buffer's seed and its number of tasks only.

    It holds up to nine vectors of the model's size: start, point, offset, best point, gradient, Adam's two moments and
    two of its temporaries.

    Args:
        theta: The start :math:`\theta_a`, shape [d]; not modified.
        objective: Losses and gradients on the buffer; its ``batch_size`` is the size of the random batches.
        steps: Number of steps. Each takes one gradient and one pass without gradient.
        lr: Learning rate, in units of the weights.
        radius: Radius of the ball, relative to the norm of the start.
        penalty: :math:`\lambda`.
        rise: How much the loss of any task may rise above its loss at the start.

    Returns:
        The point of lowest mean loss at which no task's loss rose too much; ``theta`` itself if none is better.
    """
    losses = TaskLosses(objective, limit=4)
    whole = list(objective.buffer.micro_batches(len(objective.buffer)))
    generator = objective.buffer.generator()
    start = losses(theta)
    best, lowest = theta, losses.mean(start)
    size = norm(theta)
    point, offset = theta.clone(), torch.zeros_like(theta)
    optimizer = torch.optim.AdamW([point], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        drawn = []
        for batch in whole:
            index = torch.randperm(batches.count(batch.samples), generator=generator)[: objective.batch_size]
            drawn.append(batch.select(index))
        _, gradient = objective.loss_and_grad(point, drawn)
        gradient.add_(offset, alpha=2.0 * penalty / size**2)
        point.grad = gradient.div_(max(norm(gradient), 1.0))
        optimizer.step()
        # Do not hold it while the next one is computed.
        del point.grad, gradient
        distance = norm(torch.sub(point, theta, out=offset))
        if distance > radius * size:
            torch.add(theta, offset.mul_(radius * size / distance), out=point)
        reached = losses(point)
        if losses.mean(reached) < lowest and all(reached[task] <= start[task] + rise for task in start):
            best, lowest = point.clone(), losses.mean(reached)
    return best


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
