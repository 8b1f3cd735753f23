"""What becomes of batch-norm statistics in a merge."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_odem.calibration import CalibrationBuffer, MicroBatch
from lightning_odem.parameters import canonical_name, is_excluded

_STATISTICS = ("running_mean", "running_var")
POLICIES = ("average", "keep", "recalibrate")


class BatchNormStatistics:
    """The running statistics of a module's batch-norm layers, and the three ways to merge them.

    ``"average"`` interpolates them with the operating time, as the transport does with weights; ``"keep"`` leaves them
    as they were in the merged model; ``"recalibrate"`` averages them for the flow and re-estimates them afterwards on
    the calibration buffer. During the flow the statistics stand still, so that the loss is one function of the weights.

    Args:
        module: The module; layers without running statistics are passed over.
        exclude: Patterns of parameters that are not merged; statistics of layers they match are left alone.
        policy: One of ``POLICIES``.
    """

    def __init__(self, module: nn.Module, exclude: tuple[str, ...], policy: str) -> None:
        self.policy = policy
        self._layers = {
            canonical_name(name): layer
            for name, layer in module.named_modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not is_excluded(name, exclude)
        }

    def read(self) -> list[Tensor]:
        """Copies of the module's statistics."""
        return [value.clone() for key in _STATISTICS for value in self._all(key)]

    @torch.no_grad()
    def write_(self, values: list[Tensor]) -> None:
        """Set the module's statistics to those of :meth:`read`."""
        targets = [target for key in _STATISTICS for target in self._all(key)]
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)

    @torch.no_grad()
    def interpolate(self, merged: Mapping[str, Tensor], t: float) -> None:
        """Set the module's statistics, now the incoming model's, to those between ``merged`` and them."""
        t = 0.0 if self.policy == "keep" else t
        for name, layer in self._layers.items():
            for key in _STATISTICS:
                statistic = getattr(layer, key)
                before = merged[f"{name}.{key}"].to(statistic)
                statistic.copy_(before.lerp(statistic, t))

    @torch.no_grad()
    def recalibrate(
        self, buffer: CalibrationBuffer, batch_loss: Callable[[MicroBatch], Tensor], batch_size: int
    ) -> None:
        """Re-estimate the statistics on the calibration buffer.

        Mean and variance are those of the pooled samples, each task counted by its share.
        """
        layers = list(self._layers.values())
        momenta = [layer.momentum for layer in layers]
        means, squares = (
            [torch.zeros_like(value, dtype=torch.float64) for value in self._all(key)] for key in _STATISTICS
        )
        try:
            for layer in layers:
                layer.train()
                layer.momentum = 1.0  # the running statistics are then the last batch's own
            for batch in buffer.micro_batches(batch_size):
                batch_loss(batch)
                for mean, square, batch_mean, batch_var in zip(
                    means, squares, *map(self._all, _STATISTICS), strict=True
                ):
                    mean.add_(batch_mean, alpha=batch.share)
                    square.add_(batch_var + batch_mean**2, alpha=batch.share)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.eval()
                layer.momentum = momentum
        for mean, square, running_mean, running_var in zip(means, squares, *map(self._all, _STATISTICS), strict=True):
            running_mean.copy_(mean)
            running_var.copy_(square - mean**2)

    def _all(self, key: str) -> list[Tensor]:
        return [getattr(layer, key) for layer in self._layers.values()]
