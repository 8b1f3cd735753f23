"""HCMM: averaging by second moments, then a representation correction."""

from collections.abc import Sequence

from lightning_odem.methods.representation import Loss, RepresentationCorrection
from lightning_odem.methods.second_moment import SecondMomentMerge


class HCMMMerge(RepresentationCorrection):
    """Holistic continual model merging (arXiv 2509.23592), stages B and C, with the defaults of the released code.

    Stage B is :class:`~lightning_odem.methods.second_moment.SecondMomentMerge`, stage C
    :class:`~lightning_odem.methods.representation.RepresentationCorrection`. Stage A, fine-tuning in the tangent space
    of the base model, belongs to the module: ``TaskClassifier(tangent=True)``. The complete method also fine-tunes each
    task from the merged model, ``ContinualMergeCallback(method="hcmm", finetune_from="merged")``.

    Args:
        coefficient: Weight of the incoming model in stage B, in [0, 1]; 0.4 for every task as released. None takes the
            operating time instead, so that utility weights count.
        layers: Patterns of the weight matrices that stage C corrects; None takes the last one.
        lr: Learning rate of stage C. The released 2e-8 was made for CLIP; elsewhere it may be too small to change
            anything.
        loss: Loss of stage C, ``"l1"`` or ``"l2"``.
        weight_decay: AdamW's weight decay in stage C.
        clip: Largest norm of the gradient in stage C.

    Raises:
        ValueError: For numbers out of range or an unknown loss.
    """

    def __init__(
        self,
        coefficient: float | None = 0.4,
        layers: Sequence[str] | None = None,
        lr: float = 2e-8,
        loss: Loss = "l1",
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        super().__init__(SecondMomentMerge(coefficient), layers, lr, loss, weight_decay, clip)
        self.coefficient = coefficient
