"""Loss scaling, so that gradients do not vanish in fp16."""

import math
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from torch import Tensor

from lightning_odem.flow.deferred import Deferred, GradientOverflowError, settle

_DEFAULT = 2.0**16  # that of torch.amp.GradScaler

LossAndGrad = Callable[[float], tuple[float | Deferred[float], Tensor]]


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
        self, loss_and_grad: LossAndGrad, sum_over_shards: Callable[[Tensor], None] | None = None
    ) -> tuple[float, Tensor]:
        """Loss and gradient, from a function that gives the loss and the gradient times the scale.

        Args:
            loss_and_grad: Called with the scale, and again with a smaller one if the gradient overflows.
            sum_over_shards: Sums numbers over the processes, in place, if the gradient is this process's shard of one.
                All processes evaluate together, so they have to lower the scale together.
        """
        return settle(partial(self.attempt, loss_and_grad, sum_over_shards))

    def attempt(
        self, loss_and_grad: LossAndGrad, sum_over_shards: Callable[[Tensor], None] | None = None
    ) -> tuple[Deferred[float], Tensor]:
        """As :meth:`differentiate`, with one call of the function and without reading from a device.

        If the gradient has overflowed, the result of the loss is a
        :class:`~lightning_odem.flow.deferred.GradientOverflowError`, and the scale is lower from then on.
        """
        scale = self.value
        found, grad = loss_and_grad(scale)
        loss = Deferred.of(found)
        if scale == 1.0:
            return loss, grad

        def check(loss: float, largest: float) -> float:
            if math.isfinite(loss) and not math.isfinite(largest):
                self.value = scale / 2.0
                raise GradientOverflowError(partial(self.attempt, loss_and_grad, sum_over_shards))
            return loss

        return loss.followed_by(_largest(grad, sum_over_shards), check), grad.div_(scale)


def _largest(grad: Tensor, sum_: Callable[[Tensor], None] | None) -> Tensor:
    """A number that is finite if a gradient is, in all shards."""
    # A norm needs no second vector. It is not defined on a shard without entries.
    largest = torch.linalg.vector_norm(grad, math.inf) if len(grad) else grad.new_zeros(())
    if sum_ is not None:
        sum_(largest)
    return largest


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
