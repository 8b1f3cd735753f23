"""The closed form of layer-wise least squares, from running sums."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_odem.methods.arguments import check_patterns, check_range
from lightning_odem.methods.base import MergeContext
from lightning_odem.methods.exact_stream import ExactStream, Sums
from lightning_odem.methods.layout import parts, weight_matrices

MOMENTS, CROSS = "moments/", "cross/"


class ClosedFormMerge(ExactStream):
    r"""Every linear layer stays as close as it can, in its outputs, to all tasks' models.

    For a layer with the tasks' updates :math:`\tau_k` [o, i] and the second moments :math:`C_k` [i, i] of its inputs,
    the merged update solves a least-squares problem,

    .. math:: \min_\Delta \sum_k p_k \lVert (\Delta - \tau_k) C_k^{1/2} \rVert^2
        + \rho \lVert \Delta - \bar\tau \rVert^2, \qquad
        \Delta = \Bigl(\sum_k p_k \tau_k C_k + \rho \bar\tau\Bigr) \Bigl(\sum_k p_k C_k + \rho I\Bigr)^{-1}.

    This is RegMean (Jin et al., ICLR 2023) with the ridge pulling towards the mean update :math:`\bar\tau`. No data are
    needed: gradient steps lie in the span of the inputs, so :math:`C_k` is guessed as
    :math:`\tau_k^T \tau_k / \lVert \tau_k \rVert^2`. With that guess it is the minimum of the objective of WUDI-Merging
    (Cheng et al., ICML 2025), which is found there by Adam. Both sums are running sums, see
    :class:`~lightning_odem.methods.ExactStream`, so the stream equals the one-shot solution in any order.

    Linear layers and convolutions are merged so, convolutions [out, in, kh, kw] as [out, in * kh * kw]; the layers of a
    packed attention weight are matrices of their own. Everything else is averaged.

    Published for CLIP ViT-B/32 and 8 tasks (fine-tuned 90.4): one-shot WUDI 85.2 %, RegMean 82.4 %; WUDI as a
    recursion 74.7 %.

    State: two vectors of the model's size, and half of [i, i] per layer, which for ViT-B/32 is 0.87 of such a vector.
    One merge costs one Cholesky factorisation [i, i] per layer.

    Args:
        ridge: rho relative to the trace of the summed moments, above 0. 0.1 changes the mean in the few directions
            that dominate the moments, 0.01 in more of them.
        layers: Patterns of the weight matrices to merge so, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.
        recursion: Feed the merged model back in, as the sequential baselines of the literature do.

    Raises:
        ValueError: For a ridge that is not positive; when merging, for patterns that match nothing.
    """

    def __init__(self, ridge: float = 0.1, layers: Sequence[str] | None = None, recursion: bool = False) -> None:
        super().__init__(recursion)
        check_range("ridge", ridge, 0, open_low=True)
        self.ridge = ridge
        self.layers = check_patterns("layers", layers)

    def statistics(self, task_vector: Tensor, context: MergeContext) -> Iterator[tuple[str, Tensor]]:
        """The moments of each layer's inputs, their upper triangle, and the update times the moments [o, i]."""
        for key, _, (update,) in parts(context, weight_matrices(context, self.layers), task_vector):
            moments = guessed_moments(update)
            yield CROSS + key, update @ moments
            yield MOMENTS + key, moments[upper_triangle(moments)]

    def solve(self, mean: Tensor, sums: Sums, context: MergeContext) -> Tensor:
        """Solve every layer's least squares."""
        for key, _, (matrix,) in parts(context, weight_matrices(context, self.layers), mean):
            moments = symmetric(sums[MOMENTS + key].to(matrix), matrix.shape[1])
            matrix.copy_(least_squares(sums[CROSS + key].to(matrix), moments, matrix, self.ridge))
        return mean


def guessed_moments(update: Tensor) -> Tensor:
    """Second moments [i, i] of a layer's inputs, trace 1, as its update [o, i] shows them; 0 of an update of zeros."""
    square = update.square().sum()
    return update.T @ update / torch.where(square > 0, square, torch.ones_like(square))


def least_squares(cross: Tensor, moments: Tensor, mean: Tensor, ridge: float) -> Tensor:
    r"""The update [o, i] that solves :math:`\Delta (C + \rho I) = X + \rho \bar\tau`.

    Args:
        cross: X, the mean of the updates times their moments, shape [o, i].
        moments: C, the mean of the moments, shape [i, i].
        mean: The mean update, shape [o, i].
        ridge: rho relative to the trace of C.
    """
    rho = ridge * moments.diagonal().sum()
    if not rho > 0:  # no task has moved the layer
        return mean
    factor = torch.linalg.cholesky(moments + rho * torch.eye(len(moments)).to(moments))
    return torch.cholesky_solve((cross + rho * mean).T, factor).T


def upper_triangle(matrix: Tensor) -> Tensor:
    """Which entries of a square matrix lie on or above the diagonal, a boolean mask."""
    return torch.ones_like(matrix, dtype=torch.bool).triu()


def symmetric(triangle: Tensor, size: int) -> Tensor:
    """The symmetric matrix [size, size] of an upper triangle in row-major order.

    Example:
        >>> symmetric(torch.tensor([1.0, 2.0, 3.0]), 2)
        tensor([[1., 2.],
                [2., 3.]])
    """
    matrix = triangle.new_zeros(size, size)
    matrix[upper_triangle(matrix)] = triangle
    return matrix + matrix.triu(1).T
