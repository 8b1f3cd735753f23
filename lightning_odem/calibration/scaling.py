"""Loss scaling, so that gradients do not vanish in fp16."""

import math
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor

_DEFAULT = 2.0**16  # that of torch.amp.GradScaler


class LossScale:
    """A factor on losses before ``backward``; gradients are divided by it afterwards.

    Under fp16 autocast, gradients below 6e-8 are rounded to zero. If the loss is finite and the scaled gradient is not,
    the scale is halved, for this gradient and later ones, down to 1. The scale is a power of two, so a gradient that
    neither vanishes nor overflows has the same bits at any scale.

    Args:
        value: The scale, 1 or more; rounded down to a power of two.

    Example:
        >>> scale = LossScale(1000.0)
        >>> scale.value
        512.0
        >>> scale.differentiate(lambda factor: (2.0, torch.tensor([3.0 * factor])))
        (2.0, tensor([3.]))
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value = 2.0 ** math.floor(math.log2(max(value, 1.0)))

    def differentiate(
        self,
        loss_and_grad: Callable[[float], tuple[float, Tensor]],
        sum_over_shards: Callable[[Tensor], None] | None = None,
    ) -> tuple[float, Tensor]:
        """Loss and gradient, from a function that gives the loss and the gradient times the scale.

        Args:
            loss_and_grad: Called with the scale, and again with a smaller one if the gradient overflows.
            sum_over_shards: Sums numbers over the processes, in place, if the gradient is this process's shard of one.
                All processes evaluate together, so they have to lower the scale together.
        """
        while True:
            loss, grad = loss_and_grad(self.value)
            if self.value == 1.0:
                return loss, grad
            if not math.isfinite(loss) or _is_finite(grad, sum_over_shards):
                return loss, grad.div_(self.value)
            del grad
            self.value /= 2.0


def _is_finite(grad: Tensor, sum_: Callable[[Tensor], None] | None) -> bool:
    """Whether a gradient is finite, in all shards."""
    # A norm needs no second vector. It is not defined on a shard without entries.
    largest = torch.linalg.vector_norm(grad, math.inf) if len(grad) else grad.new_zeros(())
    if sum_ is not None:
        sum_(largest)
    return bool(largest.isfinite())


def loss_scale(trainer: L.Trainer) -> float:
    """The scale for gradients under a Trainer's precision: its GradScaler's scale in fp16, otherwise 1.

    Example:
        >>> loss_scale(L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False))
        1.0
    """
    plugin = trainer.precision_plugin
    if not str(plugin.precision).startswith("16"):
        return 1.0
    scaler = getattr(plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else _DEFAULT
