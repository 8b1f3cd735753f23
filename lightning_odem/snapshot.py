"""Copies of a module's state between tasks, and a block that leaves the module as it found it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_odem.parameters import canonical_name, check_same_shapes

Snapshot = dict[str, Tensor]


def _tensors(module: nn.Module, select: Callable[[str], bool]) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {canonical_name(name): tensor for name, tensor in named.items() if select(canonical_name(name))}


def take_snapshot(module: nn.Module, select: Callable[[str], bool] = lambda name: True) -> Snapshot:
    """Copy the selected parameters and buffers to the CPU, each tied tensor once, in their own dtypes."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(module, select).items()}


@torch.no_grad()
def load_snapshot(module: nn.Module, snapshot: Mapping[str, Tensor], select: Callable[[str], bool]) -> None:
    """Copy a snapshot back into the selected tensors of a module, in place.

    Raises:
        ValueError: If names or shapes differ; nothing is written then.
    """
    tensors = _tensors(module, select)
    check_same_shapes(_shapes(tensors), _shapes(snapshot), "module's", "stored")
    for name, tensor in tensors.items():
        tensor.copy_(snapshot[name])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a block with the module in eval mode and gradients on; afterwards nothing but its parameters has changed.

    Train/eval flags of every submodule, buffers (batch-norm statistics too), ``.grad`` and the random state of Python,
    NumPy and torch are put back, and torchmetrics updated by the block are reset, also after an exception.
    """
    flags = {submodule: submodule.training for submodule in module.modules()}
    grads = {parameter: parameter.grad for parameter in module.parameters()}
    # With their owners: a module may update a buffer in place or put another tensor under its name.
    buffers = [
        (submodule, name, buffer, buffer.clone())
        for submodule in module.modules()
        for name, buffer in submodule.named_buffers(recurse=False)
    ]
    counts = {metric: metric.update_count for metric in module.modules() if isinstance(metric, Metric)}
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            module.eval()
            for parameter in grads:
                parameter.grad = None
            yield
    finally:
        # Called as after a block that went well: after an exception it would leave the random state as it is.
        isolation.__exit__(None, None, None)
        for submodule, flag in flags.items():
            submodule.training = flag
        for parameter, grad in grads.items():
            parameter.grad = grad
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                setattr(owner, name, buffer.copy_(value))
        for metric, count in counts.items():
            if metric.update_count != count:
                metric.reset()
