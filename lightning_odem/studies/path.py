"""Following the whole path between two models, with stops at which the model is measured."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.flow import ReusedGradient, Trajectory
from lightning_odem.methods import Calibration, FixedTime, MergeContext, MergeMethod, MergeResult, PaperODEMerge
from lightning_odem.metrics import ACCURACY, TaskMetric, find_metric
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.report import MergeRecord
from lightning_odem.stream.measurement import load_task_parameters
from lightning_odem.stream.merging import merging
from lightning_odem.studies.fine_tuned_cache import FineTuned
from lightning_odem.studies.workbench import Workbench

Visit = Callable[[float, Callable[[], Snapshot]], None]
"""Called at a stop with its time t and a function that takes a snapshot of the model there."""

SAME_ACCURACY = 1e-9
"""Mean accuracies that differ by less than this differ by rounding only: a single sample changes them by more."""


class StraightLine(MergeMethod):
    """The straight line from the merged to the incoming model: the transport alone, without rectification.

    The loss is measured at every step, as by :class:`~lightning_odem.methods.PaperODEMerge`. No gradient is computed.

    Args:
        step_size: Distance in time between the points where the loss is measured. 1 is a multiple of it.
    """

    needs = (Calibration(),)

    def __init__(self, step_size: float = 0.05) -> None:
        self.step_size = step_size

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Move from ``merged`` towards ``incoming`` up to time ``t``, in the memory of ``merged``."""
        start, steps = merged.clone(), round(t / self.step_size)
        trajectory = Trajectory(merged, loss1=context[Calibration].loss(incoming))
        for done in range(steps + 1):
            time = t * done / max(steps, 1)
            torch.lerp(start, incoming, time, out=merged)
            if context.on_step is not None:
                context.on_step(done, steps)
            trajectory.end(time, context[Calibration].loss(merged))
        return MergeResult(merged, trajectory)


def follow_path(
    module: LightningModule,
    flow: MergeMethod,
    merged: Snapshot,
    incoming: Snapshot,
    *,
    task: str,
    calibration: CalibrationSet,
    points: int,
    visit: Visit,
    division: Division,
    batch_norm: str = "average",
) -> MergeRecord:
    r"""Follow the path from the merged model to the incoming model and stop at evenly spaced times.

    The path is integrated once. This costs 1 / h gradients for steps of length h, however many stops there are, and no
    vectors of the model's size beyond those of a merge. At t = 0 the module is the merged model, at t = 1 the incoming
    model.

    At a stop in between, the module is the result of a merge with the operating time t, with one difference: along this
    path, batch-norm statistics change with t. In a merge they are fixed at those of its end, but a path with several
    stops has no single end.

    Args:
        module: The module, attached to a Trainer. Afterwards it is the incoming model.
        flow: Method whose path is followed: :class:`~lightning_odem.methods.PaperODEMerge` or :class:`StraightLine`.
        merged: Parameters and buffers of the merged model by name.
        incoming: Parameters and buffers of the incoming model by name.
        task: Name of the incoming task.
        calibration: Samples and loss.
        points: Number of stops, t = 0 and t = 1 included.
        visit: Called at every stop while the module is at :math:`\theta(t)`. Its arguments are t and a function that
            takes a snapshot of the model there, not rounded to half precision. It may change what is not merged, but
            must restore what the calibration loss depends on.
        division: Which parameters are merged.
        batch_norm: Policy for running statistics, see :class:`~lightning_odem.calibration.BatchNormStatistics`.

    Returns:
        The record of the merge to t = 1. ``path["loss"]`` has the losses at all steps.

    Raises:
        TypeError: For a method that is no flow.
        ValueError: If a stop lies between two steps.
        NonFiniteLossError: If a loss or gradient is not finite.
    """
    check_points(flow, points)
    is_shared = division.shared(module)
    exclude = division.patterns(module)
    load_snapshot(module, merged, is_shared)
    visit(0.0, lambda: merged)
    load_snapshot(module, incoming, is_shared)
    statistics = BatchNormStatistics(module, exclude, batch_norm)
    stops = _Stops(flow, points, merged, statistics, visit, partial(take_snapshot, module, is_shared))
    with merging(
        module,
        stops,
        task=task,
        t=1.0,
        merged=merged,
        base={},
        calibration=calibration,
        exclude=exclude,
        batch_norm=batch_norm,
    ) as merge:
        return merge.record


def store_logits_of(
    model: FineTuned, module: LightningModule, *, task: str, calibration: CalibrationSet, division: Division
) -> None:
    """Store a model's logits of its task's samples, if the calibration loss compares with them.

    This is for the model at which a first path starts. Logits of the model at the end of a path are stored while the
    path is followed.

    Args:
        model: The fine-tuned model.
        module: The module, attached to a Trainer. Afterwards it is this model.
        task: Name of the model's task. Its samples are in the buffer.
        calibration: Samples and loss.
        division: Which parameters are merged.
    """
    load_snapshot(module, model.weights, division.shared(module))
    load_task_parameters(module, model.own)
    with undisturbed(module):
        calibration.store_logits(task)


def check_points(flow: MergeMethod, points: int) -> None:
    """Refuse stops that do not coincide with steps of a flow.

    Args:
        flow: The method whose path is to be followed.
        points: Number of stops at evenly spaced times from 0 to 1.

    Raises:
        TypeError: For a method that is no flow.
        ValueError: If a stop lies between two steps, or the flow does not reach t = 1 in steps of equal length.

    Example:
        >>> check_points(PaperODEMerge(step_size=0.05), points=11)
        >>> check_points(PaperODEMerge(step_size=0.04), points=11)
        Traceback (most recent call last):
            ...
        ValueError: 11 points from t = 0 to t = 1 lie 0.1 apart, which is no multiple of the step size 0.04. ...
    """
    if not isinstance(flow, (PaperODEMerge, StraightLine)):
        raise TypeError(
            f"Only the path of PaperODEMerge can be followed, not that of {type(flow).__name__}. Choose 'ode_paper'."
        )
    if isinstance(flow, PaperODEMerge) and (
        flow.step_control
        or isinstance(flow.solver, ReusedGradient)
        or isinstance(flow.operating_time, (float, int, FixedTime))
    ):
        raise ValueError(
            "A path goes to t = 1 in steps of one length, each with its gradient; it cannot be followed with "
            f"solver={flow.solver!r}, step_control={flow.step_control}, operating_time={flow.operating_time!r}."
        )
    if points < 2:
        raise ValueError(f"A path has two points at least, its ends; got points={points}.")
    steps = round(1 / flow.step_size)
    if abs(steps * flow.step_size - 1) > 1e-9 or steps % (points - 1):
        raise ValueError(
            f"{points} points from t = 0 to t = 1 lie {1 / (points - 1):.4g} apart, which is no multiple of the step "
            f"size {flow.step_size:g}. Choose a step size of 1 / n and points such that points - 1 divides n."
        )


def check_measured_by_accuracy(bench: Workbench) -> None:
    """Refuse tasks with another metric than accuracy, because accuracies are compared along a path.

    Raises:
        ValueError: If a task has another metric.
    """
    for name in bench.stream.names:
        metric = TaskMetric.of(find_metric(name, bench.model, bench.stream[name]))
        if metric != ACCURACY:
            raise ValueError(
                f"This study compares accuracies; task {name!r} is measured by {metric.name}. Remove its "
                "task_metric, or use `compare`, which supports other metrics."
            )


class _Stops(MergeMethod):
    """A flow that calls ``visit`` at evenly spaced times."""

    needs = (Calibration(),)

    def __init__(
        self,
        flow: MergeMethod,
        points: int,
        merged: Snapshot,
        statistics: BatchNormStatistics,
        visit: Visit,
        take: Callable[[], Snapshot],
    ) -> None:
        self._flow, self._points, self._merged, self._visit, self._take = flow, points, merged, visit, take
        self._statistics, self._incoming = statistics, statistics.read()

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        objective = context[Calibration]

        def arrive(done: int, steps: int) -> None:
            self._interpolate(done / steps)
            if done and done % (steps // (self._points - 1)) == 0:
                objective.vector.write_(merged)  # the flow updates its current point in this memory
                if self._statistics.policy == "recalibrate":
                    self._statistics.recalibrate(objective.buffer, objective.batch_loss, objective.batch_size)
                self._visit(done / steps, lambda: self._take() | objective.vector.unrounded(merged))
                self._interpolate(done / steps)

        return self._flow.merge(merged, incoming, t, replace(context, on_step=arrive))

    def _interpolate(self, t: float) -> None:
        self._statistics.write_(self._incoming)
        self._statistics.interpolate(self._merged, t)
