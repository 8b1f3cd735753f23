"""Counting how often a device would be waited for."""

import torch
from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}


class OnHost(torch.Tensor):
    """A tensor that has been read from the device, or was computed from such tensors alone."""


class Reads(TorchFunctionMode):
    """Counts reads of tensors from their device, as if all tensors were on one until they are read."""

    number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "tensor":  # made of numbers of Python
            return result.as_subclass(OnHost)
        if name == "__getitem__" and not isinstance(args[0], OnHost):  # whatever the index is
            return result.as_subclass(torch.Tensor)
        if name not in READS or isinstance(args[0], OnHost):
            return result
        self.number += 1
        return result.as_subclass(OnHost) if name == "cpu" else result
