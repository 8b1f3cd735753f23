"""Equality to the last bit of nested plain values."""

import struct
from typing import Any

import torch
from torch import Tensor


def identical(first: Any, second: Any) -> bool:
    """The same types, keys in the same order, floats and tensors with the same bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and _bits(first) == _bits(second)
    if isinstance(first, dict):
        return identical(list(first.items()), list(second.items()))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(identical, first, second))
    if isinstance(first, float):
        return struct.pack(">d", first) == struct.pack(">d", second)
    return first == second


def _bits(tensor: Tensor) -> list[int]:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()
