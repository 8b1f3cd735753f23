"""Task singular vectors: the leading directions of every task, made orthogonal to each other."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_odem.arguments import check_flag, check_patterns, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.layout import parts, weight_matrices
from lightning_odem.methods.linalg import exact, singular
from lightning_odem.methods.needs import BaseModel
from lightning_odem.methods.running_average import RunningAverage

Factors = tuple[Tensor, Tensor, Tensor]


class TaskSingularVectorsMerge(MergeMethod):
    r"""TSV-Merge (Gargiulo et al., CVPR 2025, arXiv 2412.00081) as a stream that equals its one-shot form.

    Each weight matrix [m, n] has a task vector :math:`\tau_k = U_k S_k V_k^T`. Its leading
    :math:`r_K = \lfloor \min(m, n) / K \rfloor` (at least one) singular directions are kept. The directions of all K
    tasks are made orthonormal: :math:`\hat U` and :math:`\hat V` are the orthonormal matrices nearest to
    :math:`[U_1 \dots U_K]` and :math:`[V_1 \dots V_K]`, and

    .. math:: \Psi_K = \psi_0 + \lambda\, \hat U\, \mathrm{diag}(S_1, \dots, S_K)\, \hat V^T.

    As more tasks come, each task keeps fewer directions, so truncated factors of earlier tasks are enough and the order
    does not matter. Other parameters are averaged. Utility weights multiply singular values,
    :math:`S_k K w_k / \sum_j w_j`; K counts the tasks with a weight. One task alone gives its own model. A task of
    weight 0 changes nothing, bit by bit. In a stream that another method began, the merged model counts as one task.

    State: the factors, for square matrices at most two vectors of the model's size whatever K is, and the running
    average. One merge costs one singular value decomposition of the update and two of the factors per matrix, and no
    gradient. See ``docs/methods.md``.

    Args:
        scale: lambda, above 0; 1 is the authors' choice.
        layers: Patterns of the weight matrices to merge in this way, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.
        recursion: Feed the merged model back in, as sequential baselines do; utility weights then have no effect.

    Raises:
        ValueError: For a scale that is not positive; when merging, for patterns that match nothing.
    """

    needs = (BaseModel(),)
    by_tensor = True

    def __init__(self, scale: float = 1.0, layers: Sequence[str] | None = None, recursion: bool = False) -> None:
        self.scale = check_range("scale", scale, 0, open_low=True)
        self.layers = check_patterns("layers", layers)
        self.recursion = check_flag("recursion", recursion)
        self._average = RunningAverage()
        self._shares: list[float] = []
        self._factors: list[dict[str, Factors]] = []

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is."""
        self.load_state_dict({})
        self._average.start(incoming, context)
        self._shares, self._factors = [1.0], [self._of(incoming, 1, context)]
        return MergeResult(incoming)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Shorten the factors kept, add the task's factors and join all of them."""
        if t == 0.0:
            return MergeResult(merged)
        if t == 1.0:  # no earlier task has a weight
            return self.start(incoming, context)
        if self.recursion:
            self.load_state_dict({})
            t = 0.5
        if not self._shares:
            self._average.start(merged, context)
            self._shares, self._factors = [1.0], [self._of(merged, 1, context)]
        count = len(self._shares) + 1
        self._shares = [share * (1.0 - t) for share in self._shares] + [t]
        kept = [{key: _leading(factors, count) for key, factors in task.items()} for task in self._factors]
        self._factors = [*kept, self._of(incoming, count, context)]
        theta = self._average.write_(merged, context)  # a parameter new to the stream is as in the merged model
        self._average.move(incoming, t, context)
        self._average.write_(theta, context)
        names = weight_matrices(context, self.layers)
        for part, (matrix, base) in parts(context, names, theta, context[BaseModel]):
            tasks = zip(self._shares, self._factors, strict=True)
            found = [(share, task[part.key]) for share, task in tasks if part.key in task]
            matrix.copy_(base + self.scale * count * joined(found).to(base))
        return MergeResult(theta)

    def state_dict(self) -> dict[str, Any]:
        """The running average, the tasks' shares and their factors; empty before the first task."""
        if not self._shares:
            return {}
        return {**self._average.state_dict(), "shares": list(self._shares), "factors": list(self._factors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream.

        Raises:
            ValueError: If another method wrote it.
        """
        if state and state.keys() != {"average", "shares", "factors"}:
            raise ValueError(
                f"TaskSingularVectorsMerge keeps average, shares and factors, but the stream's state has: "
                f"{', '.join(state)}."
            )
        self._average = RunningAverage()
        self._average.load_state_dict(state)
        self._shares = list(state.get("shares", []))
        self._factors = [{key: _triple(factors) for key, factors in task.items()} for task in state.get("factors", [])]

    def _of(self, model: Tensor, count: int, context: MergeContext) -> dict[str, Factors]:
        """Compute the leading factors of a model's update by matrix, on the CPU."""
        names = weight_matrices(context, self.layers)
        update = model - context[BaseModel]
        return {
            part.key: _triple(factor.to("cpu", matrix.dtype) for factor in _leading(singular(matrix), count))
            for part, (matrix,) in parts(context, names, update)
        }


def joined(tasks: Sequence[tuple[float, Factors]]) -> Tensor:
    """Join all tasks' factors U, S, V into a matrix [m, n]: each S times its share, all directions orthonormal."""
    shares = torch.cat([share * exact(s) for share, (_, s, _) in tasks])
    left, right = (nearest_orthonormal(torch.cat([exact(task[1][side]) for task in tasks], 1)) for side in (0, 2))
    return left * shares @ right.T


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """Find the matrix with orthonormal columns (rows, if it is wide) nearest to ``matrix``: U V^T of its U S V^T.

    Example:
        >>> nearest_orthonormal(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 1.],
                [0., 0.]])
    """
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _leading(factors: Factors, count: int) -> Factors:
    """The leading 1 / count of the directions that a matrix can have, at least one."""
    u, s, v = factors
    rank = max(min(len(u), len(v)) // count, 1)
    return u[:, :rank].clone(), s[:rank].clone(), v[:, :rank].clone()


def _triple(factors: Iterable[Tensor]) -> Factors:
    u, s, v = factors
    return u, s, v
