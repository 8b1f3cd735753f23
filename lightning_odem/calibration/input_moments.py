"""Second moments of the inputs of a model's linear layers, measured on samples."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.calibration import MicroBatch
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.parameters.linear_layers import multiplied


@torch.no_grad()
def input_moments(
    layers: Mapping[nn.Module, str], batches: Iterable[MicroBatch], batch_loss: Callable[[MicroBatch], Any]
) -> dict[str, Tensor]:
    r"""Mean of :math:`x x^T` over the inputs x of each layer, in one pass of the samples through the module.

    An input is a vector that the layer multiplies by its weight: one token or one patch. All inputs count alike, padded
    tokens too. Sums are in fp32, or in the higher precision of the inputs, whatever precision the pass runs in. They
    are on the inputs' device during the pass.

    Args:
        layers: The layers with the names of their weights, see :func:`~lightning_odem.parameters.linear_layers`.
        batches: The samples.
        batch_loss: Runs the module on a micro-batch; its result is not used.

    Returns:
        The moments [groups, in, in] by the weight's name, on the CPU. A layer that is not called has none. The layers
        within ``nn.MultiheadAttention`` are not called: it uses their weights by itself.

    Raises:
        NonFiniteLossError: If an input is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next(iter((*args, *kwargs.values()))).detach()
        name, precision = layers[layer], torch.promote_types(inputs.dtype, torch.float32)
        with torch.autocast(inputs.device.type, enabled=False):
            for rows in multiplied(layer, inputs):
                rows = rows.to(precision)
                products = rows.mT @ rows
                sums[name] = sums[name].add_(products) if name in sums else products
                counts[name] = counts.get(name, 0) + rows.shape[1]

    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        # Compiled code would not see the hooks.
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                batch_loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: (total / max(counts[name], 1)).cpu() for name, total in sums.items()}
    for name, moments in found.items():
        if not moments.isfinite().all():
            raise NonFiniteLossError(f"the second moments of the inputs of {name} are not finite", 0, 0.0)
    return found
