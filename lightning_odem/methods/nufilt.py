"""NUFILT: null-space filtering of task vectors, with a learned correction."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_odem.arguments import check_choice, check_integer, check_patterns, check_range, check_seed
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.layout import all_weight_matrices, matrices, others, weight_matrices
from lightning_odem.methods.linalg import singular
from lightning_odem.methods.needs import BaseModel

Variant = Literal["full", "null_space"]
Rest = Literal["base", "average"]


def input_directions(update: Tensor, rank: int) -> Tensor:
    """The ``rank`` input directions that an update [m, n] acts on most: its leading right singular vectors [n, r].

    There are fewer if the update has fewer.
    """
    return singular(update)[2][:, :rank].to(update)


def correction(
    task_vector: Tensor,
    update: Tensor,
    seen: Tensor,
    task_rank: int,
    *,
    lora_rank: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> Tensor:
    r"""The low-rank filter B A [n, n] that gives back what the null-space filter took from the task.

    The filter is :math:`P = I - U U^T` for the directions U = ``seen``. V are the task's own leading input directions.
    Adam minimises
    :math:`\|\tau V - (\Delta + \tau P + \tau B A) V\|_F^2 + \|\Delta U - (\Delta + \tau P + \tau B A) U\|_F^2`: the
    result should act like the incoming model on V and like the merged one on U. A starts at N(0, 0.02^2), B at 0.

    Args:
        task_vector: tau, shape [m, n].
        update: Delta, the update of the merged model, shape [m, n].
        seen: U, shape [n, r].
        task_rank: Number of directions V.
        lora_rank: Rank of B A.
        steps: Steps of Adam.
        lr: Adam's learning rate.
        generator: Draws A on the CPU.
    """
    own = input_directions(task_vector, task_rank)
    directions = torch.cat([own, seen], dim=1)
    # What tau B A should do on V and on U; on U the filter leaves nothing to undo.
    wanted = torch.cat([task_vector @ seen @ (seen.T @ own) - update @ own, torch.zeros_like(update @ seen)], dim=1)
    inputs = task_vector.shape[1]
    right = first_values(lora_rank, inputs, generator).to(task_vector)
    left = torch.zeros(inputs, lora_rank).to(task_vector)
    optimizer = torch.optim.Adam([right.requires_grad_(), left.requires_grad_()], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            (wanted - task_vector @ left @ (right @ directions)).square().sum().backward()
            optimizer.step()
    return (left @ right).detach()


def first_values(rank: int, inputs: int, generator: torch.Generator) -> Tensor:
    """The random A [rank, inputs] that the optimisation begins with."""
    return 0.02 * torch.randn(rank, inputs, generator=generator)


class NUFILTMerge(MergeMethod):
    r"""Null-space filtering (Qiu et al., ICLR 2026, arXiv 2509.21413).

    The task vector is added to each targeted weight matrix after a filter on its input side,
    :math:`\Delta_k = \Delta_{k-1} + \tau_k (P + B A)`. P removes the input directions U that the merged update uses
    most, so what was merged before keeps its effect on them. B A gives the task's own leading directions back; it is
    learned without data (:func:`correction`). Targeted matrices start from :math:`\Psi_1 = \psi_1`, P = I.

    A task of weight 0 leaves the merged model untouched. Other utility weights have no effect on the targeted matrices.
    The order of the tasks matters.

    One merge costs one singular value decomposition per matrix, with B A two and ``steps`` steps of Adam. See
    ``docs/methods.md`` for differences from the released code.

    Args:
        variant: ``"full"``, or ``"null_space"`` without B A: no optimisation, and most of the gain.
        null_rank: Number of input directions U that are protected; 128 is the published one.
        null_share: Largest share of a layer's input directions that is protected, in (0, 1]; the default of a sixth is
            the published share.
        task_rank: Number of directions of the task that are given back; 8 is the published one.
        lora_rank: Rank of B A; 64 is the published one.
        steps: Steps of Adam; 50 is the published number.
        lr: Adam's learning rate; 1e-3 is the published one.
        seed: Seed of A's first values.
        others: ``"base"`` (published) or ``"average"`` for all parameters that are not targeted weight matrices.
        layers: Patterns of the weight matrices to target, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.

    Raises:
        ValueError: For numbers out of range or unknown choices; when merging, for patterns that match nothing.
    """

    needs = (BaseModel(),)
    by_tensor = True

    def __init__(
        self,
        variant: Variant = "full",
        null_rank: int = 128,
        null_share: float = 1 / 6,
        task_rank: int = 8,
        lora_rank: int = 64,
        steps: int = 50,
        lr: float = 1e-3,
        seed: int = 0,
        others: Rest = "base",
        layers: Sequence[str] | None = None,
    ) -> None:
        self.variant = check_choice("variant", variant, get_args(Variant))
        self.null_rank = check_integer("null_rank", null_rank, 1)
        self.null_share = check_range("null_share", null_share, 0, 1, open_low=True)
        self.task_rank = check_integer("task_rank", task_rank, 1)
        self.lora_rank = check_integer("lora_rank", lora_rank, 1)
        self.steps = check_integer("steps", steps, 1)
        self.lr = check_range("lr", lr, 0, open_low=True)
        self.seed = check_seed("seed", seed)
        self.others = check_choice("others", others, get_args(Rest))
        self.layers = check_patterns("layers", layers)

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """Take the targeted matrices of the first task; the others are the base model's (or the task's, averaged)."""
        names = weight_matrices(context, self.layers)
        if self.others == "average":
            return MergeResult(incoming)
        first = context[BaseModel].clone()
        for ours, theirs in matrices(context, names, first, incoming):
            ours.copy_(theirs)
        return MergeResult(first)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Filter and add the task vector, matrix by matrix, in the memory of ``merged``."""
        if t == 0.0:
            return MergeResult(merged)
        generator = torch.Generator().manual_seed(self.seed)
        names = weight_matrices(context, self.layers)
        every = iter(all_weight_matrices(context, self.layers))
        views = matrices(context, names, context[BaseModel], merged, incoming)
        for name, (base, old, new) in zip(names, views, strict=True):
            # A matrix gets the same numbers whichever others are merged along with it.
            for other in iter(lambda: next(every), name):
                first_values(self.lora_rank, math.prod(context.all_shapes[other][1:]), generator)
            old += self._filtered(new - base, old - base, generator)
        if self.others == "average":
            for old, new in others(context, names, merged, incoming):
                old.lerp_(new, t)
        return MergeResult(merged)

    def _filtered(self, task_vector: Tensor, update: Tensor, generator: torch.Generator) -> Tensor:
        most = max(round(self.null_share * update.shape[1]), 1)
        seen = input_directions(update, min(self.null_rank, most))
        filtered = task_vector - task_vector @ seen @ seen.T
        if self.variant == "full":
            filtered += task_vector @ correction(
                task_vector,
                update,
                seen,
                self.task_rank,
                lora_rank=self.lora_rank,
                steps=self.steps,
                lr=self.lr,
                generator=generator,
            )
        return filtered
