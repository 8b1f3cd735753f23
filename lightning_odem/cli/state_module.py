"""A module that consists of named tensors only."""

from collections.abc import Container, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATISTICS = ("running_mean", "running_var")


class StateModule(nn.Module):
    """Holds a state dict under its own names, so that code for modules works without the architecture.

    Floating tensors become trainable parameters, others become buffers. If a ``running_mean`` and a ``running_var``
    occur side by side, both become buffers of a batch-norm layer, so that a merge treats them as such. Other floating
    buffers cannot be distinguished from parameters. The module cannot be called.

    Args:
        state: Tensors by dotted name; copied.
        buffers: Names of floating tensors that are known to be buffers.

    Raises:
        ValueError: If a part of a name is empty, as in ``"a..b"``.

    Example:
        >>> import torch
        >>> module = StateModule({"0.weight": torch.ones(2), "0.steps": torch.tensor(3)})
        >>> list(module.state_dict()), [name for name, _ in module.named_parameters()]
        (['0.weight', '0.steps'], ['0.weight'])
    """

    def __init__(self, state: Mapping[str, Tensor], buffers: Container[str] = ()) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            if not all((*path, leaf)):
                raise ValueError(f"{name!r} cannot name a tensor of a module: a part between its dots is empty.")
            owner: nn.Module = self
            prefix = ""
            for part in path:
                prefix += f"{part}."
                # Not with add_module, which refuses the names of nn.Module's own attributes; models use such names, for
                # example "type".
                owner = owner._modules.setdefault(part, _container(prefix, state))  # type: ignore[assignment]
            value = tensor.detach().clone()
            is_buffer = name in buffers or (isinstance(owner, _Norm) and leaf in _STATISTICS)
            if tensor.is_floating_point() and not is_buffer:
                owner._parameters[leaf] = nn.Parameter(value)
            else:
                owner._buffers[leaf] = value


class _Norm(_BatchNorm):
    """A batch-norm layer as far as its state describes it."""

    def __init__(self) -> None:
        super().__init__(num_features=0, affine=False)
        self._buffers.update(dict.fromkeys(self._buffers))  # the state shows which of them exist


def _container(prefix: str, state: Mapping[str, Tensor]) -> nn.Module:
    return _Norm() if all(f"{prefix}{name}" in state for name in _STATISTICS) else nn.Module()
