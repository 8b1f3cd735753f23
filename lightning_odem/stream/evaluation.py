"""The score of a module on a task's data, outside Lightning's own loops."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from warnings import catch_warnings, simplefilter

import lightning as L
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_odem.calibration.loss import move_to_device
from lightning_odem.calibration.prediction import predict_with_targets
from lightning_odem.metrics import ACCURACY, ClassAccuracy, TaskMetric, find_metric
from lightning_odem.parameters.processes import Processes
from lightning_odem.stream.evaluation_data import EvaluationData, is_in_order

_OTHERWISE = (
    "ContinualMergeCallback(monitor=...) takes a value that validation_step logs as the score, "
    "ContinualMergeCallback(evaluate=False) measures nothing."
)


@dataclass(frozen=True)
class Score:
    """The score of a module on a task.

    Args:
        value: The score; NaN if it is undefined.
        metric: The metric; None if nothing was measured.
        further: Other numbers that the metric gave, by name.
    """

    value: float
    metric: TaskMetric | None = ACCURACY
    further: dict[str, float] = field(default_factory=dict)


def score(
    module: L.LightningModule,
    data: Iterable | EvaluationData,
    task: str,
    datamodule: Any = None,
    strict: bool = False,
) -> Score:
    """Measure a task's metric on its data; the module should be in eval mode.

    The module or the datamodule gives the metric by ``task_metric(task)``; by default it is accuracy. Predictions and
    targets come from ``module.prediction_step(batch, task)`` if there is one, otherwise from ``module(inputs)`` on
    batches ``(inputs, targets)``. The Trainer's state is that of a validation, and its limits apply. Several processes
    share the batches if all of them read the data in the same order; torchmetrics adds up what they have seen.

    Args:
        module: The module, with a Trainer.
        data: Batches; ``limit_test_batches`` applies to them unless they are validation data.
        task: Name of the task.
        datamodule: The task's datamodule, if it may give the metric.
        strict: Whether labels for which there is no class score are refused; otherwise their samples are wrong.

    Raises:
        ValueError: If there is no sample, the metric cannot read predictions and targets, or its result is not one
            number.
    """
    meter = _Meter(module, task, find_metric(task, module, datamodule), strict)
    processes = Processes.current()
    with validating(module.trainer), processes.together():
        batches = _limited(data, module.trainer)
        if processes.size == 1 or not is_in_order(data):
            for batch in batches:
                meter.update(batch)
        else:
            meter.update_together(batches, processes)
    return meter.compute()


def check_score(module: L.LightningModule, data: Iterable | EvaluationData, task: str, datamodule: Any = None) -> None:
    """Refuse on the first batch of a task's data what :func:`score` would refuse of it."""
    meter = _Meter(module, task, find_metric(task, module, datamodule), strict=True)
    with validating(module.trainer):
        for batch in _limited(data, module.trainer):
            meter.update(batch)
            break
    # Some metrics are undefined on few samples, with a warning or an error.
    with catch_warnings(), suppress(_Undefined):
        simplefilter("ignore")
        meter.compute()


@contextmanager
def validating(trainer: L.Trainer) -> Iterator[None]:
    """Run a block in the Trainer's validating state, so hooks that augment ``if trainer.training`` leave data alone."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def _limited(data: Iterable | EvaluationData, trainer: L.Trainer) -> Iterator:
    return (data if isinstance(data, EvaluationData) else EvaluationData(data)).limited(trainer)


class _Undefined(ValueError):
    """The metric has no result."""


class _Meter:
    """Updates a metric with a module's predictions, and computes the score.

    If it is strict, it refuses labels for which predictions of class scores have no column.
    """

    def __init__(
        self, module: L.LightningModule, task: str, metric: Metric | MetricCollection, strict: bool = False
    ) -> None:
        self.module, self.task, self.strict = module, task, strict
        self.metric, self.kind = metric.to(module.device), TaskMetric.of(metric)
        self.samples = 0

    def update(self, batch: Any, counts: bool = True) -> None:
        with torch.no_grad():
            found = self._predict(move_to_device(self.module, batch))
            if not counts:
                return
            predictions, targets = _fitted(*found, self.metric)
            try:
                self.metric.update(predictions, targets)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise self._unsuited(*found, error) from error
            if self.strict and isinstance(self.metric, ClassAccuracy) and predictions.dim() == 2:
                self._check_labels(predictions, targets)
        self.samples += len(targets) if isinstance(targets, Tensor) and targets.dim() else 1

    def _check_labels(self, predictions: Tensor, targets: Tensor) -> None:
        largest, classes = int(targets.max()) if len(targets) else 0, predictions.shape[1]
        if largest >= classes:
            raise ValueError(
                f"The data that measures task {self.task!r} has a sample of label {largest}, but "
                f"{type(self.module).__name__} predicts scores of {classes} classes (labels 0 to {classes - 1}), so it "
                "can never be right. Give the module as many outputs as there are classes, or number the labels from 0."
            )

    def update_together(self, batches: Iterator, processes: Processes) -> None:
        """Take every n-th batch of n processes; all of them run as many passes, which sharded modules need.

        If there are fewer batches than processes, each process takes them all.
        """
        rounds = iter(lambda: list(islice(batches, processes.size)), [])
        for number, batches_of_round in enumerate(rounds):
            if len(batches_of_round) == processes.size:
                self.update(batches_of_round[processes.rank])
                for part in self.metric.modules() if number == 0 else ():
                    if isinstance(part, Metric):
                        part.sync_on_compute = True
            elif number == 0:
                for batch in batches_of_round:
                    self.update(batch)
            else:  # the last round
                own = processes.rank < len(batches_of_round)
                self.update(batches_of_round[processes.rank if own else 0], counts=own)

    def compute(self) -> Score:
        name = "an accuracy" if self.kind == ACCURACY else self.kind.name
        if not self.samples:
            raise ValueError(f"Task {self.task!r} has no sample to measure {name} on.")
        try:
            result = self.metric.compute()
        except Exception as error:
            raise _Undefined(f"{name} of task {self.task!r} cannot be computed: {error}") from error
        found = dict(result) if isinstance(result, dict) else {self.kind.name: result}
        first = next(iter(found), None)
        numbers = {str(key): float(value) for key, value in found.items() if _is_number(value)}
        if first is None or str(first) not in numbers:
            shape = list(found[first].shape) if first is not None and isinstance(found[first], Tensor) else result
            raise ValueError(
                f"The score of a task is one number, but {first or name} of task {self.task!r} gives {shape}. Let "
                'task_metric(task) give a metric that averages, as `average="macro"` does over classes, or a '
                "MetricCollection whose first entry is one number."
            )
        value = numbers.pop(str(first))
        return Score(value, self.kind, numbers)

    def _predict(self, batch: Any) -> tuple[Any, Any]:
        try:
            return predict_with_targets(self.module, batch, self.task)
        except ValueError as error:
            if hasattr(self.module, "prediction_step"):
                raise
            raise ValueError(f"{error} {_OTHERWISE}") from error

    def _unsuited(self, predictions: Any, targets: Any, error: Exception) -> ValueError:
        what = f"Predictions of {type(self.module).__name__} on task {self.task!r}"
        got = f"got {_describe(predictions)} and targets {_describe(targets)}"
        if isinstance(self.metric, ClassAccuracy):
            return ValueError(
                f"{what} must be {ClassAccuracy.EXPECTED}, {got}. A method prediction_step(batch, task) -> "
                "(predictions, targets) decides what they are; for a single logit it can give `logits.flatten() > 0`. "
                "A method task_metric(task) of the module or the datamodule gives another metric than accuracy, a "
                f"torchmetrics.Metric such as R2Score(). {_OTHERWISE}"
            )
        return ValueError(
            f"{what} cannot be measured by {self.kind.name}, {got}: {error} A method prediction_step(batch, task) -> "
            "(predictions, targets) decides what they are, and task_metric(task) decides what measures them."
        )


def _fitted(predictions: Any, targets: Any, metric: Metric | MetricCollection) -> tuple[Any, Any]:
    """Predictions and targets as torchmetrics expects them; class accuracy takes them as they are.

    A last dimension of size 1 that only one of them has is removed. Predictions of half precision become fp32, so that
    sums are taken in fp32. Targets of a classification that are whole numbers become integers.
    """
    if isinstance(metric, ClassAccuracy) or not (isinstance(predictions, Tensor) and isinstance(targets, Tensor)):
        return predictions, targets
    if predictions.shape == (*targets.shape, 1):
        predictions = predictions.squeeze(-1)
    elif targets.shape == (*predictions.shape, 1):
        targets = targets.squeeze(-1)
    if predictions.dtype in (torch.float16, torch.bfloat16):
        predictions = predictions.float()
    if targets.is_floating_point() and _classifies(metric) and torch.equal(targets, targets.round()):
        targets = targets.long()
    return predictions, targets


def _classifies(metric: Metric | MetricCollection) -> bool:
    kinds = [kind for part in metric.modules() for kind in type(part).__mro__]
    return any(kind.__module__.startswith("torchmetrics.classification") for kind in kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _describe(values: Any) -> str:
    if not isinstance(values, Tensor):
        return type(values).__name__
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
