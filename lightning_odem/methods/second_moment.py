"""Averaging of models weighted by Adam's second moments, entry by entry."""

from typing import Any

import torch
from torch import Tensor

from lightning_odem.arguments import check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.needs import SecondMoments


def share_of_new(old: Tensor | None, new: Tensor, coefficient: float) -> Tensor:
    r"""How much the incoming model counts in each entry, :math:`a F / ((1 - a) \bar F + a F)`.

    It is a itself where a moment is missing (NaN) and where both are zero. All moments are missing if ``old`` is None.

    Example:
        >>> share_of_new(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3.0, 3.0, 0.0]), 0.5)
        tensor([0.7500, 1.0000, 0.5000])
    """
    if old is None:
        return torch.full_like(new, coefficient)
    weighted = coefficient * new
    return weighted.div_(weighted + (1 - coefficient) * old).nan_to_num_(nan=coefficient)


class SecondMomentMerge(MergeMethod):
    r"""Averaging weighted by optimizer second moments, stage B of HCMM (arXiv 2509.23592).

    Adam's running mean of squared gradients at the end of a task's training, F ("exp_avg_sq"), tells how much the
    task's loss depends on each parameter. The merged and the incoming model are averaged with these weights entry by
    entry,

    .. math::
        \Psi_k = \frac{(1 - a) \bar F_{k-1} \Psi_{k-1} + a F_k \psi_k}{(1 - a) \bar F_{k-1} + a F_k}, \qquad
        \bar F_k = (1 - a) \bar F_{k-1} + a F_k,

    from :math:`\Psi_1 = \psi_1, \bar F_1 = F_1`. With equal moments it is the running average. In the paper each task
    is fine-tuned from the merged model, ``ContinualMergeCallback(finetune_from="merged")``.

    An entry has no moment if the optimizer never stepped it or another method began the stream. There, and where both
    moments are zero, the models are interpolated plainly with a.

    A merge takes no gradient and holds three vectors of the model's size besides the mean moments. State: the mean
    moments, one vector on the CPU. See ``docs/methods.md`` for what F is and is not, and for the released code.

    Args:
        coefficient: a in [0, 1], the incoming model's weight; None (the default) takes the operating time, so that
            utility weights count. The default of the released code is 0.4 for every task; its scripts choose among 0.3
            to 0.6. With a number, a task of utility weight 0 leaves the merged model and the moments untouched, and
            other weights have no effect.

    Raises:
        ValueError: For a coefficient outside [0, 1]; when merging, if the state belongs to a model of another size.
    """

    needs = (SecondMoments(),)

    def __init__(self, coefficient: float | None = None) -> None:
        self.coefficient = None if coefficient is None else check_range("coefficient", coefficient, 0, 1)
        self._moments: Tensor | None = None

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is; its moments are kept."""
        self._moments = context[SecondMoments].to("cpu", copy=True)
        return MergeResult(incoming)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Average in the memory of ``merged``, with three more vectors besides the moments."""
        if t == 0.0:
            return MergeResult(merged)
        coefficient = t if self.coefficient is None else self.coefficient
        new, old = context[SecondMoments], self._moments
        if old is not None and old.shape != new.shape:
            raise ValueError(
                f"The stream's second moments are those of {len(old)} parameters, but {len(new)} are merged. Merge the "
                "same parameters in every task, with the same exclude=."
            )
        old = old if old is None else old.to(new)
        merged.lerp_(incoming, share_of_new(old, new, coefficient).to(merged))
        mean = new if old is None else torch.lerp(old, new, coefficient)
        kept = new if old is None else torch.where(old.isnan(), new, old)
        self._moments = torch.where(mean.isnan(), kept, mean).cpu()
        return MergeResult(merged)

    def state_dict(self) -> dict[str, Any]:
        """The mean moments [d]; empty before the first task."""
        return {} if self._moments is None else {"moments": self._moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream.

        Raises:
            ValueError: If another method wrote it.
        """
        if state and state.keys() != {"moments"}:
            raise ValueError(f"SecondMomentMerge keeps moments, but the stream's state has: {', '.join(state)}.")
        self._moments = state.get("moments")
