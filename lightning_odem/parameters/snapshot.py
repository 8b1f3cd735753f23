"""Copies of a module's state between tasks, and a block that restores the module at its end."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_odem.parameters.attributes import Attributes
from lightning_odem.parameters.shards import find_shards, local, reshard
from lightning_odem.parameters.vector import canonical_name, check_same_shapes, whole_shapes

Snapshot = dict[str, Tensor]


def _tensors(module: nn.Module, select: Callable[[str], bool]) -> dict[str, Tensor]:
    reshard(module)
    parameters, buffers = (
        {name: tensor for name, tensor in named if select(canonical_name(name))}
        for named in (module.named_parameters(), module.named_buffers())
    )
    derived = derived_buffers(module) if buffers else set()
    kept = {name: tensor for name, tensor in buffers.items() if name not in derived}
    return {canonical_name(name): tensor for name, tensor in (parameters | kept).items()}


def derived_buffers(module: nn.Module) -> set[str]:
    """Names of buffers that are not persistent: tables and caches that the module makes itself, in any shape."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }


def take_snapshot(module: nn.Module, select: Callable[[str], bool] = lambda name: True) -> Snapshot:
    """Copy the selected parameters and persistent buffers to the CPU, each tied tensor once, in their own dtypes.

    If several processes share parameters, each process copies its own shards.
    """
    return {name: local(tensor).detach().to("cpu", copy=True) for name, tensor in _tensors(module, select).items()}


@torch.no_grad()
def load_snapshot(module: nn.Module, snapshot: Mapping[str, Tensor], select: Callable[[str], bool]) -> None:
    """Copy a snapshot back into the selected tensors of a module, in place.

    For sharded parameters, the snapshot may hold whole tensors or this process's shards.

    Raises:
        ValueError: If names or shapes differ, or the module is on the meta device. Nothing is written then.
    """
    tensors = _tensors(module, select)
    if on_meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            f"{', '.join(on_meta[:3])}{', ...' if len(on_meta) > 3 else ''} of {type(module).__name__} cannot be "
            "written: they are on the meta device, without memory for values. Give them memory first "
            "(module.to_empty(device=...)), or wait until Lightning has done so: in the module's hook on_fit_start."
        )
    shards = find_shards(tensors)
    derived = {canonical_name(name) for name in derived_buffers(module)}
    snapshot = {name: tensor for name, tensor in snapshot.items() if name not in derived}  # of earlier versions
    remedy = "exclude= leaves parameters out, growing= merges the common rows of those that have further ones"
    check_same_shapes(whole_shapes(tensors, None), whole_shapes(snapshot, shards), "module's", "stored", remedy)
    for name, tensor in tensors.items():
        local(tensor).copy_(shards.part(name, snapshot[name]) if shards else snapshot[name])


def gather_snapshot(module: nn.Module, snapshot: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the whole tensors of a snapshot one after the other, so that one process can save them.

    Yields:
        Name and tensor, on the CPU; None instead of the tensor on all processes but the first. If the module is
        sharded, every process has to go through all of them in step.
    """
    shards = find_shards(_tensors(module, lambda name: name in snapshot))
    for name, tensor in snapshot.items():
        yield name, shards.gather(name, tensor) if shards else tensor


def whole_snapshot(module: nn.Module, snapshot: Snapshot) -> Snapshot:
    """A snapshot with whole tensors in the first process; without shards the snapshot itself."""
    shards = find_shards(_tensors(module, lambda name: name in snapshot))
    return snapshot if shards is None else dict(gather_snapshot(module, snapshot))  # type: ignore[arg-type]


def cut_snapshot(module: nn.Module, tensors: Snapshot) -> Snapshot:
    """Cut the shards of this process from whole tensors, regardless of how many processes saved them.

    The shards share the memory of the given tensors, so only they are read from a memory-mapped file, when they are
    used. If nothing is sharded, the snapshot itself is returned.

    Raises:
        ValueError: If the module has the tensor in another shape.
    """
    shards = find_shards(_tensors(module, lambda name: name in tensors))
    if shards is None:
        return tensors
    found = whole_shapes({name: tensors[name] for name in shards.shapes}, shards)
    check_same_shapes(shards.shapes, found, "module's", "stored")
    return {name: shards.part(name, tensor) for name, tensor in tensors.items()}


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a block with the module in eval mode and gradients on; afterwards only its parameters may have changed.

    Train/eval flags of every submodule, buffers (including batch-norm statistics), ``.grad``, the random state of
    Python, NumPy and torch, states of torchmetrics and Python attributes (see
    :class:`~lightning_odem.parameters.attributes.Attributes`) are restored, also after an exception.
    """
    reshard(module)
    submodules = list(module.modules())
    flags = [submodule.training for submodule in submodules]
    grads = {parameter: parameter.grad for parameter in module.parameters()}
    # With their owners: a module may update a buffer in place or put another tensor under its name.
    buffers = [
        (submodule, name, buffer, buffer.clone())
        for submodule in submodules
        for name, buffer in submodule._buffers.items()
        if buffer is not None
    ]
    attributes = Attributes(submodules)
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            module.eval()
            for parameter in grads:
                parameter.grad = None
            yield
    finally:
        # Called as after a successful block: after an exception it would not restore the random state.
        isolation.__exit__(None, None, None)
        for submodule, flag in zip(submodules, flags, strict=True):
            submodule.training = flag
        for parameter, grad in grads.items():
            parameter.grad = grad
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                setattr(owner, name, buffer.copy_(value))
        attributes.put_back()
