"""The utility-weighted running average, the baseline that every other rule is compared with."""

from torch import Tensor

from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult


class AverageMerge(MergeMethod):
    """Continual averaging, (1 - t) merged + t incoming (eq. 45 of the paper; "SWA" in its tables).

    With t_k = w_k / W_k the merged model is always the weighted mean of all models seen (eq. 46). It needs no data.

    Example:
        >>> import torch
        >>> AverageMerge().merge(torch.zeros(2), torch.ones(2), 0.25, MergeContext([], [])).theta
        tensor([0.2500, 0.2500])
    """

    sharded = True
    linear = True
    by_tensor = True

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Interpolate in the memory of ``merged``."""
        return MergeResult(merged.lerp_(incoming, t))

    def remove(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> MergeResult:
        """The mean of the other models, (merged - share withdrawn) / (1 - share), in the memory of ``merged``."""
        return MergeResult(merged.lerp_(withdrawn, -share / (1.0 - share)))
