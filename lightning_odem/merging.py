"""One merge of a module, as a transaction: the module ends up merged, or as it was."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.batch_norm import BatchNormStatistics
from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.objective import BatchLoss
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import MergeContext, MergeMethod, MergeResult, method_name
from lightning_odem.parameters import ParameterVector, canonical_name, is_excluded
from lightning_odem.report.record import MergeRecord
from lightning_odem.snapshot import load_snapshot, undisturbed


@dataclass(frozen=True)
class Calibration:
    """What a merge measures its loss on.

    Args:
        buffer: Samples of every task seen, the incoming one included.
        batch_loss: Mean loss of a micro-batch at the module's current parameters.
        batch_size: Samples per micro-batch.
    """

    buffer: CalibrationBuffer
    batch_loss: BatchLoss
    batch_size: int = 128

    def objective(self, vector: ParameterVector) -> CalibrationObjective:
        """The calibration loss as a function of the vector."""
        return CalibrationObjective(vector, self.buffer, self.batch_loss, self.batch_size)


@contextmanager
def merging(
    module: nn.Module,
    method: MergeMethod,
    *,
    task: str,
    t: float,
    merged: Mapping[str, Tensor] | None,
    base: Mapping[str, Tensor],
    calibration: Calibration | None,
    exclude: tuple[str, ...] = (),
    batch_norm: str = "average",
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[MergeRecord]:
    """Replace a module's weights, the incoming model, by their merge into the merged model.

    Besides the module's own weights this holds ``merged`` and ``base``, which the caller keeps, and on the module's
    device the incoming vector, the current point and one gradient: five vectors of the model's size, three of them on
    the device.

    Args:
        module: Module that holds the incoming model; left in the state it was in but for the merged weights. Of its
            frozen parameters those are merged too in which it differs from the merged model.
        method: The merge method.
        task: Name of the incoming task.
        t: Operating time in [0, 1].
        merged: Parameters and buffers of the merged model by name; None for the first task.
        base: Those of the base model.
        calibration: Samples and loss, needed by methods that declare ``"calibration"``.
        exclude: Patterns of parameters left alone.
        batch_norm: Policy for running statistics, see :class:`BatchNormStatistics`.
        on_step: Told (steps done, steps in all).

    Yields:
        What happened, without accuracies. The block under the merge belongs to the transaction: an exception in it,
        like one in the merge, leaves the module with the incoming model and the method with the state it had.

    Raises:
        ValueError: If the models differ in names or shapes, nothing is left to merge or the loss has no gradient.
        NonFiniteLossError: If a loss or gradient is not finite; the message names the task and the step.
    """
    started = time.perf_counter()
    frozen = _moved_and_frozen(module, merged or {}, exclude)
    for parameter in frozen:
        parameter.requires_grad_(True)
    vector = ParameterVector(module, exclude)
    statistics = BatchNormStatistics(module, exclude, batch_norm)
    objective = calibration.objective(vector) if calibration else None
    incoming = vector.read()
    incoming_buffers = [buffer.clone() for buffer in module.buffers()]
    # A copy: a method may change its tensors in place before it fails.
    method_state = deepcopy(method.state_dict())
    try:
        with undisturbed(module):
            if merged is not None:
                statistics.interpolate(merged, t)
            context = MergeContext(
                names=vector.names,
                shapes=[tuple(shape) for shape in vector.shapes],
                loss_and_grad=objective.loss_and_grad if objective else None,
                loss=objective.loss if objective else None,
                base=vector.gather(base) if "base" in method.needs else None,
                on_step=on_step,
            )
            if merged is None:
                result = method.start(incoming, context)
            else:
                result = method.merge(vector.gather(merged), incoming, t, context)
            vector.write_(result.theta)
            if calibration and merged is not None and batch_norm == "recalibrate":
                statistics.recalibrate(calibration.buffer, calibration.batch_loss, calibration.batch_size)
            merged_statistics = statistics.read()
        statistics.write_(merged_statistics)
        if merged is not None and t == 0.0:
            load_snapshot(module, merged, lambda name: name in merged)  # the other buffers stay as well
        record = _record(result, objective, task=task, t=t, method=method_name(method))
        del result
        record.merge_seconds = time.perf_counter() - started
        yield record
    except BaseException as error:
        vector.write_(incoming)
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), incoming_buffers, strict=True):
                buffer.copy_(value)
        method.load_state_dict(method_state)
        if isinstance(error, NonFiniteLossError):
            raise NonFiniteLossError(f"Merging task {task!r}: {error.what}", error.step, error.t) from error
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _moved_and_frozen(module: nn.Module, merged: Mapping[str, Tensor], exclude: tuple[str, ...]) -> list[Tensor]:
    """Parameters that earlier tasks moved away from where they stand frozen in the incoming model."""
    frozen = {canonical_name(name): tensor for name, tensor in module.named_parameters() if not tensor.requires_grad}
    return [
        tensor
        for name, tensor in frozen.items()
        if name in merged
        and not is_excluded(name, exclude)
        and not torch.equal(tensor.detach().cpu(), merged[name].to("cpu", tensor.dtype))
    ]


def _record(result: MergeResult, objective: CalibrationObjective | None, **known: Any) -> MergeRecord:
    record = MergeRecord(**known)
    if objective is not None:
        record.calibration = objective.buffer.counts
        record.gradient_evaluations = objective.gradient_evaluations
        record.loss_evaluations = objective.loss_evaluations
        record.sample_gradients = objective.gradient_evaluations * len(objective.buffer)
        record.gradient_seconds = objective.seconds
    path = result.trajectory
    if path is not None:
        record.path, record.steps = path.as_dict(), len(path.gamma)
        record.loss_before, record.loss_after, record.loss_incoming = path.loss[0], path.loss[-1], path.loss1
        record.barrier, record.envelope_excess = path.barrier, path.envelope_excess
    return record
