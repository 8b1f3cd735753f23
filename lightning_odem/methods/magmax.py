"""MagMax: every parameter gets the largest change that any task made."""

import torch
from torch import Tensor

from lightning_odem.arguments import check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.needs import BaseModel


class MagMaxMerge(MergeMethod):
    r"""Selection by maximum magnitude (Marczak et al., ECCV 2024, arXiv 2407.06322).

    Each entry of the merged task vector comes from the task that changed it most, and
    :math:`\Psi_k = \psi_0 + \lambda \tau`. The merged model holds all that the rule has to remember, so it works as a
    stream: an entry is replaced where :math:`|\lambda \tau_k| \ge |\Psi_{k-1} - \psi_0|`. Between equal changes the
    later one counts, as in the released code. The stream starts from :math:`\psi_0 + \lambda \tau_1`. The order does
    not matter, up to ties.

    Utility weights: the rule has none. A task of weight 0 leaves the merged model untouched; otherwise they have no
    effect. The paper's best numbers come from fine-tuning each task from the model before it. Fine-tuning from the
    shared base model, the default here, is the paper's "independent" variant.

    Args:
        scale: Scaling coefficient, above 0; 0.5 is the published one.

    Raises:
        ValueError: For a scale that is not a positive number.

    Example:
        >>> context = MergeContext(["w"], [(3,)], {BaseModel: torch.zeros(3)})
        >>> merged = torch.tensor([1.0, -2.0, 0.5])
        >>> MagMaxMerge(1.0).merge(merged, torch.tensor([-1.5, 1.0, 0.0]), 0.5, context).theta
        tensor([-1.5000, -2.0000,  0.5000])
    """

    needs = (BaseModel(),)
    sharded = True
    by_tensor = True

    def __init__(self, scale: float = 0.5) -> None:
        self.scale = check_range("scale", scale, 0, open_low=True)

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model with its task vector scaled."""
        return MergeResult(torch.lerp(context[BaseModel], incoming, self.scale))

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Take over the entries that the incoming task moved further, in the memory of ``merged``."""
        if t == 0.0:
            return MergeResult(merged)
        scaled = torch.lerp(context[BaseModel], incoming, self.scale)
        further = (scaled - context[BaseModel]).abs_() >= (merged - context[BaseModel]).abs_()
        return MergeResult(torch.where(further, scaled, merged, out=merged))
