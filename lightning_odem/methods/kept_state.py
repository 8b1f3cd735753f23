"""A merge method's state before a merge, kept so that the method can go back to it."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from lightning_odem.methods.base import MergeMethod
from lightning_odem.methods.registry import method_name


class KeptState:
    """The state of a method with the method's own tensors. Plain containers are copied, tensors are not.

    So methods have to replace the tensors of their state, not change them in place, as
    :meth:`~lightning_odem.methods.MergeMethod.state_dict` asks. :meth:`check` tests whether they did. A state of
    several vectors of the model's size is then held once, and twice only while the next one is computed.

    Args:
        method: The method.

    Attributes:
        value: The state.

    Example:
        >>> import torch
        >>> from lightning_odem.methods import ODEMerge
        >>> method = ODEMerge()
        >>> method.load_state_dict({"mean": {"weight": torch.ones(2)}, "sums": {}, "concentration": 1.0, "scale": None})
        >>> kept = KeptState(method)
        >>> method.load_state_dict({})
        >>> kept.restore()
        >>> method.state_dict()["mean"]
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, method: MergeMethod) -> None:
        self.value: dict[str, Any] = copy_containers(method.state_dict())
        self._method = method
        # Inference tensors have no version counter.
        tensors = [(key, tensor) for key, tensor in _tensors(self.value) if not tensor.is_inference()]
        self._versions = [(key, tensor, tensor._version) for key, tensor in tensors]

    def check(self) -> None:
        """Check that the tensors are unchanged.

        Raises:
            ValueError: If one was changed in place.
        """
        changed = sorted({key for key, tensor, version in self._versions if tensor._version != version})
        if changed:
            raise ValueError(
                f"Merge method {method_name(self._method)!r} changed {', '.join(changed)} of its state in place, which "
                "a merge that fails would go back to. Replace the tensor instead (self.x = self.x * 0.9, not "
                "self.x.mul_(0.9)), or copy it both in state_dict and in load_state_dict."
            )

    def restore(self) -> None:
        """Take the method back to the state."""
        self._method.load_state_dict(copy_containers(self.value))


def copy_containers(state: dict[str, Any]) -> dict[str, Any]:
    """Copy everything in a state but its tensors.

    Example:
        >>> state = {"norms": [1.0]}
        >>> copy_containers(state)["norms"].append(2.0)
        >>> state
        {'norms': [1.0]}
    """
    return deepcopy(state, {id(tensor): tensor for _, tensor in _tensors(state)})


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in plain containers, each under the key of the outermost one."""
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _tensors(item, key or repr(inner))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item, key)
