"""State of a merge method of which each of several processes holds a part."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.parameters.shards import Shards, find_shards
from lightning_odem.parameters.vector import canonical_name

_NOTHING = object()
"""What a process has at a place of the state that it lacks."""


@dataclass(frozen=True)
class _Outline:
    """A tensor of another process; ``is_shard`` if it has the shape of this process's shard of the parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_shard: bool


class DividedState:
    """The parts of a state that the processes hold, seen from one of them: its own, and outlines of the others.

    The state is tensors, numbers and strings in plain containers. Parts are joined by the keys of dicts and the
    positions in lists. Numbers and strings are the same wherever they are held. All processes have to make it together.

    Args:
        shards: How the processes share the parameters.
        own: This process's part.
    """

    def __init__(self, shards: Shards, own: dict[str, Any]) -> None:
        self._shards = shards
        self._parts = shards.share(_outline(own, shards))
        self._parts[shards.rank] = own

    @property
    def keys(self) -> list[set[str]]:
        """For each process, the keys of the tensors in its part: each the key in the innermost dict around it."""
        return [set(_keys(part)) for part in self._parts]

    def own(self, is_mine: Callable[[str], bool]) -> dict[str, Any]:
        """The state with all its containers, numbers and strings, but only tensors of this process's part.

        Args:
            is_mine: Selects tensors by their keys.
        """

        def choose(key: str, parts: Sequence[Any], is_entry: bool) -> Any:
            found = next(part for part in parts if part is not _NOTHING)
            if not isinstance(found, (Tensor, _Outline)):
                return found
            return parts[self._shards.rank] if is_mine(key) else _NOTHING

        return _joined(self._parts, choose)

    def gather(self) -> dict[str, Any]:
        """The whole state in the first process, with its tensors on the CPU; None instead of each in the others.

        A tensor under a parameter's name is a shard if each process has one in the shape of its shard. All others are
        whole wherever they are held. All processes have to call it.
        """
        return _joined(self._parts, self._gather)

    def _gather(self, key: str, parts: Sequence[Any], is_entry: bool) -> Any:
        held = {rank: part for rank, part in enumerate(parts) if part is not _NOTHING}
        holder, found = next(iter(held.items()))
        if not isinstance(found, (Tensor, _Outline)):
            return found
        mine, shards = held.get(self._shards.rank), self._shards
        outlines = [_outline(part, shards, key if is_entry else "") for part in held.values()]
        if len(held) == shards.size and all(outline.is_shard for outline in outlines):
            return shards.gather(key, mine)  # type: ignore[arg-type]
        return shards.bring(mine, holder, found.shape, found.dtype)


def gather_state(module: nn.Module, names: Collection[str], state: dict[str, Any]) -> dict[str, Any]:
    """Make the state of a merge method whole in the first process, if a module's parameters are sharded.

    All processes have to call it.

    Args:
        module: The module.
        names: Names of its parameters that are merged.
        state: This process's part of the state.

    Returns:
        The state itself if nothing is sharded; otherwise see :meth:`DividedState.gather`.
    """
    named = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
    shards = find_shards({name: tensor for name, tensor in named.items() if name in names})
    return state if shards is None else DividedState(shards, state).gather()


def _outline(value: Any, shards: Shards, key: str = "") -> Any:
    """A value with outlines instead of its tensors."""
    if isinstance(value, Tensor):
        return _Outline(tuple(value.shape), value.dtype, value.shape == shards.local_shapes.get(key))
    if isinstance(value, dict):
        return {name: _outline(inner, shards, name) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_outline(inner, shards) for inner in value)
    return value


def _keys(value: Any, key: str = "") -> Iterator[str]:
    """The key of each tensor in plain containers, that in the innermost dict."""
    if isinstance(value, (Tensor, _Outline)):
        yield key
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _keys(inner, name)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _keys(inner, key)


def _joined(
    parts: Sequence[Any], leaf: Callable[[str, Sequence[Any], bool], Any], key: str = "", is_entry: bool = True
) -> Any:
    """The containers of all processes joined, with what ``leaf`` makes of the parts at each place.

    Args:
        parts: What each process has, or nothing.
        leaf: Called with the key in the innermost dict, the parts, and whether they are the entry of the dict itself.
            Entries for which it makes nothing are left out; a list in which it makes nothing is nothing.
        key: The key in the innermost dict.
        is_entry: Whether the parts are its entry.
    """
    found = next(part for part in parts if part is not _NOTHING)
    if isinstance(found, dict):
        names = dict.fromkeys(name for part in parts if part is not _NOTHING for name in part)
        entries = {name: _joined([_at(part, name) for part in parts], leaf, name) for name in names}
        return {name: value for name, value in entries.items() if value is not _NOTHING}
    if isinstance(found, (list, tuple)):
        items = [_joined([_at(part, index) for part in parts], leaf, key, False) for index in range(len(found))]
        return _NOTHING if any(item is _NOTHING for item in items) else type(found)(items)
    return leaf(key, parts, is_entry)


def _at(part: Any, place: Any) -> Any:
    """What a part has under a key or at a position, or nothing."""
    if isinstance(part, dict):
        return part.get(place, _NOTHING)
    return _NOTHING if part is _NOTHING else part[place]
