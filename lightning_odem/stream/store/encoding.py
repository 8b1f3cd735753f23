"""Nested plain values as a structure for JSON and a flat dict of tensors."""

import math
import struct
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Levels of containers within each other; far below the recursion limits of Python and JSON.
_DEPTH = 64
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_STORED = (torch.bool, *_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Dtypes that some versions of safetensors do not know are stored as integers of the same bytes.
_CARRIED = {
    name: getattr(torch, name)
    for name in (
        *("complex32", "complex64", "complex128", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def encode(value: Any, where: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Divide a value into a structure for JSON and named tensors for safetensors.

    :func:`decode` gives the value back, bit for bit: tuples as tuples, int keys as int keys, the order of keys, NaN,
    -0.0, and the strides of dense tensors, on which the rounding of convolutions depends. Tensors come back on the CPU,
    without gradients, and share no memory with each other.

    In the structure None, bools, ints, finite floats, strings, lists and dicts with string keys stand for themselves.
    Other values are objects whose first key begins with a dollar: ``$tensor``, ``$tuple``, ``$float`` or ``$dict``.

    Args:
        value: dict with str or int keys, list, tuple, str, bool, int, float, None and dense tensors, nested at will.
        where: Name of the value in messages.

    Returns:
        The structure, and contiguous tensors by their path in the value. They are views of the value's memory if its
        tensors are dense and do not overlap.

    Raises:
        TypeError: If the value holds anything else, subclasses of these types included. The message says where.

    Example:
        >>> structure, tensors = encode({"weight": torch.zeros(2), "shape": (2, 3), 0: None})
        >>> structure
        {'$dict': [['weight', {'$tensor': 'weight'}], ['shape', {'$tuple': [2, 3]}], [0, None]]}
        >>> decode(structure, tensors)
        {'weight': tensor([0., 0.]), 'shape': (2, 3), 0: None}
    """
    encoder = _Encoder(where)
    return encoder.encode(value, where, 0), encoder.tensors


def decode(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that :func:`encode` divided; its tensors are views of the given ones.

    Raises:
        ValueError: If :func:`encode` does not make such a structure, or a tensor is missing.
    """
    return _decode(structure, tensors, 0)


class _Encoder:
    def __init__(self, where: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._where = where
        self._spans: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def encode(self, value: Any, path: str, depth: int) -> Any:
        if depth > _DEPTH:
            raise TypeError(f"{path:.200} lies more than {_DEPTH} levels deep, or the value contains itself.")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind in (list, dict) and not value:
            return kind()
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind in (list, tuple):
            # Long lists of numbers or names are common, and none of their items has a path to be told.
            if kind is list and set(map(type, value)) <= {bool, int, str}:
                return list(value)
            items = [self.encode(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if kind is dict:
            return self._encode_dict(value, path, depth)
        if kind in (Tensor, nn.Parameter):
            return self._encode_tensor(value.detach(), path)
        raise TypeError(
            f"{path or 'The value'} is a {kind.__module__}.{kind.__qualname__} ({value!r:.60}); what can be stored are "
            "tensors, dict, list, tuple, str, bool, int, float and None, and no subclasses of them."
        )

    def _encode_dict(self, value: dict, path: str, depth: int) -> dict[str, Any]:
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(
                    f"{path or 'The value'} has the key {key!r:.60}; keys that can be stored are str and int."
                )
            pairs.append([key, self.encode(item, f"{path}.{key}" if path else str(key), depth + 1)])
        plain = all(type(key) is str and not key.startswith("$") for key in value)
        return dict(pairs) if plain else {"$dict": pairs}

    def _encode_tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        kind = str(tensor.dtype).removeprefix("torch.")
        dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
        if not dense or not (tensor.dtype in _STORED or kind in _CARRIED):
            raise TypeError(
                f"{path or 'The value'} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; what can be "
                f"stored are dense tensors with data, of dtype {', '.join(map(str, _STORED))} or {', '.join(_CARRIED)}."
            )
        record: dict[str, Any] = {"$tensor": self._new_name(path)}
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        if not tensor.is_contiguous() and tensor.permute(order).is_contiguous():
            tensor = tensor.permute(order)
            record["order"] = [order.index(dim) for dim in range(tensor.dim())]
        tensor = self._apart(tensor.contiguous())
        if kind in _CARRIED:
            tensor = tensor.unsqueeze(-1).view(_CARRIERS.get(tensor.itemsize, torch.int64))
            record["dtype"] = kind
        self.tensors[record["$tensor"]] = tensor
        return record

    def _new_name(self, path: str) -> str:
        # The path within the value, in UTF-8 as safetensors requires, and not the name that it reserves.
        path = path[len(self._where) :].removeprefix(".").encode("utf-8", "backslashreplace").decode() or "value"
        name, copies = path, 1
        while name in self.tensors or name == "__metadata__":
            copies += 1
            name = f"{path}~{copies}"
        return name

    def _apart(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy if it shares memory with an earlier one."""
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        spans = self._spans[tensor.untyped_storage().data_ptr()]
        if any(start < other_end and other_start < end for other_start, other_end in spans):
            return tensor.clone()
        spans.append((start, end))
        return tensor


def _decode(structure: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    if depth > 2 * _DEPTH:
        raise ValueError("The structure is nested too deeply.")
    match structure:
        case None | bool() | int() | str() | float():
            return structure
        case list():
            return [_decode(item, tensors, depth + 1) for item in structure]
        case {"$tensor": str(name)} if structure.keys() <= {"$tensor", "order", "dtype"}:
            return _decode_tensor(structure, name, tensors)
        case {"$float": str(bits)} if len(structure) == 1 and len(raw := bytes.fromhex(bits)) == 8:
            return struct.unpack(">d", raw)[0]
        case {"$tuple": list(items)} if len(structure) == 1:
            return tuple(_decode(items, tensors, depth + 1))
        case {"$dict": list(pairs)} if len(structure) == 1 and all(map(_is_pair, pairs)):
            return {key: _decode(item, tensors, depth + 1) for key, item in pairs}
        case dict() if not any(type(key) is not str or key.startswith("$") for key in structure):
            return {key: _decode(item, tensors, depth + 1) for key, item in structure.items()}
    raise ValueError(f"The structure has {structure!r:.80}, which stands for no value.")


def _decode_tensor(record: dict[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"The structure refers to the tensor {name!r}, which is missing.")
    tensor = tensors[name]
    try:
        if "dtype" in record:
            tensor = tensor.view(_CARRIED[record["dtype"]]).squeeze(-1)
        return tensor.permute(record["order"]) if "order" in record else tensor
    except (RuntimeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"The tensor {name!r} cannot be read as {record!r:.200}: {error}") from error


def _is_pair(pair: Any) -> bool:
    return type(pair) is list and len(pair) == 2 and type(pair[0]) in (str, int)
