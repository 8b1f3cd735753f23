"""The module as one of its tasks: with what that task keeps for itself in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_odem.parameters.shards import find_shards
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot
from lightning_odem.parameters.vector import canonical_name

Slot = tuple[nn.Module, str, Tensor]
"""Submodule, name of one of its parameters or buffers, and what is there."""


@contextmanager
def as_task(module: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block with a task's own parameters in a module; afterwards the module has those that it had.

    Tensors are put in the place of others, not copied into them, so they may have other shapes, as a head with other
    classes. Nothing is copied where they are on the module's device. They take no gradient. Parameters that processes
    share are written in place instead, so their shapes have to be the same.

    Args:
        module: The module.
        own: Parameters and buffers by name; the module has to have all of the names.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> with as_task(net, {"weight": torch.ones(3, 1), "bias": torch.zeros(3)}):
        ...     net(torch.ones(1))
        tensor([1., 1., 1.])
        >>> net.weight.shape
        torch.Size([2, 1])
    """
    slots = _slots(module, own)
    if find_shards({name: found[0][2] for name, found in slots.items()}) is not None:
        before = take_snapshot(module, lambda name: name in own)
        load_snapshot(module, own, lambda name: name in own)
        try:
            yield
        finally:
            load_snapshot(module, before, lambda name: name in before)
        return
    try:
        for name, found in slots.items():
            _replace(found, own[name], requires_grad=False)
        yield
    finally:
        for owner, leaf, tensor in (slot for found in slots.values() for slot in found):
            _set(owner, leaf, tensor)


@torch.no_grad()
def put_task_parameters(module: nn.Module, own: Snapshot) -> None:
    """Give a module a task's own parameters for good: written in place where shapes agree, else put in their place."""
    slots = _slots(module, own)
    other = {name: found for name, found in slots.items() if found[0][2].shape != own[name].shape}
    if find_shards({name: found[0][2] for name, found in slots.items()}) is not None:
        other = {}
    for name, found in other.items():
        _replace(found, own[name].clone(), requires_grad=found[0][2].requires_grad)
    load_snapshot(module, own, lambda name: name in own)


def _slots(module: nn.Module, names: Mapping[str, Tensor]) -> dict[str, list[Slot]]:
    """Where a module has the named tensors, tied ones in several places."""
    found: dict[int, tuple[str, list[Slot]]] = {}
    for prefix, owner in module.named_modules():
        for held in (owner._parameters, owner._buffers):
            for leaf, tensor in held.items():
                if tensor is not None:
                    name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
                    found.setdefault(id(tensor), (name, []))[1].append((owner, leaf, tensor))
    return {name: slots for name, slots in found.values() if name in names}


def _replace(slots: list[Slot], value: Tensor, requires_grad: bool) -> None:
    before = slots[0][2]
    value = value.to(before.device, before.dtype)
    if isinstance(before, nn.Parameter):
        value = nn.Parameter(value, requires_grad=requires_grad)
    for owner, leaf, _ in slots:
        _set(owner, leaf, value)


def _set(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    held = owner._parameters if leaf in owner._parameters else owner._buffers
    held[leaf] = tensor  # type: ignore[assignment]
