"""The closed form of layer-wise least squares, from running sums."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_odem.arguments import check_patterns, check_range
from lightning_odem.methods.base import MergeContext, MergeResult
from lightning_odem.methods.exact_stream import ExactStream, Sums
from lightning_odem.methods.layout import Part, parts, weight_matrices
from lightning_odem.methods.needs import InputMoments

MOMENTS, CROSS = "moments/", "cross/"


class ClosedFormMerge(ExactStream):
    r"""Keep the outputs of every linear layer as close as possible to those of all tasks' models.

    For a layer with updates :math:`\tau_k` [o, i] and second moments :math:`C_k` [i, i] of its inputs, the merged
    update solves a least-squares problem,

    .. math:: \min_\Delta \sum_k p_k \lVert (\Delta - \tau_k) C_k^{1/2} \rVert^2
        + \rho \lVert \Delta - \bar\tau \rVert^2, \qquad
        \Delta = \Bigl(\sum_k p_k \tau_k C_k + \rho \bar\tau\Bigr) \Bigl(\sum_k p_k C_k + \rho I\Bigr)^{-1}.

    This is RegMean (Jin et al., ICLR 2023) with a ridge that pulls towards the mean update. By default :math:`C_k` is
    guessed as :math:`\tau_k^T \tau_k / \lVert \tau_k \rVert^2`, which needs no data and minimises the objective of
    WUDI-Merging (Cheng et al., ICML 2025). Linear layers and convolutions are merged so, all else is averaged. The
    stream equals the one-shot solution in any order, see :class:`~lightning_odem.methods.ExactStream`.

    State: two vectors of the model's size, and half of [i, i] per layer. One merge costs one Cholesky factorisation
    [i, i] per layer. With ``measured``, one pass of the task's samples through its own model measures the moments, see
    :func:`~lightning_odem.calibration.input_moments`; then no task can be taken out again. See ``docs/methods.md``.

    Args:
        ridge: rho relative to the trace of the summed moments, above 0. 0.1 changes the mean in the few directions that
            dominate the moments, 0.01 in more directions.
        layers: Patterns of the weight matrices to merge in this way, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes all.
        recursion: Feed the merged model back in, as the sequential baselines of the literature do.
        measured: Share in [0, 1] of the moments measured on samples; 0 needs no samples, 1 is RegMean's choice.

    Raises:
        ValueError: For a ridge that is not positive or a share outside [0, 1]; when merging, for patterns that match
            nothing.
    """

    by_tensor = True

    def __init__(
        self,
        ridge: float = 0.1,
        layers: Sequence[str] | None = None,
        recursion: bool = False,
        measured: float = 0.0,
    ) -> None:
        super().__init__(recursion)
        self.ridge = check_range("ridge", ridge, 0, open_low=True)
        self.layers = check_patterns("layers", layers)
        self.measured = check_range("measured", measured, 0, 1)
        if measured:
            # Measured before the base model takes its place on the device.
            self.needs = (InputMoments(), *self.needs)

    def statistics(self, task_vector: Tensor, context: MergeContext) -> Iterator[tuple[str, Tensor]]:
        """Yield the upper triangle of the moments of each layer's inputs, and the update times the moments [o, i]."""
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
        """Fill in what the sums do not know yet from the merged model [d], with guessed moments."""
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
    """Second moments [i, i] of a layer's inputs, trace 1, guessed from its update [o, i]; 0 for an update of zeros."""
    square = update.square().sum()
    return update.T @ update / torch.where(square > 0, square, torch.ones_like(square))


def trace_one(moments: Tensor) -> Tensor:
    """Scale second moments [i, i] to trace 1; 0 if all inputs are zeros."""
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
    """A boolean mask of the entries of a square matrix that lie on or above the diagonal."""
    return torch.ones_like(matrix, dtype=torch.bool).triu()


def symmetric(triangle: Tensor, size: int) -> Tensor:
    """Build the symmetric matrix [size, size] from its upper triangle in row-major order.

    Example:
        >>> symmetric(torch.tensor([1.0, 2.0, 3.0]), 2)
        tensor([[1., 2.],
                [2., 3.]])
    """
    matrix = triangle.new_zeros(size, size)
    matrix[upper_triangle(matrix)] = triangle
    return matrix + matrix.triu(1).T
