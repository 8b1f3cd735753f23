"""Scaling of losses, so that their gradients do not vanish in fp16."""

import math
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor

_DEFAULT = 2.0**16  # that of torch.amp.GradScaler


class LossScale:
    """A factor on losses before ``backward``, taken out of their gradients afterwards.

    Under fp16 autocast gradients are rounded to zero below 6e-8. The scale is halved, for the present gradient and
    those to come, when that scaled by it is not finite, down to 1: then it is not the scale's doing. It is a power of
    two, so that a gradient which neither vanishes nor overflows has the same bits at any scale.

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
        """Loss and gradient of a function that gives its loss and the gradient times the scale.

        Args:
            loss_and_grad: Called with the scale; again if the gradient is too large for it.
            sum_over_shards: Where the gradient is this process's shard of one: sums numbers over the processes, in
                place. All of them have to lower the scale together, for they evaluate together.
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
    # A norm makes no vector, and is not defined on a shard without entries.
    largest = torch.linalg.vector_norm(grad, math.inf) if len(grad) else grad.new_zeros(())
    if sum_ is not None:
        sum_(largest)
    return bool(largest.isfinite())


def loss_scale(trainer: L.Trainer) -> float:
    """The scale for gradients under a Trainer's precision: that of its GradScaler in fp16, otherwise 1.

    Example:
        >>> loss_scale(L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False))
        1.0
    """
    plugin = trainer.precision_plugin
    if not str(plugin.precision).startswith("16"):
        return 1.0
    scaler = getattr(plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else _DEFAULT
