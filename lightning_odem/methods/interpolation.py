"""Interpolation with a fixed coefficient: an exponential moving average of the models."""

from torch import Tensor

from lightning_odem.arguments import check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult


class LinearInterpolation(MergeMethod):
    """Interpolation (1 - c) merged + c incoming with the same c for every task.

    Unlike the running average it forgets: after k tasks the first model has weight (1 - c)^(k - 1). It needs no data.

    Utility weights: a task of weight 0 leaves the merged model untouched; otherwise they have no effect.

    Args:
        coefficient: c in [0, 1]. The default 0.5 is the plain mean of the two models at hand.

    Raises:
        ValueError: For a coefficient outside [0, 1].

    Example:
        >>> import torch
        >>> LinearInterpolation(0.25).merge(torch.zeros(1), torch.ones(1), 0.5, MergeContext([], [])).theta
        tensor([0.2500])
    """

    sharded = True
    linear = True
    by_tensor = True

    def __init__(self, coefficient: float = 0.5) -> None:
        self.coefficient = check_range("coefficient", coefficient, 0, 1)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Interpolate in the memory of ``merged``."""
        return MergeResult(merged.lerp_(incoming, self.coefficient) if t else merged)
