"""Scores of a module on tasks, with the parameters that they are measured with."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_odem.metrics import TaskMetric, find_metric
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.parameters.task_parameters import as_task, explaining_shapes
from lightning_odem.report.progress import progress
from lightning_odem.stream.evaluation import Score, check_score, score
from lightning_odem.stream.evaluation_data import STAGES, EvaluationData, Stage, Which, data_of, evaluation_data
from lightning_odem.stream.monitor import Monitor

Given = Iterable | L.LightningDataModule | EvaluationData | Which


class Measurement:
    """Measures scores, each task with its own data, metric and parameters, and leaves the module as it was.

    Args:
        division: Which parameters all tasks share.
        enabled: Whether anything is measured; all is NaN otherwise, and no data is looked for.
        monitor: The logged value that is the score of every task, on validation data; by default each task's metric is.

    Attributes:
        given: What to measure scores on, by name of the task, where the user chose it: batches, a datamodule with them,
            or which of several loaders.
    """

    def __init__(self, division: Division, enabled: bool = True, monitor: Monitor | None = None) -> None:
        self.given: dict[str, Given] = {}
        # Loaders of the user, so never part of a checkpoint.
        self._found: dict[str, EvaluationData | None] = {}
        self._datamodules: dict[str, L.LightningDataModule] = {}  # those that may know a metric
        self._checked: dict[str, Iterable] = {}
        self._remembered: set[str] = set()
        self._division = division
        self._enabled = enabled
        self._monitor = monitor
        self._stages: tuple[Stage, ...] = STAGES if monitor is None else ("val", "test")

    def find_data(self, trainer: L.Trainer, task: str) -> None:
        """Find the data for the score of the task that is fitted, and the datamodule that may give its metric."""
        if not self._enabled:
            return
        self._ask(trainer.datamodule, task)  # type: ignore[attr-defined]
        given = self.given.get(task)
        if given is None or isinstance(given, Which):
            self._found[task] = evaluation_data(trainer, task, given, self._stages)
        data = self._data(task)
        if data is not None and data.limit(trainer) == 0:
            rank_zero_warn(
                f"limit_{data.stage}_batches is 0: scores of task {task!r} will be NaN. ContinualMergeCallback("
                "evaluate=False) measures nothing."
            )
        elif data is None:
            rank_zero_warn(
                f"Task {task!r} has no test or validation data: its accuracies will be NaN. Pass val_dataloaders to "
                "fit, or give the datamodule a test_dataloader()."
            )

    def remember(self, task: str, datamodule: L.LightningDataModule) -> None:
        """Measure an earlier task on the data of its datamodule, unless the user chose other data."""
        if self._enabled and task not in self.given:
            self.given[task] = datamodule
            self._remembered.add(task)

    def forget(self, task: str) -> None:
        """Drop the data remembered for a task that was taken out; if the task comes again, it brings its own."""
        if task in self._remembered:
            self.given.pop(task, None)
            self._remembered.discard(task)

    def warn_of_missing(self, tasks: Iterable[str]) -> None:
        """Warn if tasks merged in another process cannot be measured in this one."""
        missing = [task for task in tasks if task not in self._found and task not in self.given]
        if missing and self._enabled:
            rank_zero_warn(
                f"Accuracies of {', '.join(missing)} will be NaN: this process has not seen their data. Give it in the "
                "callback's evaluation_data, a dataloader by task name."
            )

    def check(
        self,
        module: L.LightningModule,
        tasks: Iterable[str],
        measured: Callable[[], Mapping[str, TaskMetric]],
        task_parameters: Mapping[str, Snapshot] = {},
    ) -> None:
        """Refuse predictions that a metric cannot read, on the first batch of each task's data.

        Data is checked once. Data of tasks that keep parameters for themselves is checked each time, since the module
        may have changed so that it cannot use them any more.

        Args:
            module: The module.
            tasks: The tasks.
            measured: Gives the metric of each task so far.
            task_parameters: The parameters that each earlier task keeps for itself.

        Raises:
            ValueError: As :func:`~lightning_odem.stream.evaluation.score`, and if a task has another metric now.
        """
        known = measured() if self._enabled else {}
        for task in tasks:
            data = self._data(task)
            if data is None or data.limit(module.trainer) == 0:
                continue
            with undisturbed(module):
                now = self._metric(module, task)
                if known.get(task, now) != now:
                    raise ValueError(
                        f"Task {task!r} was measured by {known[task].label} and would now be by {now.label}. Let "
                        "task_metric(task) of the module give the metric that it had: datamodules of tasks merged in "
                        "other processes are not asked unless they are in evaluation_data, or remaining() was given "
                        "them."
                    )
                own = task_parameters.get(task, {})
                if own or self._checked.get(task) is not data.batches:
                    with explaining_shapes(module, task, own), as_task(module, own):
                        if self._monitor is not None:
                            self._monitor.measure(module, data, batches=1)
                        else:
                            check_score(module, data, task, self._datamodules.get(task))
            self._checked[task] = data.batches

    def current(self, module: L.LightningModule, task: str) -> float:
        """Score of the module as it is on a task; NaN without data."""
        return self._measure(module, task).value

    def with_weights(self, module: L.LightningModule, shared: Snapshot | None, task: str) -> float:
        """Score on a task with other shared parameters; the module gets its own back. NaN if ``shared`` is None."""
        if shared is None:
            return math.nan
        is_shared = self._division.shared(module)
        before = take_snapshot(module, is_shared)
        try:
            load_snapshot(module, shared, is_shared)
            return self.current(module, task)
        finally:
            load_snapshot(module, before, is_shared)

    def every_task(
        self, trainer: L.Trainer, module: L.LightningModule, task_parameters: Mapping[str, Snapshot]
    ) -> dict[str, Score]:
        """Score on every task by name; the module has the task's own parameters meanwhile."""
        scores = {}
        with progress(trainer, "evaluating") as advance:
            for index, (task, own) in enumerate(task_parameters.items()):
                advance(index, len(task_parameters))
                with as_task(module, own):
                    scores[task] = self._measure(module, task)
        return scores

    def _measure(self, module: L.LightningModule, task: str) -> Score:
        data = self._data(task)
        if data is None or data.limit(module.trainer) == 0:
            return Score(math.nan, None)
        with undisturbed(module):
            if self._monitor is not None:
                measured = self._monitor.measure(module, data)
            else:
                unseen = self._checked.get(task) is not data.batches
                measured = score(module, data, task, self._datamodules.get(task), strict=unseen)
        self._checked[task] = data.batches
        return _agreed(measured, module.device)

    def _metric(self, module: L.LightningModule, task: str) -> TaskMetric:
        if self._monitor is not None:
            return self._monitor.metric
        return TaskMetric.of(find_metric(task, module, self._datamodules.get(task)))

    def _ask(self, datamodule: L.LightningDataModule | None, task: str) -> None:
        """Ask this datamodule for the metric of a task from here on."""
        self._datamodules.pop(task, None)
        if datamodule is not None and hasattr(datamodule, "task_metric"):
            self._datamodules[task] = datamodule

    def _data(self, task: str) -> EvaluationData | None:
        if not self._enabled:
            return None
        given = self.given.get(task)
        if isinstance(given, L.LightningDataModule):
            self._ask(given, task)
            # From here on its loaders are used, so that the datamodule is set up once.
            with isolate_rng():
                given = data_of(given, task, self._stages)
            if given is None:
                del self.given[task]
            else:
                self.given[task] = given
        if given is None or isinstance(given, Which):
            return self._found.get(task)
        return given if isinstance(given, EvaluationData) else EvaluationData(given)


def _agreed(measured: Score, device: torch.device) -> Score:
    """The first process's score in all processes, since their kernels may round differently."""
    processes = Processes.current()
    if processes.size == 1:
        return measured
    numbers = torch.tensor([measured.value, *measured.further.values()], dtype=torch.float64, device=device)
    value, *further = processes.broadcast_(numbers).tolist()
    return replace(measured, value=value, further=dict(zip(measured.further, further, strict=True)))


def load_task_parameters(module: nn.Module, own: Snapshot) -> None:
    """Write the parameters that a task keeps for itself into a module."""
    load_snapshot(module, own, lambda name: name in own)
