"""The identity of a fine-tuned model in a stream: the names of its merged tensors, and their fingerprint."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.model_files import match_names
from lightning_odem.parameters.shards import find_shards, reshard
from lightning_odem.parameters.snapshot import Snapshot, take_snapshot
from lightning_odem.parameters.vector import canonical_name, check_same_shapes, is_excluded
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store.fingerprint import fingerprint

Model = str | os.PathLike | nn.Module | Mapping[str, Tensor]


def merged_names(module: nn.Module, patterns: tuple[str, ...], batch_norm: str) -> dict[str, list[str]]:
    """Names of the tensors of a module that merges change, see :class:`~lightning_odem.stream.state.StreamState`.

    Args:
        module: The module.
        patterns: Patterns of parameters that are not merged.
        batch_norm: Policy for running statistics; they are among the names if they are averaged.
    """
    named = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
    parameters = [name for name, tensor in named.items() if tensor.is_floating_point()]
    statistics = BatchNormStatistics(module, patterns, batch_norm).names if batch_norm == "average" else []
    return {"parameters": [name for name in parameters if not is_excluded(name, patterns)], "statistics": statistics}


def model_fingerprint(module: nn.Module, names: Mapping[str, Sequence[str]]) -> str | None:
    """Fingerprint of a fine-tuned model's merged parameters; None if they are sharded."""
    reshard(module)
    named = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
    return None if find_shards(named) else fingerprint({name: named[name] for name in names["parameters"]})


def recorded_names(state: StreamState) -> dict[str, list[str]]:
    """Names of the merged tensors of a stream, as its state records them.

    A state of an earlier version does not record them. They are all floating-point tensors of the merged model then,
    and batch-norm statistics are known by their names. Other buffers count as parameters.
    """
    if state.names:
        return state.names
    floating = {name for name, tensor in (state.merged or {}).items() if tensor.is_floating_point()}
    pairs = [(f"{stem}running_mean", f"{stem}running_var") for stem in {_stem(name) for name in floating}]
    statistics = {name for pair in pairs if floating.issuperset(pair) for name in pair}
    return {"parameters": sorted(floating - statistics), "statistics": sorted(statistics)}


def read_model(model: Model, state: StreamState, task: str) -> Snapshot:
    """The merged tensors of a task's fine-tuned model, under the stream's names.

    The model is checked against the task's fingerprint. There is none if an earlier version merged the task, or if its
    parameters were sharded. Another model is not noticed then.

    Args:
        model: A file or folder, see :func:`~lightning_odem.parameters.read_checkpoint`, a module, or tensors by name.
            Its other tensors do not matter.
        state: The state of the stream.
        task: The task that the model was merged for.

    Raises:
        ValueError: If names or shapes differ, a value is not finite, or the task was merged with another model.
    """
    if isinstance(model, nn.Module):
        found: Mapping[str, Any] = take_snapshot(model)
    else:
        found = model if isinstance(model, Mapping) else read_checkpoint(model)
    if others := [str(name) for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"A model is given as tensors by name; these are none: {', '.join(others[:3])}.")
    found = {canonical_name(name): tensor.detach().cpu() for name, tensor in found.items()}
    names, merged = recorded_names(state), state.merged or {}
    wanted = [*names["parameters"], *names["statistics"]]
    there = {name: other for name, other in match_names(wanted, found).items() if other in found}
    shapes = {name: found[other].shape for name, other in there.items()}
    check_same_shapes({name: merged[name].shape for name in wanted}, shapes, "merged", "withdrawn")
    read = {name: found[there[name]] for name in wanted}
    if broken := [name for name, tensor in read.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"The withdrawn model holds infinite or NaN values in {', '.join(broken[:3])}.")
    digest = state.fingerprints.get(task)
    given = fingerprint({name: read[name] for name in names["parameters"]}) if digest else None
    if given != digest:
        raise ValueError(
            f"Task {task!r} was merged with another model than the one given (SHA-256 {str(digest)[:12]}... and "
            f"{str(given)[:12]}...). Give the model as it was at the end of its training, not that of the best epoch, "
            "and not rounded to another precision."
        )
    return read


def _stem(name: str) -> str:
    """A dotted name without its last part."""
    return name[: name.rfind(".") + 1]
