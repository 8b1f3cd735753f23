"""Layers that multiply their inputs by a weight matrix, and how they store it."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_PIECE = 2**24
"""Entries of the patches that are copied at a time."""


def linear_layers(module: nn.Module, parameters: Mapping[Tensor, str]) -> dict[nn.Module, str]:
    """Find the layers whose weight is one of the parameters, with its name.

    These are linear layers, convolutions (also transposed ones) and the ``Conv1D`` of transformers' GPT-2, each with
    its subclasses. A layer whose weight is computed from other parameters does not count.

    Args:
        module: The module.
        parameters: Names of its parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2))
        >>> list(linear_layers(net, {tensor: name for name, tensor in net.named_parameters()}).values())
        ['0.weight']
    """
    found = {}
    for layer in module.modules():
        # Not by the attribute, because a parametrised layer computes it.
        weight = layer._parameters.get("weight")
        if weight in parameters and (isinstance(layer, (nn.Linear, _ConvNd)) or _is_conv1d(layer)):
            found[layer] = parameters[weight]  # type: ignore[index]
    return found


def number_of_groups(layers: Mapping[nn.Module, str]) -> dict[str, int]:
    """Number of groups in the weights of grouped convolutions, by name."""
    return {name: layer.groups for layer, name in layers.items() if isinstance(layer, _ConvNd) and layer.groups > 1}


def inputs_first(layers: Mapping[nn.Module, str]) -> frozenset[str]:
    """Names of the weights that are stored as [in, out]: those of transposed convolutions and of ``Conv1D``."""
    return frozenset(name for layer, name in layers.items() if isinstance(layer, _ConvTransposeNd) or _is_conv1d(layer))


def multiplied(layer: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Yield what a layer multiplies by its weight, as rows [groups, n, in], one matrix per group.

    For a convolution these are the patches of its inputs, including the padding, for a part of the samples at a time.

    Args:
        layer: One of the :func:`linear_layers`.
        inputs: The inputs of the layer.

    Example:
        >>> import torch
        >>> layer = nn.Conv1d(2, 4, kernel_size=2, groups=2)
        >>> [rows] = multiplied(layer, torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
        >>> rows.tolist()
        [[[1.0, 2.0], [2.0, 3.0]], [[4.0, 5.0], [5.0, 6.0]]]
    """
    if not isinstance(layer, _ConvNd):
        yield inputs.reshape(1, -1, inputs.shape[-1])
        return
    axes = len(layer.kernel_size)
    patches = inputs.reshape(-1, *inputs.shape[-axes - 1 :])  # a single sample may come without a batch dimension
    if not isinstance(layer, _ConvTransposeNd):
        if any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            patches = pad(patches, layer._reversed_padding_repeated_twice, mode)
        for axis, (size, stride, step) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
            patches = patches.unfold(2 + axis, step * (size - 1) + 1, stride)[..., ::step]
    # Patches are [samples, channels, places, offsets in the kernel]. The places are the last axis of the copy, as they
    # are in memory.
    samples = max(_PIECE * len(patches) // max(patches.numel(), 1), 1)
    for piece in patches.split(samples):
        piece = piece.unflatten(1, (layer.groups, -1))
        order = (1, 2, *range(3 + axes, piece.dim()), 0, *range(3, 3 + axes))
        yield piece.permute(order).flatten(-1 - axes).flatten(1, -2).mT


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers, y = x W + b with W [in, nf]; transformers is not imported."""
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__) and hasattr(layer, "nf")
