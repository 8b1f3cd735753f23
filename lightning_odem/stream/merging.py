"""One merge of a module as a transaction: the module is merged in the end, or as it was."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import MergeContext, MergeMethod, MergeResult, method_name
from lightning_odem.methods.base import Whole
from lightning_odem.methods.kept_state import KeptState
from lightning_odem.methods.needs import Calibration, Offer, Sources
from lightning_odem.methods.sharding import OnShards
from lightning_odem.parameters.adapter_combination import AdapterCombination
from lightning_odem.parameters.adapters import Adapters
from lightning_odem.parameters.linear_layers import inputs_first, linear_layers, number_of_groups
from lightning_odem.parameters.low_rank import FactorPairs
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import find_shards, local, reshard
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.parameters.vector import ParameterVector, canonical_name, is_excluded
from lightning_odem.report.record import MergeRecord
from lightning_odem.stream.trace import TrainingTrace


@dataclass(frozen=True)
class Merge:
    """A merge that is made but may still be taken back.

    Args:
        record: The record of the merge, without accuracies.
        module: The module, which holds the merged model.
        exclude: Patterns of parameters that were not merged.
        unrounded: The merged parameters of lower precision than the vector, on the CPU, before they were rounded.
        pairs: The adapters, which were merged by their updates.
        layout: What the method knew of the module, see :class:`~lightning_odem.stream.state.StreamState`.
        measured: What the merge has measured for the stream, likewise.
    """

    record: MergeRecord
    module: nn.Module
    exclude: tuple[str, ...]
    unrounded: Snapshot
    pairs: FactorPairs = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)

    def snapshot(self, select: Callable[[str], bool] | None = None) -> Snapshot:
        """Parameters and buffers of the merged model by name, on the CPU; the next merge starts from them.

        Parameters are not rounded to lower precision, so that rounding errors do not add up over a stream.

        Args:
            select: Selects tensors by name; by default those that are not excluded.
        """
        select = select or (lambda name: not is_excluded(name, self.exclude))
        return take_snapshot(self.module, select) | self.unrounded


@contextmanager
def merging(
    module: nn.Module,
    method: MergeMethod,
    *,
    task: str,
    t: float,
    merged: Mapping[str, Tensor] | None,
    base: Mapping[str, Tensor],
    calibration: CalibrationSet | None,
    exclude: tuple[str, ...] = (),
    batch_norm: str = "average",
    trace: TrainingTrace = TrainingTrace(),
    on_step: Callable[[int, int], None] | None = None,
    whole: Whole | None = None,
    layout: Mapping[str, Any] = {},
) -> Iterator[Merge]:
    """Merge the incoming model that a module holds into the merged model; the module holds the result.

    In a job of several processes, all call this with the same models and samples. An error in one is raised in all.

    Args:
        module: Holds the incoming model. Only its merged parameters and buffers change. Frozen parameters are merged
            too if they differ from the merged model.
        method: The merge method.
        task: Name of the incoming task.
        t: Operating time in [0, 1]. A method may choose another, which is then in the record.
        merged: Parameters and buffers of the merged model by name, see :meth:`Merge.snapshot`; None for the first task.
        base: Parameters and buffers of the base model; may be empty if the method does not need it.
        calibration: Samples and loss, or None if the method needs none. A loss on logits stores the incoming model's
            in the buffer, so the buffer has to be a copy of the stream's.
        exclude: Patterns of parameters that are not merged.
        batch_norm: Policy for running statistics, see :class:`BatchNormStatistics`.
        trace: What the method needs of the incoming model's training.
        on_step: Called with the number of steps done and that of all steps.
        whole: The model, if the module holds only some of its parameters.
        layout: What the types of the module's layers do not tell, see
            :class:`~lightning_odem.stream.state.StreamState`.

    Yields:
        The merge. The block belongs to the transaction. An exception in the merge or in the block leaves the module
        with the incoming model and the method with the state it had.

    Raises:
        ValueError: If the models differ in names or shapes, no parameter is left to merge, a value of the incoming or
            new merged model is not finite, the loss has no gradient, a need of the method is not met, or the method
            changed its state in place.
        NonFiniteLossError: If a loss or gradient is not finite; the message names the task and the step.
    """
    started = time.perf_counter()
    check_needs(method, Offer(bool(base), calibration is not None, trace.batches is not None, trace.collected))
    frozen = _moved_and_frozen(module, merged or {}, exclude)
    for parameter in frozen:
        parameter.requires_grad_(True)
    combined = method.linear and calibration is None  # a loss needs whole updates
    adapters = (AdapterCombination if combined else Adapters)(module, exclude)
    adapters.expand()
    vector = ParameterVector(module, exclude, adapters)
    rule = method if vector.shards is None else OnShards(method)
    layers = linear_layers(module, dict(zip(vector.tensors, vector.names, strict=True)))
    groups = {**layout.get("groups", {}), **number_of_groups(layers)}
    transposed = inputs_first(layers) | adapters.inputs_first | frozenset(layout.get("transposed", ()))
    statistics = BatchNormStatistics(module, exclude, batch_norm)
    incoming_statistics = statistics.read()
    incoming = vector.read()
    incoming_buffers = [buffer.clone() for buffer in module.buffers()]
    method_state, measured = KeptState(method), {}
    try:
        with Processes.current().together():
            with undisturbed(module):
                check_finite(vector.not_finite(incoming) + statistics.not_finite(), task, "incoming")
                if calibration is not None:
                    calibration.store_logits(task)
                    if merged is not None and any(isinstance(need, Calibration) for need in method.needs):
                        found, calibration = calibration, calibration.fastest(vector)
                        measured = {} if found is calibration else {"batch_size": calibration.batch_size}
                sources = Sources(module, vector, layers, task, base, calibration, trace.batches, trace.collected)
                needed = {type(need): need.build(sources) for need in method.needs}
                if merged is not None:
                    statistics.interpolate(merged, t)
                context = MergeContext(
                    names=vector.names,
                    shapes=[tuple(shape) for shape in vector.shapes],
                    needed=needed,
                    on_step=on_step,
                    shards=vector.shards,
                    groups=groups,
                    transposed=transposed,
                    ranks=adapters.ranks,
                    whole=whole,
                )
                if merged is None:
                    result = rule.start(incoming, context)
                else:
                    result = rule.merge(vector.gather(merged), incoming, t, context)
                    if result.t is not None:
                        t = result.t
                        statistics.write_(incoming_statistics)
                        statistics.interpolate(merged, t)
                method_state.check()
                check_finite(vector.not_finite(result.theta), task, "merged")
                vector.write_(result.theta)
                if calibration and merged is not None and batch_norm == "recalibrate":
                    statistics.recalibrate(calibration.buffer, calibration.loss, calibration.batch_size)
                check_finite(statistics.not_finite(), task, "merged")
                merged_statistics = statistics.read()
            statistics.write_(merged_statistics)
            unchanged = merged if merged is not None and t == 0.0 else None
            unrounded = vector.unrounded(vector.gather(unchanged) if unchanged else result.theta)
            updates = (dict(zip(vector.names, vector.views(flat), strict=True)) for flat in (result.theta, incoming))
            factors, discarded = adapters.contract(*updates)
            unrounded |= factors
            if unchanged is not None:
                load_snapshot(module, unchanged, lambda name: name in unchanged)  # the other buffers stay as well
                unrounded |= {name: unchanged[name] for name in factors}
            record = record_of(result, task=task, t=t, method=method_name(method), discarded=discarded)
            if calibration is not None:
                record.calibration = calibration.buffer.counts
            for need in method.needs:
                need.account(needed[type(need)], record)
            del result
            record.merge_seconds = time.perf_counter() - started
            known = {"trained": list(vector.names), "groups": groups, "transposed": sorted(transposed)}
            yield Merge(record, module, exclude, unrounded, adapters.pairs, known, measured)
    except BaseException as error:
        vector.put_back_(incoming)
        adapters.restore()
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), incoming_buffers, strict=True):
                buffer.copy_(value)
        method_state.restore()
        if isinstance(error, NonFiniteLossError):
            raise NonFiniteLossError(f"Merging task {task!r}: {error.what}", error.step, error.t) from error
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def check_finite(broken: list[str], task: str, which: str) -> None:
    """Refuse a model with infinite or NaN values.

    Args:
        broken: Names of the tensors that hold them.
        task: Name of the incoming task.
        which: Which model it is: ``"incoming"`` or ``"merged"``.

    Raises:
        ValueError: If there are any.
    """
    if broken:
        names = f"{', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}"
        cause = "its training has diverged" if which == "incoming" else "the merge method made them"
        raise ValueError(
            f"Merging task {task!r}: the {which} model holds infinite or NaN values in {names} ({cause}); they would "
            "spoil every later merge. Nothing was merged."
        )


def _moved_and_frozen(module: nn.Module, merged: Mapping[str, Tensor], exclude: tuple[str, ...]) -> list[Tensor]:
    """Frozen parameters of the incoming model that differ from the merged model, since earlier tasks trained them."""
    reshard(module)
    named = {canonical_name(name): tensor for name, tensor in module.named_parameters() if not tensor.requires_grad}
    frozen = {
        name: tensor
        for name, tensor in named.items()
        if name in merged and tensor.is_floating_point() and not is_excluded(name, exclude)
    }
    shards = find_shards(frozen)
    kept = {name: shards.part(name, merged[name]) if shards else merged[name] for name in frozen}
    moved = torch.tensor(
        [
            not torch.equal(local(tensor).detach().cpu(), kept[name].to("cpu", tensor.dtype))
            for name, tensor in frozen.items()
        ],
        dtype=torch.float64,
    )
    if shards is not None:
        shards.sum_(moved)  # moved in any of the processes
    return [tensor for tensor, processes in zip(frozen.values(), moved.tolist(), strict=True) if processes]


def check_needs(method: MergeMethod, offer: Offer) -> None:
    """Refuse a method if something that it needs is missing.

    Raises:
        ValueError: If so; the message names what is missing and what provides it.
    """
    missing = dict.fromkeys(need.source or repr(need) for need in method.needs if not need.is_met(offer))
    if missing:
        raise ValueError(
            f"Merge method {method_name(method)!r} needs {' and '.join(missing)}, which this merge does not have. "
            "ContinualMergeCallback collects them while it trains; otherwise choose another method."
        )


def record_of(result: MergeResult, **known: Any) -> MergeRecord:
    """The record of a merge, from its path and what else is known."""
    record = MergeRecord(**known)
    path = result.trajectory
    if path is not None:
        record.path, record.steps = path.as_dict(), len(path.t) - 1
        record.loss_before, record.loss_after, record.loss_incoming = path.loss[0], path.loss[-1], path.loss1
        record.barrier, record.envelope_excess = path.barrier, path.envelope_excess
        record.estimated = path.estimated
    return record
