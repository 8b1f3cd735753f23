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
from lightning_odem.methods.control_variate import ControlVariate
from lightning_odem.methods.layout import tensors
from lightning_odem.methods.linalg import cosine
from lightning_odem.methods.running_average import RunningAverage
from lightning_odem.methods.sampling import halve

SHARES = (0.0, 0.5, 1.0)
"""Shares of a path's departure from the running average at which the loss is measured."""

_ROUNDING = 1e-6
_DEPARTURES = ("departure_a", "departure_b")
STATE = {"average", *_DEPARTURES, "gradient", "samples"}
"""Keys of the state."""


class Follow(Protocol):
    """Follows a path from ``start`` in its memory with the samples of ``context``; ``unseen`` are the others.

    ``correction`` is to be added to gradients on its samples.
    """

    def __call__(
        self,
        start: Tensor,
        incoming: Tensor,
        t: float,
        context: MergeContext,
        unseen: CalibrationObjective,
        correction: Tensor | None,
    ) -> MergeResult:
        """Follow the path."""
        ...


class CrossFit:
    r"""Goes as far from the running average as samples confirm that were not used to get there (cross-fitting).

    The calibration samples are cut in halves A and B, a sample staying in its half for good, and one path is followed
    with the gradients of each. At the end of merge k the paths are at :math:`\theta^A` and :math:`\theta^B`. With
    :math:`\bar\theta_k = (1 - t) \bar\theta_{k-1} + t \theta_1` the running average, which has seen no sample, and L_A,
    L_B the loss on the halves,

    .. math:: \Psi_k = \bar\theta_k + \frac{\delta_k^A + \delta_k^B}{2}, \qquad
        \delta_k^{A} = s_k (\theta^{A} - \bar\theta_k), \quad \delta_k^{B} = s_k (\theta^{B} - \bar\theta_k).

    The next merge's paths begin where these departures end, at :math:`\bar\theta_k + \delta_k^A` and
    :math:`\bar\theta_k + \delta_k^B`: what a descent has found for k tasks is built upon, also where it was found with
    samples that have left the buffer since. Of the other half's samples a path knows single numbers: the shares, the
    coefficient of its correction, and a time where paths choose it.

    How far to go, s, is judged on samples that the path did not see: the mean of
    :math:`L_B(\bar\theta_k + s (\theta^A - \bar\theta_k))` and :math:`L_A(\bar\theta_k + s (\theta^B - \bar\theta_k))`
    at s = 0, 1/2 and 1 is a parabola :math:`\ell_0 + b s + a s^2`. The slope of the merged model's loss is the same b,
    its curvature less, for what is noise in the two departures cancels in their mean: :math:`a (1 + c) / 2`, with c the
    cosine between them (exactly, if the loss is curved alike in all directions). Hence

    .. math:: s = \mathrm{clip}\left(\frac{-b}{(1 + c)\, a},\ 0,\ 1\right).

    Where gradients only fit their own samples s is 0, the merged model is the running average, bit for bit, and the
    next paths begin there; where paths are too long they are shortened. Both paths together cost the gradients of one
    over all samples; judging costs three passes over all samples without gradient, and one more measures the result.

    Gradients on each half are corrected by what is known of the tasks beyond their samples in the buffer, see
    :class:`~lightning_odem.methods.control_variate.ControlVariate`.

    The running average and both departures are kept between merges, in main memory. While the second path goes on, the
    end of the first is held beside it.

    Example:
        >>> best_share([3.0, 2.0, 3.0], cosine=1.0), best_share([3.0, 2.5, 3.0], cosine=0.0)
        (0.5, 1.0)
        >>> best_share([1.0, 2.0, 5.0], cosine=0.0), best_share([5.0, 3.0, 2.0], cosine=0.0)
        (0.0, 1.0)
    """

    def __init__(self) -> None:
        self._average = RunningAverage()
        self._control = ControlVariate()
        self._departures: list[dict[str, Tensor]] = [{}, {}]

    def start(self, incoming: Tensor, context: MergeContext) -> None:
        """Begin a stream with its first model [d]."""
        self._average.start(incoming, context)
        self._control.add(context)

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
        self._control.add(context)
        start = self._start(0, merged, context)
        corrections = list(self._control.corrections(halves, start, context))
        results, unseen_loss = [], [0.0] * len(SHARES)
        for index, (seen, unseen) in enumerate((halves, halves[::-1])):
            part = replace(context, calibration=seen, on_step=_half(context.on_step, index))
            if index:
                start = self._start(1, torch.empty_like(incoming), context)
            correction = corrections.pop(0)
            if correction is not None:
                correction = correction.to(incoming.device)
            result = follow(start, incoming, t, part, unseen, correction)
            straight = self._straight(incoming, result.t, t, context)
            result.theta.sub_(straight)  # the departure from here on
            for number, share in enumerate(SHARES):
                unseen_loss[number] += unseen.loss(straight.add(result.theta, alpha=share)) / 2
            results.append(result)
            del straight, correction  # not held while the second path is followed
        first, second = results
        share = best_share(unseen_loss, cosine(first.theta, second.theta, context.sum_))
        if not share:
            rank_zero_info(
                f"The gradients of half of the samples took the loss on the other half from {unseen_loss[0]:.4g} to "
                f"{unseen_loss[-1]:.4g}: the merged model is the running average."
            )
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
        for end in results:
            if share:
                end.theta.mul_(share)
            else:  # a path that is given up need not be finite
                end.theta.zero_()
        self._departures = [
            kept | {name: piece.to("cpu", copy=True) for name, piece in tensors(end.theta, context).items()}
            for kept, end in zip(self._departures, results, strict=True)
        ]
        return MergeResult(theta, path, time)

    def state_dict(self) -> dict[str, Any]:
        """The running average, both halves' departures and the tasks' mean gradient; empty before the first task."""
        departures = {key: kept for key, kept in zip(_DEPARTURES, self._departures, strict=True) if kept}
        return self._average.state_dict() | departures | self._control.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; with an empty one the next merge takes the merged model for the average."""
        self._average.load_state_dict(state)
        self._control.load_state_dict(state)
        self._departures = [dict(state.get(key, {})) for key in _DEPARTURES]

    def _start(self, half: int, vector: Tensor, context: MergeContext) -> Tensor:
        """Where the path of a half begins, in the memory of a vector [d]."""
        start = self._average.write_(vector, context)
        for name, piece in tensors(start, context).items():
            if name in self._departures[half]:
                piece.add_(self._departures[half][name].to(piece.device))
        return start

    def _straight(self, incoming: Tensor, reached: float | None, t: float, context: MergeContext) -> Tensor:
        """The running average with the incoming model, at the time that a path has reached; a new vector."""
        average = self._average.write_(torch.empty_like(incoming), context)
        return average.lerp_(incoming, t if reached is None else reached)


def best_share(losses: Sequence[float], cosine: float) -> float:
    """Where in [0, 1] the mean of two departures is best, from the losses of each by itself.

    Losses that differ by less than a millionth confirm nothing, for rounding does as much: the share is 0 then.

    Args:
        losses: At 0, 1/2 and 1 times a departure, on samples that it was not made with.
        cosine: Cosine between the departures.
    """
    at_0, half_way, at_1 = losses
    slope = 4.0 * half_way - 3.0 * at_0 - at_1
    curvature = at_1 - 2.0 * half_way + at_0
    of_mean = (1.0 + cosine) * curvature  # that of each by itself is halved
    if not math.isfinite(of_mean) or max(losses) - min(losses) <= _ROUNDING * max(map(abs, losses)):
        return 0.0
    if curvature <= 0.0:
        return 1.0 if at_1 < at_0 else 0.0
    if of_mean <= 0.0:  # up to rounding the departures cancel
        return 1.0 if slope < 0.0 else 0.0
    return min(max(0.0, -slope / (2.0 * of_mean)), 1.0)


def _half(on_step: Callable[[int, int], None] | None, index: int) -> Callable[[int, int], None] | None:
    """Progress of one of two paths as that of both."""
    return on_step and (lambda done, total: on_step(index * total + done, 2 * total))
