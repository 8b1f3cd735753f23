"""The closed form of layer-wise least squares, from running sums."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_odem.methods.arguments import check_patterns, check_range
from lightning_odem.methods.base import MergeContext, MergeResult
from lightning_odem.methods.exact_stream import ExactStream, Sums
from lightning_odem.methods.layout import Part, parts, weight_matrices
from lightning_odem.methods.needs import InputMoments

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

    With ``measured`` above 0 the moments are found in part by one pass of the incoming task's calibration samples
    through its own model, see :func:`~lightning_odem.calibration.input_moments`: :math:`C_k` is (1 - measured) times
    the guess plus measured times what was found, both of trace 1. A padded token counts as an input like any other.
    Only the guess is there for weights that are used without their layer being called, such as those within
    ``nn.MultiheadAttention``, for a task without samples, and for a merged model that counts as a task. The order of
    the tasks does not matter but for this: how many samples a task has when it arrives depends on how many tasks came
    before it. A task cannot be taken out again, since its samples would be needed.

    Linear layers and convolutions are merged so, convolutions [out, in, kh, kw] as [out, in * kh * kw]. The layers of a
    packed attention weight and the groups of a convolution are matrices of their own, and weights stored as [in, out]
    are turned, see :func:`~lightning_odem.methods.layout.parts`. Biases and everything else are averaged.

    Published for CLIP ViT-B/32 and 8 tasks (fine-tuned 90.4): one-shot WUDI 85.2 %, RegMean 82.4 %; WUDI as a
    recursion 74.7 %.

    State: two vectors of the model's size, and half of [i, i] per layer, which for ViT-B/32 is 0.91 of such a vector.
    One merge costs one Cholesky factorisation [i, i] per layer. The pass that measures holds [i, i] per layer, 1.7
    vectors there, on the device.

    Args:
        ridge: rho relative to the trace of the summed moments, above 0. 0.1 changes the mean in the few directions
            that dominate the moments, 0.01 in more of them.
        layers: Patterns of the weight matrices to merge so, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.
        recursion: Feed the merged model back in, as the sequential baselines of the literature do.
        measured: Share in [0, 1] of the moments found on samples; 0 needs none, 1 is RegMean's.

    Raises:
        ValueError: For a ridge that is not positive or a share outside [0, 1]; when merging, for patterns that match
            nothing.
    """

    def __init__(
        self,
        ridge: float = 0.1,
        layers: Sequence[str] | None = None,
        recursion: bool = False,
        measured: float = 0.0,
    ) -> None:
        super().__init__(recursion)
        check_range("ridge", ridge, 0, open_low=True)
        check_range("measured", measured, 0, 1)
        self.ridge = ridge
        self.layers = check_patterns("layers", layers)
        self.measured = measured
        if measured:
            # Measured before the base model takes its place on the device.
            self.needs = (InputMoments(), *self.needs)

    def statistics(self, task_vector: Tensor, context: MergeContext) -> Iterator[tuple[str, Tensor]]:
        """The moments of each layer's inputs, their upper triangle, and the update times the moments [o, i]."""
        measured = context[InputMoments] if self.measured else {}
        for part, (update,) in self._parts(task_vector, context):
            moments = guessed_moments(update)
            if part.name in measured:
                found = measured[part.name]
                # The layers of a packed weight have the same inputs.
                found = trace_one(found[part.number % len(found)].to(update))
                moments = moments.lerp(found, self.measured)
            yield CROSS + part.key, update @ moments
            yield MOMENTS + part.key, moments[upper_triangle(moments)]

    def solve(self, mean: Tensor, sums: Sums, context: MergeContext) -> Tensor:
        """Solve every layer's least squares."""
        for part, (matrix,) in self._parts(mean, context):
            moments = symmetric(sums[MOMENTS + part.key].to(matrix), matrix.shape[1])
            matrix.copy_(least_squares(sums[CROSS + part.key].to(matrix), moments, matrix, self.ridge))
        return mean

    def complete(self, merged: Tensor, context: MergeContext) -> None:
        """Take what the sums do not know yet to be as in the merged model [d], its moments to be as guessed."""
        super().complete(merged, context.having(InputMoments, {}))

    def remove(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> MergeResult:
        """Subtract what a task added, and read the merged model of the others.

        Raises:
            ValueError: If moments were measured.
        """
        if self.measured:
            raise ValueError(
                f"ClosedFormMerge with measured={self.measured} cannot take a task out: the moments of its inputs were "
                "found on samples that are gone. With measured=0 it can."
            )
        return super().remove(merged, withdrawn, share, context)

    def _parts(self, vector: Tensor, context: MergeContext) -> Iterator[tuple[Part, tuple[Tensor, ...]]]:
        """The matrices [out, in] in a vector [d]."""
        return parts(context, weight_matrices(context, self.layers), vector, outputs_first=True)


def guessed_moments(update: Tensor) -> Tensor:
    """Second moments [i, i] of a layer's inputs, trace 1, as its update [o, i] shows them; 0 of an update of zeros."""
    square = update.square().sum()
    return update.T @ update / torch.where(square > 0, square, torch.ones_like(square))


def trace_one(moments: Tensor) -> Tensor:
    """Second moments [i, i] scaled to trace 1; 0 where all inputs are zeros."""
    trace = moments.diagonal().sum()
    return moments / torch.where(trace > 0, trace, torch.ones_like(trace))


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
