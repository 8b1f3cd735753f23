"""DOP: dual projections, a merge that stays close to each of the two models in the directions it has moved along."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_odem.arguments import check_choice, check_integer, check_patterns, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.layout import matrices, others, weight_matrices
from lightning_odem.methods.linalg import exact, singular
from lightning_odem.methods.needs import BaseModel

Solver = Literal["adam", "sylvester"]
Rest = Literal["mean", "average"]

_ROUNDING = 1e-9


class ProjectionLoss:
    r"""Squared distance from one model along the directions it has moved, for one weight matrix.

    With the singular value decomposition :math:`D = U S V^T` of the model's update,
    :math:`L(W) = \|S U^T (W - D)\|_F^2 + \|(W - D) V S\|_F^2`, where W is an update too (base subtracted).

    Args:
        update: D, shape [m, n].
        mass: Share of the singular values' sum up to which directions count. A sum that is short of it by a billionth
            counts as having reached it, since that is rounding.
    """

    def __init__(self, update: Tensor, mass: float = 1.0) -> None:
        u, s, v = singular(update)
        rank = int((s.cumsum(0) < (1 - _ROUNDING) * mass * s.sum()).sum()) + 1
        self.update = update
        self.left, self.right = ((basis[:, :rank] * s[:rank]).to(update) for basis in (u, v))

    def __call__(self, weight: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient at a matrix of shape [m, n]."""
        distance = weight - self.update
        rows, columns = self.left.T @ distance, distance @ self.right
        loss = float(rows.square().sum() + columns.square().sum())
        return loss, 2 * (self.left @ rows + columns @ self.right.T)


def min_norm_weight(first: Tensor, second: Tensor) -> float:
    """The c that minimises ||c first + (1 - c) second||, 0.001 off the ends of [0, 1] (Sener & Koltun, NeurIPS 2018).

    Example:
        >>> min_norm_weight(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        0.8
    """
    first, second = exact(first).flatten(), exact(second).flatten()
    first_first, mixed, second_second = float(first @ first), float(first @ second), float(second @ second)
    if mixed >= first_first:
        return 0.999
    if mixed >= second_second:
        return 0.001
    return (second_second - mixed) / (first_first + second_second - 2 * mixed)


def descend(old: Tensor, new: Tensor, alpha: float, *, steps: int, lr: float, smoothing: float, mass: float) -> Tensor:
    """Minimise both losses by Adam from the mean of the two updates, as published.

    The weight of the old loss starts at ``alpha``. It follows the min-norm weight of the gradients, each divided by its
    loss, as a moving average: every step keeps ``smoothing`` of it.

    Args:
        old: Update of the merged model, shape [m, n].
        new: Task vector, shape [m, n].
        alpha: First weight of the old loss.
        steps: Steps of Adam.
        lr: Adam's learning rate, in units of the weights.
        smoothing: In [0, 1]; 1 keeps the weight fixed.
        mass: See :class:`ProjectionLoss`.

    Returns:
        The merged update, shape [m, n].
    """
    losses = ProjectionLoss(old, mass), ProjectionLoss(new, mass)
    weight = (old + new) / 2
    optimizer = torch.optim.Adam([weight], lr=lr)
    for _ in range(steps):
        (old_loss, old_gradient), (new_loss, new_gradient) = (loss(weight) for loss in losses)
        # A loss of 0 has no gradient either.
        balanced = min_norm_weight(old_gradient / (old_loss or 1.0), new_gradient / (new_loss or 1.0))
        alpha = smoothing * alpha + (1 - smoothing) * balanced
        weight.grad = alpha * old_gradient + (1 - alpha) * new_gradient
        optimizer.step()
    return weight


def solve(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    r"""Find the exact minimum of alpha L_old + (1 - alpha) L_new.

    The minimum solves the Sylvester equation :math:`A W + W B = 2 \sum_i \alpha_i D_i D_i^T D_i`, where A and B are the
    weighted sums of :math:`D_i D_i^T` and :math:`D_i^T D_i`. It is computed in the eigenbases of A and B, in fp64. If
    there are several minima, the smallest one is returned: what neither update reaches stays as in the base model.

    Returns:
        The merged update, shape [m, n], in fp64.

    Example:
        >>> old, new = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> solve(old, new, 0.5)
        tensor([[2., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    parts = alpha**0.5 * old, (1 - alpha) ** 0.5 * new
    left, left_values, _ = singular(torch.cat(parts, dim=1))
    _, right_values, right = singular(torch.cat(parts, dim=0))
    # In this order the factors of faint directions are small before they are multiplied, so division is safe.
    target = sum(
        (left.T @ exact(part)) @ (exact(part).T @ (exact(update) @ right))
        for part, update in zip(parts, (old, new), strict=True)
    )
    return left @ (2 * target / (left_values.square()[:, None] + right_values.square())) @ right.T


class DOPMerge(MergeMethod):
    r"""Dual orthogonal projections (Yang et al., "Continual Model Merging without Data", NeurIPS 2025).

    Each weight matrix is merged by minimising :math:`\alpha L_{old} + (1 - \alpha) L_{new}`, the
    :class:`ProjectionLoss` of the merged and of the incoming model. ``"adam"`` takes a fixed number of steps from the
    mean of the two, as published (:func:`descend`); ``"sylvester"`` goes to the minimum (:func:`solve`). The stream
    starts from :math:`\Psi_1 = \psi_1`. The order of the tasks matters.

    A task of weight 0 leaves the merged model untouched. Other utility weights have an effect only with ``alpha=None``
    and ``others="average"``.

    Adam multiplies each matrix with others of its size eight times per step, so a transformer needs a GPU. The closed
    form costs two singular value decompositions per matrix. See ``docs/methods.md`` for differences from the released
    code.

    Args:
        alpha: Weight of the merged model's loss in [0, 1], with ``"adam"`` the first weight; 0.8 is the published one.
            None takes 1 - t.
        solver: ``"adam"`` or ``"sylvester"``. The arguments from here up to ``mass`` are Adam's.
        steps: Steps of Adam; 200 is the published number.
        lr: Adam's learning rate; the published 1e-4 moves an entry by 0.02 at most, enough for fine-tuned transformers.
        smoothing: How much of its weight the old loss keeps per step, in [0, 1]; 0.999 is published, 1 fixes it.
        mass: Share of the singular values, in (0, 1], whose directions count; 0.99999 is the published one.
        others: ``"mean"`` of the two models (published) or the running ``"average"``, for all parameters that are not
            targeted weight matrices.
        layers: Patterns of the weight matrices to target, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.

    Raises:
        ValueError: For numbers out of range or unknown choices; when merging, for patterns that match nothing.
    """

    needs = (BaseModel(),)
    by_tensor = True

    def __init__(
        self,
        alpha: float | None = 0.8,
        solver: Solver = "adam",
        steps: int = 200,
        lr: float = 1e-4,
        smoothing: float = 0.999,
        mass: float = 0.99999,
        others: Rest = "mean",
        layers: Sequence[str] | None = None,
    ) -> None:
        self.alpha = None if alpha is None else check_range("alpha", alpha, 0, 1)
        self.solver = check_choice("solver", solver, get_args(Solver))
        self.steps = check_integer("steps", steps, 1)
        self.lr = check_range("lr", lr, 0, open_low=True)
        self.smoothing = check_range("smoothing", smoothing, 0, 1)
        self.mass = check_range("mass", mass, 0, 1, open_low=True)
        self.others = check_choice("others", others, get_args(Rest))
        self.layers = check_patterns("layers", layers)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge matrix by matrix in the memory of ``merged``."""
        if t == 0.0:
            return MergeResult(merged)
        alpha = 1 - t if self.alpha is None else self.alpha
        names = weight_matrices(context, self.layers)
        for base, old, new in matrices(context, names, context[BaseModel], merged, incoming):
            old.copy_(self._merge_updates(old - base, new - base, alpha)).add_(base)
        for old, new in others(context, names, merged, incoming):
            old.lerp_(new, 0.5 if self.others == "mean" else t)
        return MergeResult(merged)

    def _merge_updates(self, old: Tensor, new: Tensor, alpha: float) -> Tensor:
        if self.solver == "sylvester":
            return solve(old, new, alpha)
        return descend(old, new, alpha, steps=self.steps, lr=self.lr, smoothing=self.smoothing, mass=self.mass)
