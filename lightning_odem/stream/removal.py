"""A task taken out of a stream again: what is left is the stream of the other tasks, up to rounding."""

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.methods import BaseModel, MergeContext, MergeMethod, method_name
from lightning_odem.methods.kept_state import copy_containers
from lightning_odem.methods.layout import tensors
from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.files import replacing
from lightning_odem.parameters.low_rank import FactorPair, with_factors, with_updates
from lightning_odem.parameters.model_files import match_names
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import find_shards, reshard
from lightning_odem.parameters.snapshot import Snapshot, take_snapshot
from lightning_odem.parameters.vector import canonical_name, check_same_shapes, is_excluded
from lightning_odem.parameters.weights_file import read_file
from lightning_odem.report import StreamReport
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.naming import file_name
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import fingerprint

Model = str | os.PathLike | nn.Module | Mapping[str, Tensor]


def remove_task(
    directory: RunDirectory, state: StreamState, method: MergeMethod, task: str, model: Model
) -> StreamState:
    """Take a task out of a stream, in its directory in one step; in memory where it has none.

    Args:
        directory: Of the stream. What it holds counts, whatever is in memory.
        state: The stream in memory; not changed.
        method: The method that the stream was merged with; has the state of the stream returned afterwards.
        task: Name of the task.
        model: The model that it was merged with, see :func:`read_model`.

    Returns:
        The stream without the task.

    Raises:
        ValueError: As :func:`take_out`.
        StreamInUseError: If another process fits a task of the stream.
        RuntimeError: In a job of several processes.
    """
    if Processes.current().size > 1:
        raise RuntimeError(
            "A task is taken out by one process, from whole tensors. Do it before the others start, or with "
            "`lightning-odem remove`."
        )
    if not directory.holds_stream:
        state = take_out(state, method, task, model)
    else:
        with directory.locked():
            before = directory.read(state)
            state = take_out(before, method, task, model)
            state.report.merges[-1].checkpoint = _write_checkpoint(directory, before, state, task)
            directory.rewrite(state)
    rank_zero_info(describe(state.report))
    return state


def take_out(state: StreamState, method: MergeMethod, task: str, model: Model) -> StreamState:
    """The stream without one of its tasks; the one given stays as it is.

    The merged model and the method's state are those of the other tasks, as if it had never been there. So are
    batch-norm statistics where they are averaged; otherwise, and other buffers always, they stay. The task's samples,
    its parameters and its accuracies are gone; what was measured before stays as it was.

    Raises:
        ValueError: If there is no such task or it is the only one with a weight, if the method cannot take it out or
            is not the one that merged the stream, or if the model is not the one the task was merged with, as far as
            can be told.
    """
    report = state.report
    if task not in report.tasks:
        raise ValueError(f"Task {task!r} is not in the stream, which holds: {', '.join(report.tasks) or 'no task'}.")
    index = report.tasks.index(task)
    total = math.fsum(report.weights)
    # Of a stream without weights the first model is the merged one.
    shares = [weight / total if total else float(place == 0) for place, weight in enumerate(report.weights)]
    if shares[index] == 1.0:
        raise ValueError(
            f"Task {task!r} is all that the merged model consists of: no other task has a weight. Begin a new stream "
            "instead."
        )
    withdrawn = read_model(model, state, task)
    if report.merges[index].t > 0.0:  # a task of weight 0 has added nothing
        state = _subtract(state, method, withdrawn, shares, index)
    left = state.report.without(task)
    left.merges[-1] = replace(left.merges[-1], checkpoint=None)  # the file there may be of a model with the task
    return replace(
        state,
        task_parameters={name: own for name, own in state.task_parameters.items() if name != task},
        fingerprints={name: digest for name, digest in state.fingerprints.items() if name != task},
        buffer=state.buffer.without(task),
        report=left,
        started={},
    )


def read_model(model: Model, state: StreamState, task: str) -> Snapshot:
    """The tensors of a fine-tuned model that merges have moved, under the stream's names.

    Args:
        model: The model: a file or folder, see :func:`~lightning_odem.parameters.read_checkpoint`, a module, or tensors
            by name. Its other tensors do not matter.
        state: The stream.
        task: The task that it was merged for.

    Raises:
        ValueError: If names or shapes differ, a value is not finite, or the task was merged with another model. Of a
            task whose model an earlier version merged, or several processes in shards, that is not known: another
            model is then subtracted without notice.
    """
    if isinstance(model, nn.Module):
        found: Mapping[str, Any] = take_snapshot(model)
    else:
        found = model if isinstance(model, Mapping) else read_checkpoint(model)
    if others := [str(name) for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"A model is given as tensors by name; these are none: {', '.join(others[:3])}.")
    found = {canonical_name(name): tensor.detach().cpu() for name, tensor in found.items()}
    names, merged = moved_names(state), state.merged or {}
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
            f"{str(given)[:12]}...). Give the weights as they were at the end of its training: not those of the best "
            "epoch, not rounded to another precision."
        )
    return read


def moved_names(state: StreamState) -> dict[str, list[str]]:
    """Which tensors of a stream's merged model merges move, see :class:`~lightning_odem.stream.state.StreamState`.

    Of states that do not say it: all floating-point tensors, those of batch norm by their names. Buffers of other kinds
    are not told apart from parameters there.
    """
    if state.names:
        return state.names
    floating = {name for name, tensor in (state.merged or {}).items() if tensor.is_floating_point()}
    pairs = [(f"{stem}running_mean", f"{stem}running_var") for stem in {_stem(name) for name in floating}]
    statistics = {name for pair in pairs if floating.issuperset(pair) for name in pair}
    return {"parameters": sorted(floating - statistics), "statistics": sorted(statistics)}


def names_to_keep(module: nn.Module, patterns: tuple[str, ...], batch_norm: str) -> dict[str, list[str]]:
    """What a stream notes of a module to know later which tensors its merges move."""
    named = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
    parameters = [name for name, tensor in named.items() if tensor.is_floating_point()]
    statistics = BatchNormStatistics(module, patterns, batch_norm).names if batch_norm == "average" else []
    return {"parameters": [name for name in parameters if not is_excluded(name, patterns)], "statistics": statistics}


def fingerprint_to_keep(module: nn.Module, names: Mapping[str, Sequence[str]]) -> str | None:
    """What a stream notes of a fine-tuned model to know it again; None of one that several processes share."""
    reshard(module)
    named = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
    return None if find_shards(named) else fingerprint({name: named[name] for name in names["parameters"]})


def describe(report: StreamReport) -> str:
    """The last removal in one line."""
    checkpoint, tasks = report.merges[-1].checkpoint, report.tasks
    where = f" Merged weights: {checkpoint}" if checkpoint else ""
    return f"Took task {report.removed[-1].task!r} out: the stream holds {', '.join(tasks)}.{where}"


def _subtract(
    state: StreamState, method: MergeMethod, withdrawn: Snapshot, shares: Sequence[float], index: int
) -> StreamState:
    """The stream with merged model and state of the method as without a task."""
    merged, base, names, share = state.merged or {}, state.base or {}, moved_names(state), shares[index]
    used = {record.method for record, other in zip(state.report.merges, shares, strict=True) if other}
    if others := sorted(used - {method_name(method)}):
        raise ValueError(
            f"{', '.join(others)} merged tasks of this stream, so {method_name(method)!r} cannot take one out. Give "
            "the method that the whole stream was merged with."
        )
    # Adapters are merged, and taken out, by their updates.
    pairs, factors = {name: FactorPair(*plain) for name, plain in state.adapters.items()}, merged
    merged, base, withdrawn = (with_updates(model, pairs) for model in (merged, base, withdrawn))
    names = {**names, "parameters": [name for name in names["parameters"] if name in merged]}
    # What no task has moved may be new to the method, as weights that were frozen all along.
    still = {
        name
        for name in names["parameters"]
        if all(torch.equal(base[name].to(merged[name]), model[name].to(merged[name])) for model in (merged, withdrawn))
    }
    moved = [name for name in names["parameters"] if name not in still] or names["parameters"]
    wide = any(merged[name].dtype == torch.float64 for name in moved)

    def flat(model: Snapshot) -> Tensor:
        return torch.cat([model[name].reshape(-1).to(torch.float64 if wide else torch.float32) for name in moved])

    context = MergeContext(
        names=moved,
        shapes=[tuple(merged[name].shape) for name in moved],
        needed={BaseModel: flat(base)} if BaseModel() in method.needs else {},
        shares=shares,
        discarded=max([0.0, *(record.discarded for record in state.report.merges if record.discarded > 0.0)]),
    )
    method.load_state_dict(copy_containers(state.method))
    theta = method.remove(flat(merged), flat(withdrawn), share, context).theta
    left = {name: piece.to(merged[name].dtype, copy=True) for name, piece in tensors(theta, context).items()}
    for name in names["statistics"]:
        statistic = merged[name].lerp(withdrawn[name].to(merged[name]), -share / (1.0 - share))
        left[name] = statistic.clamp(min=0.0) if name.endswith("running_var") else statistic
    left, discarded = with_factors(left, pairs, factors)
    if pairs:
        state = replace(state, report=deepcopy(state.report))
        state.report.merges[-1].discarded = discarded
    return replace(state, merged={**factors, **left}, method=copy_containers(method.state_dict()))


def _write_checkpoint(directory: RunDirectory, before: StreamState, state: StreamState, task: str) -> str | None:
    """The last checkpoint of merged weights once more, with those of the stream without a task; None if that fails."""
    template, path = before.report.merges[-1].checkpoint, None
    if template is not None:
        name = f"merged-{len(state.report.tasks):02d}-without-{file_name(task)}.ckpt"
        source, path = directory.at(Path(template).name), directory.at(name)
        try:
            content = read_file(source)
            content["state_dict"] = _replaced(content["state_dict"], before, state)
            with replacing(path) as draft:
                torch.save(content, draft)
        except (OSError, ValueError) as error:
            rank_zero_warn(
                f"No checkpoint of the merged weights without task {task!r} was written: {error} load_task of the "
                "callback writes them into a module."
            )
            return None
    return None if path is None else str(path)


def _replaced(saved: Mapping[str, Any], before: StreamState, state: StreamState) -> dict[str, Any]:
    """A module's state dict with the weights of a stream, and of its tasks' own parameters those of the last one."""
    last = state.task_parameters.get(state.report.tasks[-1], {})
    known = {**state.fixed, **last, **(state.merged or {})}
    # Tied tensors share memory; the stream has them once.
    tied = {
        _place(value): known[canonical_name(name)] for name, value in saved.items() if canonical_name(name) in known
    }
    replaced = {}
    for name, value in saved.items():
        new = known.get(canonical_name(name), tied.get(_place(value)))
        if new is None and canonical_name(name) not in before.own_names and _is_floating(value):
            raise ValueError(f"{name} of the last checkpoint is not in the stream.")
        replaced[name] = value if new is None else new.to(value.dtype)
    return replaced


def _place(value: Any) -> Any:
    """Where a tensor is in memory; one object's own place where it is none."""
    return (value.data_ptr(), value.shape) if isinstance(value, Tensor) else id(value)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _stem(name: str) -> str:
    """A dotted name without its last part."""
    return name[: name.rfind(".") + 1]
