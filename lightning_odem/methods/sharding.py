"""Merge methods on models whose parameters several processes share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult, Whole
from lightning_odem.methods.layout import parameter_of
from lightning_odem.methods.registry import METHODS, method_name
from lightning_odem.parameters.divided_state import DividedState
from lightning_odem.parameters.owners import Owners
from lightning_odem.parameters.shards import Shards


class OnShards:
    """A merge method for vectors of shards.

    A method that is :attr:`~lightning_odem.methods.MergeMethod.sharded` merges the shards as they are. One that merges
    :attr:`~lightning_odem.methods.MergeMethod.by_tensor` gets whole parameters: they are divided among the processes,
    each process merges its own, and all get their shards of the results. So the merged model is the one that a single
    process would make, bit by bit up to the order of sums over all parameters. Each process keeps the method's state of
    its own parameters.

    Besides the shards, a process then holds its share of the model whole, once for every vector that the method reads.
    That is one part in as many as there are processes, or the largest parameter.

    Args:
        method: The merge method.

    Raises:
        ValueError: If the method can do neither.
    """

    def __init__(self, method: MergeMethod) -> None:
        check_sharding(method)
        self._method = method

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """Take in the first task's model, of which each process has its shards."""
        if self._method.sharded:
            return self._method.start(incoming, context)
        return self._by_owners(self._method.start, [incoming], context)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge the incoming model into the merged one, see :meth:`~lightning_odem.methods.MergeMethod.merge`."""
        if self._method.sharded:
            self._method.load_state_dict(_cut(self._method.state_dict(), _shards(context)))
            return self._method.merge(merged, incoming, t, context)
        return self._by_owners(
            lambda old, new, part: self._method.merge(old, new, t, part), [merged, incoming], context
        )

    def _by_owners(
        self, merge: Callable[..., MergeResult], vectors: Sequence[Tensor], context: MergeContext
    ) -> MergeResult:
        """Let each process merge its own parameters."""
        owners = self._divide(context, _shards(context))
        owned, part = [owners.collect(vector) for vector in vectors], self._part(context, owners)
        if owners.mine or part.sum_ is not None:
            result = merge(*owned, part)
        else:  # methods need not be able to merge a model without parameters
            self._method.load_state_dict({})
            result = MergeResult(owned[0])
        return replace(result, theta=owners.distribute(result.theta))

    def _divide(self, context: MergeContext, shards: Shards) -> Owners:
        """Divide the parameters so that the method's state stays where it is, and keep no other state."""
        state, known = DividedState(shards, self._method.state_dict()), set(context.names)
        held = [{parameter_of(key, known) for key in keys} for keys in state.keys]
        owners = Owners(shards, context.names, held)
        others = known.difference(owners.mine)
        self._method.load_state_dict(state.own(lambda key: parameter_of(key, known) not in others))
        return owners

    def _part(self, context: MergeContext, owners: Owners) -> MergeContext:
        """The context of the parameters that this process owns."""
        shapes = dict(zip(context.names, context.shapes, strict=True))
        needed = {need: self._part_of(value, owners, context) for need, value in context.needed.items()}
        return replace(
            context,
            names=owners.mine,
            shapes=[shapes[name] for name in owners.mine],
            needed=needed,
            shards=None,
            whole=Whole(shapes, context.summed if self._method.by_tensor == "sums" else None),
        )

    def _part_of(self, value: Any, owners: Owners, context: MergeContext) -> Any:
        """What a need has brought, for the parameters that this process owns."""
        if isinstance(value, Tensor):
            return owners.collect(value)
        if isinstance(value, (list, tuple)):
            return [self._part_of(item, owners, context) for item in value]
        if isinstance(value, Mapping):
            others = set(context.names).difference(owners.mine)
            return {key: item for key, item in value.items() if parameter_of(key, context.names) not in others}
        raise ValueError(
            f"Merge method {method_name(self._method)!r} reads a {type(value).__name__} besides the models, which "
            "cannot be divided among processes that share the model; vectors, lists of vectors, and tensors by "
            "parameter name can. Merge saved checkpoints, or train with strategy='ddp'."
        )


def check_sharding(method: MergeMethod) -> None:
    """Refuse a method that needs all parameters whole at once when each process has only its shards of them.

    Raises:
        ValueError: If the method does; the message lists the methods that do not.

    Example:
        >>> from lightning_odem.methods import resolve_method
        >>> check_sharding(resolve_method("dop"))
        >>> check_sharding(resolve_method("second_moment"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: Merge method 'second_moment' needs all parameters whole in one process, ...
    """
    if not (method.sharded or method.by_tensor):
        able = [name for name, rule in METHODS.items() if _can_merge_shards(rule)]
        raise ValueError(
            f"Merge method {method_name(method)!r} needs all parameters whole in one process, but each process holds "
            f"shards of them. Methods that merge shards are {', '.join(able)}; or merge saved checkpoints, or train "
            "with strategy='ddp'."
        )


def _can_merge_shards(rule: Any) -> bool:
    return bool(getattr(rule, "sharded", False) or getattr(rule, "by_tensor", False))


def _shards(context: MergeContext) -> Shards:
    assert context.shards is not None, "there are shards"
    return context.shards


def _cut(state: Any, shards: Shards) -> Any:
    """A state in which tensors under a parameter's name are this process's shards."""
    if not isinstance(state, dict):
        return state
    return {
        key: shards.part(key, value) if isinstance(value, Tensor) else _cut(value, shards)
        for key, value in state.items()
    }
