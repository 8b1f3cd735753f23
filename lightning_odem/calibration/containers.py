"""The containers that batches are made of, taken apart and put together again."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))
_DEPTH = 40
# Types met in this process, by name. Types defined within functions cannot be found through their module.
_MET: WeakValueDictionary[str, type] = WeakValueDictionary()


class CannotBeKeptError(TypeError):
    """Samples cannot be kept for later tasks; the message says why."""


@dataclass(frozen=True)
class Container:
    """A container as data: its kind and its items, without the methods of its type.

    Args:
        kind: ``"list"``, ``"tuple"``, ``"dict"``, ``"array"``, or a kind whose type has a name: ``"mapping"``,
            ``"named tuple"``, ``"sequence"`` or ``"object"``.
        items: Its items: containers, tensors, numbers, strings and None.
        keys: The keys or attributes of the items.
        type: Where the type is found, ``"module:name"``; empty for list, tuple, dict and arrays.
    """

    kind: str
    items: tuple[Any, ...]
    keys: tuple[Any, ...] = ()
    type: str = ""


def take_apart(value: Any, depth: int = 0) -> Any:
    """A value as :class:`Container` of tensors on the CPU, numbers, strings and None; CPU tensors are not copied.

    Raises:
        CannotBeKeptError: If the value holds something that cannot be stored in a file.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) in PLAIN:
        return value
    if depth > _DEPTH:
        raise CannotBeKeptError(f"they are nested more than {_DEPTH} levels deep, or contain themselves")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return Container("array", (torch.from_numpy(np.array(value)), isinstance(value, np.generic)))
    if type(value) in (list, tuple):
        return Container(type(value).__name__, tuple(take_apart(item, depth + 1) for item in value))
    found = _content(value)
    if found is None:
        raise CannotBeKeptError(
            f"they hold a {type(value).__module__}.{type(value).__qualname__} ({value!r:.60}); tensors, arrays, "
            "numbers, strings and None can be kept, in lists, tuples, mappings, named tuples and dataclasses"
        )
    kind, content = found
    if wrong := [key for key in content if type(key) not in (str, int)]:
        raise CannotBeKeptError(f"they have the key {wrong[0]!r:.60}; keys that can be kept are strings and integers")
    name = "" if kind == "dict" else f"{type(value).__module__}:{type(value).__qualname__}"
    if name:
        _MET[name] = type(value)
    items = tuple(take_apart(item, depth + 1) for item in content.values())
    return Container(kind, items, tuple(content), name)


def put_together(value: Any) -> Any:
    """The value that was taken apart, with memory of its own.

    Raises:
        ValueError: If a type is not loaded in this process.
        CannotBeKeptError: If a container cannot be made from its items.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, Container):
        return value
    items = [put_together(item) for item in value.items]
    match value.kind:
        case "list":
            return items
        case "tuple":
            return tuple(items)
        case "dict":
            return dict(zip(value.keys, items, strict=True))
        case "array":
            array, is_number = items
            return array.numpy()[()] if is_number else array.numpy()
    kind, name = _find(value), value.type
    try:
        return _KINDS[value.kind][1](kind, dict(zip(value.keys, items, strict=True)))
    except Exception as error:
        raise CannotBeKeptError(f"a {name} cannot be made again from what is in it: {error}") from error


def change(value: Any, function: Callable[[Any], Any]) -> Any:
    """The value with ``function`` applied to everything but the containers."""
    if not isinstance(value, Container):
        return function(value)
    return Container(value.kind, tuple(change(item, function) for item in value.items), value.keys, value.type)


def same(one: Any, other: Any) -> bool:
    """Whether two values taken apart are of one type and equal, tensors in shape, dtype and all entries."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other)))
    if isinstance(one, Container) and isinstance(other, Container):
        return (
            (one.kind, one.keys, one.type) == (other.kind, other.keys, other.type)
            and len(one.items) == len(other.items)
            and all(map(same, one.items, other.items))
        )
    return type(one) is type(other) and not isinstance(one, (Tensor, Container)) and (one == other or one != one)


def to_plain(value: Any) -> Any:
    """A value taken apart, as plain containers that a file can hold."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)
    if not isinstance(value, Container):
        return value
    items = [to_plain(item) for item in value.items]
    return {"kind": value.kind, "keys": list(value.keys), "type": value.type, "items": items}


def from_plain(value: Any) -> Any:
    """The reverse of :func:`to_plain`."""
    if not isinstance(value, dict):
        return value
    return Container(value["kind"], tuple(map(from_plain, value["items"])), tuple(value["keys"]), value["type"])


def fresh(value: Any) -> Any:
    """The sample with copies of its mappings, lists and tuples, so that they can be changed."""
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(fresh(item) for item in value)
    if isinstance(value, Mapping) and hasattr(value, "copy"):
        return value.copy()
    return value


def _content(value: Any) -> tuple[str, dict] | None:
    """The kind of a container and its items by key; None if the value is no container."""
    if type(value) is dict:
        return "dict", value
    if isinstance(value, Mapping):
        return "mapping", dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "named tuple", dict(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return "sequence", dict(enumerate(value))
    if not isinstance(value, type) and _is_record(type(value)):
        names = [field.name for field in fields(value)] if is_dataclass(value) else []
        return "object", {**{name: getattr(value, name) for name in names}, **getattr(value, "__dict__", {})}
    return None


def _is_record(kind: type) -> bool:
    """Whether an object of a type is no more than its attributes: a dataclass, or a batch that loops can move."""
    moved = hasattr(kind, "pin_memory") or hasattr(kind, "to")
    return is_dataclass(kind) or (moved and not issubclass(kind, (Tensor, nn.Module)))


def _make_mapping(kind: Any, content: dict) -> Any:
    if issubclass(kind, defaultdict):
        return kind(None, content)
    try:
        return kind(content)
    except TypeError:
        return kind(**content)


def _make_object(kind: Any, content: dict) -> Any:
    # Arguments of __init__ may be others than the attributes.
    made: Any = object.__new__(kind)
    for name, item in content.items():
        object.__setattr__(made, name, item)
    return made


# For each kind: whether a type is of that kind, and how an object of the type is made.
_KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, dict], Any]]] = {
    "mapping": (lambda kind: issubclass(kind, Mapping), _make_mapping),
    "named tuple": (lambda kind: issubclass(kind, tuple), lambda kind, content: kind(*content.values())),
    "sequence": (lambda kind: issubclass(kind, (list, tuple)), lambda kind, content: kind(content.values())),
    "object": (_is_record, _make_object),
}


def _find(value: Container) -> type:
    """The type of a container, if this process has loaded it; a file must not make anything be imported."""
    module, _, path = value.type.partition(":")
    found: Any = _MET.get(value.type) or sys.modules.get(module)
    if not isinstance(found, type):
        for part in path.split("."):
            found = getattr(found, part, None)
    if not isinstance(found, type) or not _KINDS[value.kind][0](found):
        raise ValueError(
            f"Calibration samples are kept in a {path} of {module}, which this process has not loaded; import it "
            "before the stream goes on."
        )
    return found
