"""OPCM: orthogonal projection-based continual merging."""

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from torch import Tensor

from lightning_odem.arguments import check_choice, check_flag, check_patterns, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.layout import matrices, squares, weight_matrices, whole_norms
from lightning_odem.methods.linalg import exact, singular
from lightning_odem.methods.needs import BaseModel
from lightning_odem.methods.task_arithmetic import Recursion

_ROUNDING = 1e-9


def project(task_vector: Tensor, update: Tensor, alpha: float = 0.5) -> Tensor:
    r"""Return the part of a task vector that OPCM keeps beside the accumulated update, both of shape [m, n].

    With the singular value decomposition :math:`\Delta = U S V^T` of the update, the task vector in that basis,
    :math:`U^T \tau V`, loses its diagonal and its leading r x r block. r counts the leading directions whose singular
    values sum up to at most ``alpha`` of all, give or take a billionth for rounding. The direction that crosses the
    threshold is not among them. The blocks beside the leading one stay. Directions that the update does not have are
    left alone; the released code removes the diagonal of an arbitrary basis of them.

    Returns:
        The projected task vector in fp64.

    Example:
        >>> import torch
        >>> update = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> project(torch.ones(3, 3), update, alpha=0.9)
        tensor([[0., 0., 1.],
                [0., 0., 1.],
                [1., 1., 0.]], dtype=torch.float64)
    """
    u, s, v = singular(update)
    task_vector, rows = exact(task_vector), v.T
    within = u.T @ task_vector
    # This takes half the products of going to the basis and back: outside the block only the diagonal entries are
    # needed.
    diagonal = (within * rows).sum(1, keepdim=True)
    removed = diagonal * rows
    if len(s):
        cumulated = s.cumsum(0)
        rank = int((cumulated <= (1 + _ROUNDING) * alpha * cumulated[-1]).sum())
        removed[:rank] = within[:rank] @ v[:, :rank] @ rows[:rank]
    del within, rows, v  # each may be as large as the matrix
    return (u @ removed).neg_().add_(task_vector)


class OPCMMerge(MergeMethod):
    r"""Orthogonal projection-based continual merging (Tang et al., 2025, arXiv 2501.09522).

    The task vector :math:`\tau_k` of each weight matrix is projected against the accumulated update, see
    :func:`project`; other parameters are taken as they are. The accumulated update A is scaled to the mean norm
    :math:`\bar n_k` of all task vectors so far, over all merged parameters:

    - ``"utility"``, eq. 57-58 of the ODE-M paper: :math:`A_k = (1 - t) A_{k-1} + t \hat\tau_k`,
      :math:`\Psi_k = \psi_0 + A_k / \lambda_k` with :math:`\lambda_k = \|A_k\| / \bar n_k`;
    - ``"sum"``, the released code: :math:`A_k = A_{k-1} + \hat\tau_k`. Utility weights have no effect.

    For equal utilities both give the same models, as A differs by the factor k only. :math:`\Psi_1 = \psi_1`. A task of
    weight 0 leaves the merged model and the mean norm untouched; any other task counts fully in the mean norm. The
    order of the tasks matters.

    One merge costs one singular value decomposition per matrix, in fp64. The state is a few numbers: the scale and the
    norms. If the method takes over a stream that another one began, the merged model it finds counts as one task. See
    ``docs/methods.md`` for differences from the released code.

    Args:
        alpha: Share in [0, 1] of the singular values whose directions are protected; 0.5 is the published one.
        recursion: ``"utility"`` or ``"sum"``.
        convolutions: Whether parameters of more than two dimensions are projected too, as matrices
            [out, in * kh * kw].
        layers: Patterns of the weight matrices to project, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.

    Raises:
        ValueError: For an alpha outside [0, 1] or an unknown recursion; when merging, for patterns that match nothing.
    """

    needs = (BaseModel(),)
    by_tensor = "sums"

    def __init__(
        self,
        alpha: float = 0.5,
        recursion: Recursion = "utility",
        convolutions: bool = True,
        layers: Sequence[str] | None = None,
    ) -> None:
        self.alpha = check_range("alpha", alpha, 0, 1)
        self.recursion = check_choice("recursion", recursion, get_args(Recursion))
        self.convolutions = check_flag("convolutions", convolutions)
        self.layers = check_patterns("layers", layers)
        self._scale = 1.0
        self._norms: list[float] = []

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is; its norm is measured with the second."""
        self.load_state_dict({})
        return MergeResult(incoming)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Project, accumulate and scale, in the memory of ``merged`` and one more vector."""
        if t == 0.0:
            return MergeResult(merged)
        accumulated, task_vector = merged.sub_(context[BaseModel]), incoming - context[BaseModel]
        before = [squares(context, accumulated), squares(context, task_vector)]
        accumulated = context.kept(partial(self._accumulate, accumulated, task_vector, t, context))
        first, new, length = whole_norms(context, lambda: [*before, squares(context, accumulated)])
        norms = [*(self._norms or [first]), new]
        # Two task vectors may cancel: then there is no direction left to scale.
        scale = length * len(norms) / sum(norms) if any(norms) else 0.0
        self._scale, self._norms = scale or 1.0, norms
        return MergeResult(accumulated.div_(self._scale).add_(context[BaseModel]))

    def _accumulate(self, accumulated: Tensor, task_vector: Tensor, t: float, context: MergeContext) -> Tensor:
        """Add the projected task vector to the accumulated update, in the memory of both."""
        accumulated *= self._scale
        names = weight_matrices(context, self.layers, convolutions=self.convolutions)
        for task_matrix, update in matrices(context, names, task_vector, accumulated):
            task_matrix.copy_(project(task_matrix, update, self.alpha))
        return accumulated.lerp_(task_vector, t) if self.recursion == "utility" else accumulated.add_(task_vector)

    def state_dict(self) -> dict[str, Any]:
        """The scale of the accumulated update and the norm of each task vector; empty before the second task."""
        return {"scale": self._scale, "norms": list(self._norms)} if self._norms else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream.

        Raises:
            ValueError: If another method wrote it.
        """
        if state and state.keys() != {"scale", "norms"}:
            raise ValueError(f"OPCMMerge keeps scale and norms, but the stream's state has: {', '.join(state)}.")
        self._scale, self._norms = state.get("scale", 1.0), list(state.get("norms", []))
