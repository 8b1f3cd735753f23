"""Merging as an optimisation in the subspace of the training trajectory, after the abstract of TRM."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_odem.arguments import check_integer, check_range
from lightning_odem.calibration.task_data import TaskData
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.needs import BaseModel, Need, Snapshots, TrainingData
from lightning_odem.methods.subspace import Subspace, orthonormal


def trajectory_subspace(
    merged: Tensor, incoming: Tensor, t: float, base: Tensor, snapshots: Sequence[Tensor], sizes: Sequence[int]
) -> Subspace:
    """Build the subspace of the training trajectory, with the running average at its origin.

    Each tensor has coefficients of its own. Its directions lead from the merged model to every snapshot and to the
    incoming model, and from the base to the merged model. A coefficient of 1 moves the tensor by the whole distance
    from the merged to the incoming model. This natural unit differs much from tensor to tensor.

    Args:
        merged: Shape [d], like the other models.
        incoming: The end of the trajectory.
        t: Operating time.
        base: The model at which the history begins.
        snapshots: Points of the trajectory.
        sizes: Elements of each tensor, which sum to d.
    """
    bases = []
    for before, start, *path in zip(
        *(model.split(sizes) for model in (merged, base, *snapshots, incoming)), strict=True
    ):
        directions = torch.stack([*(point - before for point in path), before - start])
        bases.append(orthonormal(directions) * norm(path[-1] - before))
    return Subspace(merged.lerp(incoming, t), bases)


def norm_gradient(gradient: Callable[[Tensor], Tensor], theta: Tensor, at_theta: Tensor, epsilon: float) -> Tensor:
    r"""Gradient of the norm of a gradient, :math:`\nabla \|g\| = H g / \|g\|`, without a second backward pass.

    The product of the Hessian H with the unit vector along g is the central difference of two gradients.

    Args:
        gradient: The gradient [d] as a function of the point.
        theta: The point, shape [d].
        at_theta: ``gradient(theta)``, not zero.
        epsilon: How far to go to either side.

    Example:
        >>> curvature = torch.tensor([1.0, 3.0])
        >>> theta = torch.tensor([0.0, 2.0])
        >>> norm_gradient(lambda point: curvature * point, theta, curvature * theta, epsilon=0.5)
        tensor([0., 3.])
    """
    step = at_theta * (epsilon / norm(at_theta))
    return gradient(theta + step).sub_(gradient(theta - step)).div_(2 * epsilon)


class TRMStyleMerge(MergeMethod):
    r"""A reconstruction of Trajectory Regularized Merging from its abstract (Deng & Wang, 2026, arXiv 2605.08311).

    This is TRM-style, not TRM: only the abstract was available, and no code. Everything more specific than an
    optimisation in a subspace under three objectives is reconstructed. The results are not results of the paper.

    The subspace is that of :func:`trajectory_subspace`. The start is the running average. With g the gradient of the
    cross-entropy, Adam minimises over the coefficients, on batches (x, y) of the incoming task's own training data,

    .. math:: \mathrm{CE}(\theta; x, y) + \lambda_c \, \mathrm{KL}(p_{\theta_0}(x) \,\|\, p_\theta(x))
        + \lambda_r \max(0, \kappa \|g(\theta_0)\| - \|g(\theta)\|).

    The three terms are alignment with the task, consistency with the merged model's predictions and responsiveness of
    the gradient, see ``docs/methods.md``. No data of earlier tasks is used. Batches come in the order of the task's
    training dataloader, epoch after epoch.

    A step costs three gradients on a batch and one pass without gradient, and two more gradients while the hinge is
    active. Besides the models and snapshots, S + 2 vectors of the model's size (the basis) and up to eight for points
    and gradients are held.

    Args:
        steps: Adam's steps; 0 gives the running average.
        lr: Adam's learning rate, as a fraction of each tensor's distance from the merged to the incoming model. At
            0.01, 100 steps move a coefficient by about that distance at most.
        consistency: Weight lambda_c.
        responsiveness: Weight lambda_r.
        kappa: Fraction kappa. It is small because a fraction near 1 would undo the alignment.
        snapshots: Largest number S of snapshots of the training run.

    Raises:
        ValueError: For an argument out of its range; when merging, if predictions are not class scores or the training
            dataloader gives no batch.
    """

    needs: Sequence[Need[Any]] = (BaseModel(), Snapshots(8), TrainingData())

    def __init__(
        self,
        steps: int = 100,
        lr: float = 0.01,
        consistency: float = 1.0,
        responsiveness: float = 1.0,
        kappa: float = 0.1,
        snapshots: int = 8,
    ) -> None:
        self.steps = check_integer("steps", steps, 0)
        self.lr = check_range("lr", lr, 0, open_low=True)
        self.consistency = check_range("consistency", consistency, 0)
        self.responsiveness = check_range("responsiveness", responsiveness, 0)
        self.kappa = check_range("kappa", kappa, 0)
        self.snapshots = check_integer("snapshots", snapshots, 1)
        self.needs = (BaseModel(), Snapshots(self.snapshots), TrainingData())

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Optimise the coefficients, starting from the running average.

        Raises:
            NonFiniteLossError: If the loss or a weight becomes infinite or NaN.
        """
        way = norm(incoming - merged)
        if t == 0.0 or way == 0.0:
            return MergeResult(merged)
        data = context[TrainingData]
        sizes = [math.prod(shape) for shape in context.shapes]
        subspace = trajectory_subspace(merged, incoming, t, context[BaseModel], context[Snapshots], sizes)
        # The usual balance of rounding and truncation in a central difference, at the scale of the merge.
        epsilon = way * torch.finfo(merged.dtype).eps ** (1 / 3)
        coefficients = merged.new_zeros(subspace.dimension)
        optimizer = torch.optim.Adam([coefficients], lr=self.lr)
        theta = subspace.origin
        for step, batch in enumerate(islice(_endless(data), self.steps)):
            if context.on_step:
                context.on_step(step, self.steps)
            loss, gradient = self.loss_and_grad(theta, merged, batch, data, epsilon)
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the loss on the task's data is {loss}", step, t)
            coefficients.grad = subspace.pull_back(gradient)
            del gradient
            optimizer.step()
            theta = subspace.point(coefficients)
        if not theta.isfinite().all():
            raise NonFiniteLossError("a weight is not finite", self.steps, t)
        if context.on_step:
            context.on_step(self.steps, self.steps)
        return MergeResult(theta)

    def loss_and_grad(
        self, theta: Tensor, merged: Tensor, batch: Any, data: TaskData, epsilon: float
    ) -> tuple[float, Tensor]:
        """Compute the weighted sum of the three losses on one batch and its gradient by the weights.

        Args:
            theta: The point, shape [d].
            merged: theta_0, shape [d].
            batch: A batch of ``data``.
            data: The incoming task's data.
            epsilon: Step of the finite difference.
        """

        def alignment() -> Tensor:
            return F.cross_entropy(*_predictions(data, batch))

        def consistency() -> Tensor:
            after = _predictions(data, batch)[0].log_softmax(1)
            return F.kl_div(after, before, log_target=True, reduction="batchmean")

        def alignment_gradient(point: Tensor) -> Tensor:
            return data.value_and_grad(point, batch, alignment)[1]

        before = data.evaluate(merged, lambda: _predictions(data, batch)[0].log_softmax(1))
        wanted = self.kappa * norm(alignment_gradient(merged))
        loss, gradient = data.value_and_grad(theta, batch, alignment)
        length = norm(gradient)
        divergence, total = data.value_and_grad(theta, batch, consistency)
        loss += self.consistency * divergence
        total.mul_(self.consistency).add_(gradient)
        if 0.0 < length < wanted:
            loss += self.responsiveness * (wanted - length)
            total.sub_(norm_gradient(alignment_gradient, theta, gradient, epsilon), alpha=self.responsiveness)
        return loss, total


def _predictions(data: TaskData, batch: Any) -> tuple[Tensor, Tensor]:
    """Class scores [B, C], in fp32 at least, and targets."""
    scores, targets = data.predictions(batch)
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"TRM-style merging needs class scores [B, C] as predictions on task {data.task!r}, got shape "
            f"{tuple(scores.shape)}. A method prediction_step(batch, task) -> (scores, targets) decides what they are."
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32)), targets


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "The training dataloader of the incoming task gave no batch; merging needs its data again."
            )
