"""Tensors that get further rows between two tasks, as embeddings of new tokens and heads of new classes do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_odem.parameters.shards import find_shards
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.vector import canonical_name, is_excluded
from lightning_odem.stream.state import StreamState


def grow(state: StreamState, module: nn.Module, shared: Callable[[str], bool], growing: Sequence[str]) -> StreamState:
    """The state of a stream in the shapes that a module has now; the state itself if none has changed.

    Parameters that match a pattern may have further rows. Their common rows are merged, all others are the incoming
    model's, see :func:`with_own_rows`. Buffers may have any shape: they are the incoming model's in any case.

    Args:
        state: The state.
        module: The module, before it is trained. A module that processes share keeps its shapes.
        shared: Selects by name what is merged.
        growing: Patterns of parameters that may grow.

    Raises:
        ValueError: If the method keeps something of a grown parameter that has no meaning for further rows.
    """
    parameters = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
    if state.base is None or find_shards(parameters) is not None:
        return state
    buffers = {canonical_name(name): tensor for name, tensor in module.named_buffers()}
    known = state.base
    found = {name: tensor for name, tensor in {**parameters, **buffers}.items() if shared(name) and name in known}
    changed = {name: tensor for name, tensor in found.items() if tensor.shape != known[name].shape}
    longer = {
        name: tensor
        for name, tensor in changed.items()
        if name in parameters and is_excluded(name, growing) and _has_further_rows(tensor, known[name])
    }
    others = {name: tensor.detach().to("cpu", copy=True) for name, tensor in changed.items() if name in buffers}
    if not longer and not others:
        return state
    rows = {name: state.rows.get(name, len(known[name])) for name in longer}
    for name, tensor in longer.items():
        rank_zero_info(
            f"{name} has grown from {len(known[name])} to {len(tensor)} rows. The first {rows[name]} are merged, the "
            "others are those of the model that was trained last."
        )
    lengths = {name: len(known[name]) for name in longer}
    return replace(
        state,
        base={**with_own_rows(known, longer, lengths), **others},
        merged=state.merged and {**with_own_rows(state.merged, longer, lengths), **others},
        method=_with_zero_rows(state.method, longer),
        rows={**state.rows, **rows},
    )


def with_own_rows(snapshot: Mapping[str, Tensor], own: Mapping[str, Tensor], rows: Mapping[str, int]) -> Snapshot:
    """A snapshot whose grown tensors have the first rows of the snapshot and all further rows of another model.

    Example:
        >>> with_own_rows({"w": torch.zeros(2)}, {"w": torch.ones(3)}, {"w": 2})
        {'w': tensor([0., 0., 1.])}
    """
    grown = {
        name: torch.cat([snapshot[name][:count], own[name].detach()[count:].to("cpu", snapshot[name].dtype)])
        for name, count in rows.items()
        if name in snapshot
    }
    return {**snapshot, **grown}


def _has_further_rows(tensor: Tensor, before: Tensor) -> bool:
    return tensor.dim() == before.dim() > 0 and tensor.shape[1:] == before.shape[1:] and len(tensor) > len(before)


def _with_zero_rows(method: dict[str, Any], longer: Mapping[str, Tensor]) -> dict[str, Any]:
    """A method's state for tasks that did not have the further rows: their task vectors are zero there.

    Raises:
        ValueError: If it keeps other tensors than a mean task vector.
    """
    mean = method.get("mean", {})
    if any(_holds_tensors(value) for key, value in method.items() if key != "mean"):
        raise ValueError(
            f"{', '.join(longer)} has further rows, and what the merge method keeps of the tasks before "
            f"({', '.join(method)}) has none for them. Merge a growing stream by 'ode', 'isotropic', 'average', or "
            "another method that keeps the mean task vector or nothing."
        )
    padded = {
        name: torch.cat([mean[name], mean[name].new_zeros(len(tensor) - len(mean[name]), *tensor.shape[1:])])
        for name, tensor in longer.items()
        if name in mean
    }
    return {**method, "mean": {**mean, **padded}} if padded else method


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return (
        any(map(_holds_tensors, value))
        if isinstance(value, (list, tuple))
        else isinstance(value, Tensor) and value.dim() > 0
    )
