"""A module made of nothing but named tensors."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATISTICS = ("running_mean", "running_var")


class StateModule(nn.Module):
    """Holds a state dict under its own names, so that what works on modules works without the architecture.

    Floating tensors become trainable parameters, others buffers. Where there are a ``running_mean`` and a
    ``running_var`` side by side, both are buffers of a batch-norm layer, so that a merge treats them as such; buffers
    of other kinds are not told apart from parameters. The module cannot be called.

    Args:
        state: Tensors by dotted name; copied.

    Raises:
        ValueError: If a part of a name is empty, as in ``"a..b"``.

    Example:
        >>> import torch
        >>> module = StateModule({"0.weight": torch.ones(2), "0.steps": torch.tensor(3)})
        >>> list(module.state_dict()), [name for name, _ in module.named_parameters()]
        (['0.weight', '0.steps'], ['0.weight'])
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            if not all((*path, leaf)):
                raise ValueError(f"{name!r} cannot name a tensor of a module: a part between its dots is empty.")
            owner: nn.Module = self
            prefix = ""
            for part in path:
                prefix += f"{part}."
                # Not with add_module, which refuses the names of nn.Module's own attributes; models use them all the
                # same, for example "type".
                owner = owner._modules.setdefault(part, _container(prefix, state))  # type: ignore[assignment]
            value = tensor.detach().clone()
            if tensor.is_floating_point() and not (isinstance(owner, _Norm) and leaf in _STATISTICS):
                owner._parameters[leaf] = nn.Parameter(value)
            else:
                owner._buffers[leaf] = value


class _Norm(_BatchNorm):
    """What is known of a batch-norm layer from its state."""

    def __init__(self) -> None:
        super().__init__(num_features=0, affine=False)
        self._buffers.update(dict.fromkeys(self._buffers))  # which of them there are shows in the state


def _container(prefix: str, state: Mapping[str, Tensor]) -> nn.Module:
    return _Norm() if all(f"{prefix}{name}" in state for name in _STATISTICS) else nn.Module()
