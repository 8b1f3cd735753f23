"""The frozen base of a model with adapters, known by fingerprints instead of by copies."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_odem.parameters.adapter_search import adapted_layer
from lightning_odem.parameters.shards import local
from lightning_odem.parameters.vector import canonical_name, is_excluded

Digests = Mapping[str, str]
"""Fingerprints of tensors by name: their dtype, and 16 digits of a SHA-256."""

FROZEN = "lightning_odem_frozen"
"""The entry of a checkpoint with the fingerprints of what it leaves out."""


def frozen_base(module: nn.Module, exclude: Sequence[str]) -> dict[str, str]:
    """Fingerprints of what is frozen in a module with adapters; empty for a module without any.

    These are frozen parameters that are not excluded, and within adapted layers all frozen parameters and buffers, as
    of quantised weights. Memory for one of them at a time is needed.

    Args:
        module: The module.
        exclude: Patterns of parameters that are not merged.
    """
    parameters, buffers = dict(_named(module.named_parameters())), dict(_named(module.named_buffers()))
    trained = [name for name, each in parameters.items() if each.requires_grad and not is_excluded(name, exclude)]
    layers = {layer for name in trained if (layer := adapted_layer(name)) is not None}
    if not layers:
        return {}
    adapted = tuple(f"{layer}.base_layer." for layer in layers)
    frozen = {
        name: tensor
        for name, tensor in parameters.items()
        if not tensor.requires_grad and (not is_excluded(name, exclude) or name.startswith(adapted))
    } | {name: tensor for name, tensor in buffers.items() if name.startswith(adapted)}
    return {name: digest(tensor) for name, tensor in frozen.items()}


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """The fingerprint of a tensor; with a dtype, of the tensor rounded to it. A meta tensor has only its shape.

    Example:
        >>> digest(torch.ones(2)), digest(torch.ones(2)) == digest(torch.ones(2).double(), torch.float32)
        ('float32:4571ed8d554af00d', True)
    """
    sha = hashlib.sha256()
    tensor = local(tensor).detach()
    if dtype is not None and tensor.is_floating_point() and dtype.is_floating_point:
        tensor = tensor.to(dtype)
    for part in _plain(tensor):
        sha.update(f"{tuple(part.shape)}{part.dtype}".encode())
        if not part.is_meta:
            sha.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{str(tensor.dtype).removeprefix('torch.')}:{sha.hexdigest()[:16]}"


def changed(module: nn.Module, digests: Digests) -> list[str]:
    """Names of the tensors that are not what their fingerprints say, or are not there."""
    if not digests:
        return []
    there = {**dict(_named(module.named_parameters())), **dict(_named(module.named_buffers()))}
    return [name for name, known in digests.items() if name not in there or _is_other(there[name], known)]


def check_frozen_base(module: nn.Module, digests: Digests) -> None:
    """Refuse a module with another frozen base.

    Raises:
        ValueError: With the first differences and what to do.
    """
    if different := changed(module, digests):
        raise ValueError(
            f"{type(module).__name__} has another frozen base than the stream: {len(different)} of {len(digests)} "
            f"tensors differ or are missing ({', '.join(different[:3])}{', ...' if len(different) > 3 else ''}). The "
            "stream keeps adapters and what else is trained; of the frozen weights under them it knows fingerprints. "
            "Build the module with the pretrained weights that the stream began with, and do not change frozen "
            "weights: one that is to be trained needs requires_grad."
        )


def without_frozen(module: nn.Module, state: Mapping[str, Any], digests: Digests) -> dict[str, Any]:
    """A module's state dict without its frozen base."""
    keys = _keys(module, digests)
    return {key: value for key, value in state.items() if key not in keys}


def keep_frozen_when_loading(module: nn.Module, digests: Digests) -> None:
    """Let a module load a state dict that leaves its frozen base out: the module keeps its own, if it is the same."""
    if module in _hooks:
        _hooks.pop(module).remove()
    if digests:
        _hooks[module] = module.register_load_state_dict_pre_hook(_Complete(digests))


class _Complete:
    """Completes a state dict that is about to be loaded."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        lacking = _keys(module, self._digests)
        if lacking and not any(f"{prefix}{key}" in state for key in lacking):
            check_frozen_base(module, self._digests)
            state.update({f"{prefix}{key}": value for key, value in lacking.items()})


_hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def _keys(module: nn.Module, digests: Digests) -> dict[str, Any]:
    """Entries of a state dict that are the frozen base's, also under the names of tied tensors."""
    tensors = (*_named(module.named_parameters()), *_named(module.named_buffers()))
    frozen = {id(tensor) for name, tensor in tensors if name in digests}
    # What quantised layers add to the state of a weight has the weight's name in front.
    stems = tuple(f"{name}." for name in digests)
    every = module.state_dict(keep_vars=True)
    return {key: value for key, value in every.items() if id(value) in frozen or canonical_name(key).startswith(stems)}


def _named(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((canonical_name(name), tensor) for name, tensor in tensors)


def _is_other(tensor: Tensor, known: str) -> bool:
    return digest(tensor, getattr(torch, known.partition(":")[0], None)) != known


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors of which one consists: itself, unless a subclass keeps others, as of quantised values."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor
