"""The path from the base model along the flattened sum of the tasks, and the gradient flow from its best point."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_odem.arguments import check_integer, check_range, check_seed
from lightning_odem.calibration import CalibrationObjective
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.flow import Descent, NonFiniteLossError, Trajectory
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.bracket import Bracket
from lightning_odem.methods.isotropic import IsotropicMerge
from lightning_odem.methods.layout import matrices, weight_matrices
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.needs import BaseModel, Calibration
from lightning_odem.methods.ode_paper import ODE_STATE, is_earlier_ode_state
from lightning_odem.methods.sampling import Minibatches, hold_out, samples_per_epoch

JUDGES = 32
"""Micro-batches into which held-out samples are cut, so that the spread of their losses is known."""


class ODEMerge(MergeMethod):
    r"""ODE-M on exact sums: an operating point on a path from the base model, then the gradient flow from there.

    As in ODE-M (Lin & Kang, 2026), calibration samples choose an operating point on a path. This path leads from the
    base model along the sum of all task vectors with flattened spectra, see
    :class:`~lightning_odem.methods.IsotropicMerge`:

    .. math:: \theta(\lambda) = \psi_0 + \lambda c_k \bar\sigma U V^T, \qquad U \Sigma V^T = \bar\tau_k,

    for each weight matrix, and the tasks' mean elsewhere. At :math:`\lambda = 1` all matrices together are
    as far from the base model as the tasks' models in the mean.

    1. **How far to go.** :math:`\lambda` is where the calibration loss is lowest, found by
       :class:`~lightning_odem.methods.bracket.Bracket`. If the running average has a lower loss, it is taken instead.
    2. **Gradient flow** from there, by :class:`~lightning_odem.flow.Descent` on three quarters of the samples, in
       pieces of one epoch. The first that does not lower the loss of the other quarter by more than its standard error
       is taken back and ends the flow.

    If gradients do not help, a merge costs about nine passes without gradient and three quarters of one with gradient.
    Besides the models, the search holds two vectors of the model's size, the flow four. A task of weight 0 changes
    nothing. If only one task has a weight, the result is its own model. See ``docs/methods.md``.

    Args:
        batch_size: Samples per minibatch of the flow.
        descent: Length :math:`\kappa` of the flow, in [0, 100]; 0 omits it.
        epochs: Pieces of the flow, each one epoch over its samples.
        seed: Seed of the minibatches; each merge starts from it.

    Raises:
        ValueError: For a number outside its range.
        NonFiniteLossError: When merging, if the loss is not finite anywhere on the path, or not finite in the flow.
    """

    needs = (BaseModel(), Calibration())
    sharded = True

    def __init__(self, batch_size: int = 64, descent: float = 0.006, epochs: int = 2, seed: int = 0) -> None:
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.descent = check_range("descent", descent, 0, 100)
        self.epochs = check_integer("epochs", epochs, 1)
        self.seed = check_seed("seed", seed)
        self._sums = IsotropicMerge()
        self._scale: float | None = None

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is."""
        self.load_state_dict({})
        return self._sums.start(incoming, context)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Add the task to the sums, choose the operating point and follow the flow from there."""
        objective = context[Calibration]
        path = Trajectory(merged, loss1=_finite(objective.loss(incoming), "the loss of the incoming model"))
        path.end(0.0, _finite(objective.loss(merged), "the loss of the merged model"))
        if t == 0.0:
            return MergeResult(merged, path)
        self._sums.complete(merged, context)
        distance = self._distance(incoming, context)
        self._sums.add(merged, incoming, t, context)
        if self._sums.tasks == 1.0:
            path.end(t, path.loss1)
            path.step_norm.append(norm(incoming - merged, context.sum_))
            path.theta = incoming
            return MergeResult(incoming, path)
        theta = self._operating_point(merged, path, objective, context)
        counts = objective.buffer.counts
        if self.descent and any(counts[task] > 1 for task in objective.buffer.shares()):  # else nothing to judge by
            self._flow(theta, merged, distance, path, objective, context)
        path.theta, path.estimated = theta, True
        path.end(t, _finite(objective.loss(theta), "the loss of the new merged model"))
        return MergeResult(theta, path)

    def remove(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> MergeResult:
        """Subtract the task from the sums and read the path of the other tasks at the last scale, without samples.

        If the merged model was nearer to the running average than to that point, the result is the average of the
        others. What the gradient flow had added is lost, since the task was part of it. The next merge searches and
        flows again.

        Raises:
            ValueError: If the sums do not hold the tasks one by one, as in a stream that another method began.
        """
        if share == 0.0:
            return MergeResult(merged)
        self._sums.check_tasks(context)
        self._sums.complete(merged, context)
        is_average = self._is_average(merged, context)
        self._sums.subtract(merged, withdrawn, share, context)
        if is_average or self._sums.tasks == 1.0:
            return MergeResult(self._sums.model_mean(context))
        return MergeResult(self._point(context))

    def state_dict(self) -> dict[str, Any]:
        """The sums and the last scale; empty before the first task."""
        state = self._sums.state_dict()
        return state and {**state, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream, or takes over the stream of another method.

        A state that the ODEMerge of version 0.4 or before wrote is dropped: the merged model then counts as one task.

        Raises:
            ValueError: If another method wrote it.
        """
        if is_earlier_ode_state(state):
            state = {}
        if state and state.keys() != ODE_STATE:
            raise ValueError(f"ODEMerge keeps sums and a scale, but the stream's state has: {', '.join(state)}.")
        self._sums.load_state_dict({key: kept for key, kept in state.items() if key != "scale"})
        self._scale = state.get("scale")

    def _operating_point(
        self, point: Tensor, path: Trajectory, objective: CalibrationObjective, context: MergeContext
    ) -> Tensor:
        """The point of lowest loss on the path, or the running average if that is better; overwrites ``point``."""
        average_loss = objective.loss(self._sums.model_mean(context))
        start, direction = self._path(context)
        bracket = Bracket(
            lambda scale: objective.loss(torch.add(start, direction, alpha=scale, out=point)),
            self._scale or 1.0,
            most=1 if getattr(objective.batch_loss, "rewards_distance", False) else 8,
        )
        lowest = min(bracket.losses)
        if not math.isfinite(min(lowest, average_loss)):
            raise NonFiniteLossError(f"the loss on the path is {lowest}", 0, 0.0)
        path.scale, path.scale_loss, path.average_loss = bracket.scales, bracket.losses, [average_loss]
        if average_loss < lowest:
            path.scale_taken = [0.0]
            return start.copy_(self._sums.model_mean(context))
        self._scale = bracket.lowest
        path.scale_taken = [bracket.lowest]
        return start.add_(direction, alpha=bracket.lowest)

    def _path(self, context: MergeContext) -> tuple[Tensor, Tensor]:
        """Compute where the path begins and how far it leads for scale 1: two new vectors [d]."""
        start = self._sums.read(context)
        direction = torch.zeros_like(start)
        for begin, along, base in matrices(context, weight_matrices(context), start, direction, context[BaseModel]):
            along.copy_(begin).sub_(base)
            begin.copy_(base)
        return start, direction

    def _point(self, context: MergeContext) -> Tensor:
        """The point of the path at the last scale [d]."""
        start, direction = self._path(context)
        return start.add_(direction, alpha=self._scale or 1.0)

    def _is_average(self, merged: Tensor, context: MergeContext) -> bool:
        """Whether the last merge took the running average: the flow from there has not led as far as the path."""
        if self._scale is None:
            return True
        to_point, to_average = (
            norm(taken.sub_(merged)) for taken in (self._point(context), self._sums.model_mean(context))
        )
        return to_average < to_point

    def _flow(
        self,
        theta: Tensor,
        before: Tensor,
        distance: float,
        path: Trajectory,
        objective: CalibrationObjective,
        context: MergeContext,
    ) -> None:
        """Follow the flow in the memory of ``theta`` while held-out samples confirm it; overwrites ``before``."""
        seen, unseen = hold_out(objective, 0.25)
        size = max(-(-len(unseen.buffer) // JUDGES), 1)
        judges = unseen.joined(theta, list(unseen.buffer.micro_batches(size)), size)
        minibatches = Minibatches(self.batch_size, self.seed)
        steps = minibatches.per_epoch(seen.buffer)
        length = self.descent * distance * samples_per_epoch(objective.buffer) / self.batch_size * self.epochs**0.5
        descent = Descent(theta, length, steps * self.epochs)
        gradient = minibatches.gradients(seen)
        losses, taken = unseen.losses(theta, judges), 0
        path.descent_loss = [_mean(losses, judges)]
        for _ in range(self.epochs):
            before.copy_(theta)
            descent.follow(gradient, steps, context.on_step)
            reached = unseen.losses(theta, judges)
            path.descent_loss.append(_mean(reached, judges))
            if not falls(losses, reached, judges):
                theta.copy_(before)
                break
            losses, taken = reached, taken + 1
        path.descent_taken = [float(taken)]
        path.gradient_evaluations = descent.taken
        if not taken:
            rank_zero_info(
                f"Gradients took the loss on held-out samples from {path.descent_loss[0]:.4g} to "
                f"{path.descent_loss[1]:.4g}, no more than by chance: the merged model is the one before them."
            )

    def _distance(self, incoming: Tensor, context: MergeContext) -> float:
        """Distance of the incoming model from the mean of those before, root mean square per weight."""
        before = self._sums.model_mean(context)
        size = len(incoming) if context.shards is None else sum(map(math.prod, context.shapes))
        return norm(incoming - before, context.sum_) / max(size, 1) ** 0.5


def falls(before: list[float], after: list[float], batches: Sequence[MicroBatch]) -> bool:
    """Whether the loss of micro-batches, weighted by their shares, has fallen by more than its standard error.

    Example:
        >>> batches = 2 * [MicroBatch((), "a", share=0.5, transferred=False)]
        >>> falls([1.0, 1.0], [0.5, 0.6], batches), falls([1.0, 1.0], [0.1, 1.7], batches)
        (True, False)
    """
    fall = _mean(before, batches) - _mean(after, batches)
    square = math.fsum(
        (batch.share * (old - new - fall)) ** 2 for old, new, batch in zip(before, after, batches, strict=True)
    )
    count = len(batches)
    return fall > math.sqrt(square * count / max(count - 1, 1))


def _mean(losses: list[float], batches: Sequence[MicroBatch]) -> float:
    return math.fsum(loss * batch.share for loss, batch in zip(losses, batches, strict=True))


def _finite(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"{what} is {loss}", 0, 0.0)
    return loss
