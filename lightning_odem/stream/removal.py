"""Removal of a task: the result is the stream of the other tasks, up to rounding."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_odem.methods import BaseModel, MergeContext, MergeMethod, method_name
from lightning_odem.methods.kept_state import copy_containers
from lightning_odem.methods.layout import tensors
from lightning_odem.parameters.low_rank import FactorPair, with_factors, with_updates
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.report import StreamReport
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.identity import Model, read_model, recorded_names
from lightning_odem.stream.merged_files import rewrite_merged
from lightning_odem.stream.naming import file_name
from lightning_odem.stream.state import StreamState


def remove_task(
    directory: RunDirectory, state: StreamState, method: MergeMethod, task: str, model: Model
) -> StreamState:
    """Take a task out of a stream, in its directory in one step, or in memory if it has no directory.

    Args:
        directory: The stream's directory. A state in it counts, whatever is in memory.
        state: The state in memory; it is not changed.
        method: The method that merged the stream. Afterwards it has the state that belongs to the result.
        task: Name of the task.
        model: The task's fine-tuned model, see :func:`~lightning_odem.stream.identity.read_model`.

    Returns:
        The state without the task.

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
            name = f"merged-{len(state.report.tasks):02d}-without-{file_name(task)}.ckpt"
            path = rewrite_merged(directory.at(name), before, state, f"without task {task!r}")
            state.report.merges[-1].checkpoint = path
            directory.rewrite(state)
    rank_zero_info(describe(state.report))
    return state


def take_out(state: StreamState, method: MergeMethod, task: str, model: Model) -> StreamState:
    """The state of a stream without one of its tasks; the state given does not change.

    The merged model and the method's state become those of the other tasks, as if the task had never been merged. So do
    averaged batch-norm statistics. Other statistics and buffers stay. The task's samples, its own parameters and its
    scores are removed. Scores of other tasks stay as they were measured.

    Raises:
        ValueError: If there is no such task, it is the only one with a utility weight, the method cannot take it out or
            is not the one that merged the stream, or the model is known to be another one than the task's.
    """
    report = state.report
    if task not in report.tasks:
        raise ValueError(f"Task {task!r} is not in the stream, which holds: {', '.join(report.tasks) or 'no task'}.")
    index = report.tasks.index(task)
    total = math.fsum(report.weights)
    # If all utility weights are 0, the merged model is the first model.
    shares = [weight / total if total else float(place == 0) for place, weight in enumerate(report.weights)]
    if shares[index] == 1.0:
        raise ValueError(
            f"Task {task!r} is all that the merged model consists of: no other task has a utility weight above 0. "
            "Begin a new stream instead."
        )
    withdrawn = read_model(model, state, task)
    if report.merges[index].t > 0.0:  # a task of utility weight 0 has added nothing
        state = _subtract(state, method, withdrawn, shares, index)
    left = report.without(task)
    left.merges[-1] = replace(left.merges[-1], checkpoint=None)  # that file may hold a model with the task
    return replace(
        state,
        task_parameters={name: own for name, own in state.task_parameters.items() if name != task},
        fingerprints={name: digest for name, digest in state.fingerprints.items() if name != task},
        buffer=state.buffer.without(task),
        report=left,
        started={},
    )


def describe(report: StreamReport) -> str:
    """The last removal in one line."""
    checkpoint, tasks = report.merges[-1].checkpoint, report.tasks
    where = f" Merged weights: {checkpoint}" if checkpoint else ""
    return f"Took task {report.removed[-1].task!r} out: the stream holds {', '.join(tasks)}.{where}"


def _subtract(
    state: StreamState, method: MergeMethod, withdrawn: Snapshot, shares: Sequence[float], index: int
) -> StreamState:
    """The state with the merged model and the method's state as without a task."""
    merged, base, names, share = state.merged or {}, state.base or {}, recorded_names(state), shares[index]
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
    # Parameters that no task has changed, such as frozen ones, may be unknown to the method.
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
        groups=state.layout.get("groups", {}),
        transposed=frozenset(state.layout.get("transposed", ())),
        ranks={name: pair.rank(factors[name]) for name, pair in pairs.items() if name in factors},
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
