"""The module as one of its tasks, with the task's own parameters in place."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lightning_odem.parameters.shards import find_shards
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot
from lightning_odem.parameters.vector import canonical_name

Place = tuple[nn.Module, str]
"""A submodule and the name of one of its parameters or buffers."""


class OwnParameters:
    """Puts what a task keeps for itself into a module, by the name of the task; fast for frequent calls.

    Args:
        module: The module.
        kept: What tasks keep for themselves. For a task that is not in it, the module stays as it is.
    """

    def __init__(self, module: nn.Module | None = None, kept: Mapping[str, Mapping[str, Tensor]] = {}) -> None:  # noqa: B006
        self._module, self._kept = module, kept
        self._swaps: dict[str, _Swap] = {}

    def __contains__(self, task: str) -> bool:
        """Whether a task keeps anything for itself."""
        return bool(self._kept.get(task))

    def __call__(self, task: str) -> AbstractContextManager[None]:
        """Run a block with the task's own parameters in the module, see :func:`as_task`."""
        if task not in self:
            return nullcontext()
        assert self._module is not None, "tasks keep parameters of a module"
        if task not in self._swaps:
            self._swaps[task] = _Swap(self._module, self._kept[task])
        return self._swaps[task].made()


def as_task(module: nn.Module, own: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Run a block with a task's own parameters in a module; afterwards the module has its former ones again.

    Tensors replace others instead of being copied into them, so they may have other shapes, such as a head with other
    classes. They are not copied at all if they are on the module's device. They take no gradient. Parameters that
    processes share are written in place instead, so their shapes have to be the same.

    Args:
        module: The module.
        own: Parameters and buffers by name.

    Raises:
        ValueError: If the module lacks one of them.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> with as_task(net, {"weight": torch.ones(3, 1), "bias": torch.zeros(3)}):
        ...     net(torch.ones(1))
        tensor([1., 1., 1.])
        >>> net.weight.shape
        torch.Size([2, 1])
    """
    return _Swap(module, own).made()


@contextmanager
def explaining_shapes(module: nn.Module, task: str, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Explain an error of a module with a task's own parameters in place if these have other shapes than its own have.

    Raises:
        ValueError: From any error in the block, then.
    """
    now = {name: _get(*found[0]).shape for name, found in find_places(module, own).items()}
    other = [
        f"{name} {list(own[name].shape)} (now {list(shape)})" for name, shape in now.items() if own[name].shape != shape
    ]
    try:
        yield
    except Exception as error:
        if not other:
            raise
        raise ValueError(
            f"{type(module).__name__} cannot run as task {task!r}, which keeps {', '.join(other[:3])} for itself: "
            f"{error} Let the module read such sizes from its parameters instead of a configuration, or share them: "
            "growing= merges the common rows of embeddings and heads that have become longer."
        ) from error


def put_task_parameters(module: nn.Module, own: Snapshot) -> None:
    """Give a module a task's own parameters for good: written in place if shapes agree, else as new tensors.

    Raises:
        ValueError: If the module lacks one of them.
    """
    places = find_places(module, own)
    now = {name: _get(*found[0]) for name, found in places.items()}
    if find_shards(now) is None:
        for name, tensor in now.items():
            if tensor.shape != own[name].shape:
                put_tensor(places[name], _like(tensor, own[name].clone(), requires_grad=tensor.requires_grad))
    load_snapshot(module, own, lambda name: name in own)


class _Swap:
    """The places of a task's own tensors in a module, and the tensors to put there."""

    def __init__(self, module: nn.Module, own: Mapping[str, Tensor]) -> None:
        self._module, self._own = module, own
        self._places = find_places(module, own)
        now = {name: _get(*found[0]) for name, found in self._places.items()}
        self._is_sharded = find_shards(now) is not None
        self._tensors = {} if self._is_sharded else {name: _like(now[name], own[name]) for name in now}

    @contextmanager
    def made(self) -> Iterator[None]:
        if self._is_sharded:
            before = take_snapshot(self._module, lambda name: name in self._own)
            load_snapshot(self._module, self._own, lambda name: name in self._own)
            try:
                yield
            finally:
                load_snapshot(self._module, before, lambda name: name in before)
            return
        held = {name: _get(*found[0]) for name, found in self._places.items()}
        try:
            for name, tensor in self._tensors.items():
                put_tensor(self._places[name], tensor)
            yield
        finally:
            for name, tensor in held.items():
                put_tensor(self._places[name], tensor)


def find_places(module: nn.Module, own: Iterable[str]) -> dict[str, list[Place]]:
    """Find where a module has the named tensors; tied tensors have several places."""
    found: dict[int, tuple[str, list[Place]]] = {}
    for prefix, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
                found.setdefault(id(tensor), (name, []))[1].append((owner, leaf))
    places = dict(found.values())
    if missing := [name for name in own if name not in places]:
        raise ValueError(
            f"A task of the stream keeps {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} for itself, "
            f"which {type(module).__name__} does not have now. What is excluded from merges may differ in shape from "
            "task to task, but not in its names."
        )
    return {name: places[name] for name in own}


def _get(owner: nn.Module, leaf: str) -> Tensor:
    tensor = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
    assert tensor is not None, "found by its name"
    return tensor


def put_tensor(places: list[Place], tensor: Tensor) -> None:
    """Put a tensor into places of a module in the stead of those that are there."""
    for owner, leaf in places:
        held: dict[str, Tensor | None] = owner._parameters if leaf in owner._parameters else owner._buffers  # type: ignore[assignment]
        held[leaf] = tensor


def _like(tensor: Tensor, value: Tensor, requires_grad: bool = False) -> Tensor:
    """A value that can replace a tensor: on its device, in its dtype, a parameter if the tensor is one."""
    with torch.no_grad():
        value = value.to(tensor.device, tensor.dtype)
    return nn.Parameter(value, requires_grad=requires_grad) if isinstance(tensor, nn.Parameter) else value
