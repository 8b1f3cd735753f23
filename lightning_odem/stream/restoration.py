"""Parameters that earlier tasks keep for themselves, restored in a module that another process has built."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.task_parameters import put_task_parameters
from lightning_odem.parameters.vector import canonical_name


def restore_task_parameters(module: nn.Module, parameters: Snapshot) -> None:
    """Write parameters into a module that may lack some of them, such as heads that were made when a task began.

    If some are missing, the module's hook ``on_load_checkpoint`` is called, as when Lightning loads a checkpoint. It
    gets the names and tensors under ``"state_dict"`` and may make the parameters.

    Raises:
        ValueError: If the module lacks a parameter afterwards.

    Example:
        >>> import torch
        >>> class Heads(nn.Module):
        ...     def on_load_checkpoint(self, checkpoint):
        ...         for name, value in checkpoint["state_dict"].items():
        ...             self.register_parameter(name, nn.Parameter(torch.zeros_like(value)))
        >>> restore_task_parameters(module := Heads(), {"digits": torch.ones(2)})
        >>> module.digits.data
        tensor([1., 1.])
    """
    hook: Callable[[dict[str, Any]], None] | None = getattr(module, "on_load_checkpoint", None)
    if hook is not None and _missing(module, parameters):
        hook({"state_dict": dict(parameters)})
    if missing := _missing(module, parameters):
        raise ValueError(
            f"Tasks of the stream keep {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} for themselves, "
            f"which {type(module).__name__} does not have. Build the module with them, or make them in its hook "
            "on_load_checkpoint(checkpoint), from the names in checkpoint['state_dict']."
        )
    put_task_parameters(module, parameters)


def is_ready(module: L.LightningModule, shared: Iterable[str], own: Iterable[str]) -> bool:
    """Whether a module has the parameters of a stream, with values, before Lightning has set it up.

    A module that is built in ``configure_model`` or on the meta device does not have them yet.

    Args:
        module: The module, in ``setup``.
        shared: Names of the parameters and buffers that all tasks share.
        own: Names of the parameters that tasks keep for themselves. They may be missing if the module has a hook
            ``on_load_checkpoint``, see :func:`restore_task_parameters`.
    """
    can_make = is_overridden("on_load_checkpoint", module)
    on_meta = any(tensor.is_meta for _, tensor in _named(module))
    return not on_meta and not _missing(module, [*shared, *([] if can_make else own)])


def _missing(module: nn.Module, names: Iterable[str]) -> list[str]:
    there = {canonical_name(name) for name, _ in _named(module)}
    return [name for name in names if name not in there]


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
