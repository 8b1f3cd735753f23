"""Two paths on two halves of the calibration samples, each judged on the other half."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_odem.calibration import CalibrationObjective
from lightning_odem.methods.base import MergeContext, MergeResult
from lightning_odem.methods.running_average import RunningAverage
from lightning_odem.methods.sampling import halve

SHARES = (0.0, 1.0, 2.0)
"""Shares of the paths' departure from the running average at which the loss is measured."""


class Follow(Protocol):
    """Follows a path from ``start`` in its memory with the samples of ``context``; ``unseen`` are the others."""

    def __call__(
        self, start: Tensor, incoming: Tensor, t: float, context: MergeContext, unseen: CalibrationObjective
    ) -> MergeResult:
        """Follow the path."""
        ...


class CrossFit:
    r"""Goes as far from the running average as samples confirm that were not used to get there (cross-fitting).

    The calibration samples are cut in halves. From the running average :math:`\bar\theta_{k-1}`, which has seen none
    of them, one path is followed with the gradients of each half, to :math:`\theta^A` and :math:`\theta^B`. With
    :math:`\bar\theta_k = (1 - t) \bar\theta_{k-1} + t \theta_1` the average that a path without gradients leads to, and
    L_A, L_B the loss on the halves,

    .. math:: \Psi_k = \bar\theta_k + s \left(\frac{\theta^A + \theta^B}{2} - \bar\theta_k\right), \qquad
        s = \arg\min_{0 \le s \le 2}\ L_B(\bar\theta_k + s (\theta^A - \bar\theta_k))
        + L_A(\bar\theta_k + s (\theta^B - \bar\theta_k)),

    the minimum of the parabola through s = 0, 1 and 2. Every loss in it is one on samples that the path did not see:
    where gradients only fit their own samples s is 0 and the merged model the running average, bit for bit. Both paths
    together cost the gradients of one over all samples; judging costs three passes over all samples without gradient,
    and one more measures the result.

    The running average is kept between merges, in main memory. While the second path goes on, the end of the first is
    held beside it.

    Example:
        >>> best_share([3.0, 2.0, 3.0]), best_share([1.0, 2.0, 5.0]), best_share([5.0, 3.0, 2.0])
        (1.0, 0.0, 2.0)
    """

    def __init__(self) -> None:
        self._average = RunningAverage()

    def start(self, incoming: Tensor, context: MergeContext) -> None:
        """Begin a stream with its first model [d]."""
        self._average.start(incoming, context)

    def merge(self, follow: Follow, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge in the memory of ``merged``, of which nothing but parameters new to the stream is used.

        Returns:
            The merged model; the time, where paths choose it, as the mean of both; and the first half's path. Its
            losses at t = 0 and of the incoming model are means of the halves', that at its end is the merged model's.

        Raises:
            ValueError: If there are not two samples that count.
        """
        assert context.calibration is not None, "declared in needs"
        halves = halve(context.calibration)
        results, unseen_loss = [], [0.0] * len(SHARES)
        for index, (seen, unseen) in enumerate((halves, halves[::-1])):
            part = replace(context, calibration=seen, on_step=_half(context.on_step, index))
            # Written once, the average knows all parameters, and the memory may be any.
            start = self._average.write_(torch.empty_like(merged) if index else merged, context)
            result = follow(start, incoming, t, part, unseen)
            straight = self._straight(incoming, result.t, t, context)
            result.theta.sub_(straight)  # the departure from here on
            for number, share in enumerate(SHARES):
                unseen_loss[number] += unseen.loss(straight.add(result.theta, alpha=share)) / 2
            results.append(result)
            del straight  # not held while the second path is followed
        share = best_share(unseen_loss)
        if not share:
            rank_zero_info(
                f"The gradients of half of the samples took the loss on the other half from {unseen_loss[0]:.4g} to "
                f"{unseen_loss[1]:.4g}: the merged model is the running average."
            )
        first, second = results
        time = None if first.t is None or second.t is None else (first.t + second.t) / 2
        theta = self._straight(incoming, time, t, context)
        if share:
            theta.add_(first.theta, alpha=share / 2).add_(second.theta, alpha=share / 2)
        path = first.trajectory
        if path is not None and second.trajectory is not None:
            path.theta, path.estimated = theta, True
            path.loss1 = (path.loss1 + second.trajectory.loss1) / 2
            path.loss[0] = (path.loss[0] + second.trajectory.loss[0]) / 2
            path.loss[-1] = context.calibration.loss(theta)
            path.gradient_evaluations += second.trajectory.gradient_evaluations
            path.departure, path.departure_loss, path.departure_taken = list(SHARES), unseen_loss, [share]
        self._average.move(incoming, t if time is None else time, context)
        return MergeResult(theta, path, time)

    def state_dict(self) -> dict[str, Any]:
        """The running average; empty before the first task."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; with an empty one the next merge takes the merged model for the average."""
        self._average.load_state_dict(state)

    def _straight(self, incoming: Tensor, reached: float | None, t: float, context: MergeContext) -> Tensor:
        """The running average with the incoming model, at the time that a path has reached; a new vector."""
        average = self._average.write_(torch.empty_like(incoming), context)
        return average.lerp_(incoming, t if reached is None else reached)


def best_share(losses: Sequence[float]) -> float:
    """Where in [0, 2] the parabola through losses at 0, 1 and 2 is lowest; 0 unless it is lower there than at 0."""
    at_0, at_1, at_2 = losses
    curvature = at_2 - 2.0 * at_1 + at_0
    if not math.isfinite(curvature):
        return 1.0 if at_1 < at_0 else 0.0
    if curvature <= 0.0:
        return 2.0 if at_2 < at_0 else 0.0
    return min(max(1.0 - (at_2 - at_0) / (2.0 * curvature), 0.0), 2.0)


def _half(on_step: Callable[[int, int], None] | None, index: int) -> Callable[[int, int], None] | None:
    """Progress of one of two paths as that of both."""
    return on_step and (lambda done, total: on_step(index * total + done, 2 * total))
