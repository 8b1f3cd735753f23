"""Scores of a module on tasks, with the parameters that they are measured with."""

import math
from collections.abc import Iterable, Mapping
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
from lightning_odem.parameters.task_parameters import as_task
from lightning_odem.report.progress import progress
from lightning_odem.stream.evaluation import Score, check_score, score
from lightning_odem.stream.evaluation_data import data_of, evaluation_data


class Measurement:
    """Measures scores, each task with its own data, metric and parameters, and leaves the module as it was.

    Args:
        division: Tells which parameters all tasks share.
        enabled: Whether scores are measured. Otherwise all are NaN, and no data is looked for.

    Attributes:
        given: Data that the user chose to measure scores on, by name of the task: batches, or a datamodule.
    """

    def __init__(self, division: Division, enabled: bool = True) -> None:
        self.given: dict[str, Iterable | L.LightningDataModule] = {}
        # The user's loaders; they are never part of a checkpoint.
        self._found: dict[str, Iterable | None] = {}
        self._datamodules: dict[str, L.LightningDataModule] = {}  # those that may give a metric
        self._checked: dict[str, Iterable] = {}
        self._remembered: set[str] = set()
        self._division = division
        self._enabled = enabled

    def find_data(self, trainer: L.Trainer, task: str) -> None:
        """Find the data for the score of the task that is fitted, and the datamodule that may give its metric."""
        if not self._enabled:
            return
        self._ask(trainer.datamodule, task)  # type: ignore[attr-defined]
        self._found[task] = evaluation_data(trainer)
        if trainer.limit_test_batches == 0:
            rank_zero_warn(f"limit_test_batches is 0: all accuracies after task {task!r} will be NaN.")
        elif self._data(task) is None:
            rank_zero_warn(
                f"Task {task!r} has no test or validation data: its accuracies will be NaN. Pass val_dataloaders to "
                "fit, or give the datamodule a test_dataloader()."
            )

    def remember(self, task: str, datamodule: L.LightningDataModule) -> None:
        """Measure an earlier task on the data of its datamodule, unless the user chose other data."""
        if task not in self.given:
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
        known: Mapping[str, TaskMetric],
        task_parameters: Mapping[str, Snapshot] = {},
    ) -> None:
        """Refuse predictions that a metric cannot read, on the first batch of each task's data.

        Data is checked once. Data of tasks that keep parameters for themselves is checked each time, since the module
        may have changed so that it cannot use them any more.

        Args:
            module: The module.
            tasks: The tasks.
            known: The metric of each task so far.
            task_parameters: The parameters that each earlier task keeps for itself.

        Raises:
            ValueError: As :func:`~lightning_odem.stream.evaluation.score`, and if a task has another metric now.
        """
        for task in tasks:
            if module.trainer.limit_test_batches == 0 or (data := self._data(task)) is None:
                continue
            with undisturbed(module):
                now = TaskMetric.of(find_metric(task, module, self._datamodules.get(task)))
                if known.get(task, now) != now:
                    raise ValueError(
                        f"Task {task!r} was measured by {known[task].label} and would now be by {now.label}. Let "
                        "task_metric(task) of the module give the metric that it had: datamodules of tasks merged in "
                        "other processes are not asked unless they are in evaluation_data, or remaining() was given "
                        "them."
                    )
                own = task_parameters.get(task, {})
                if own or self._checked.get(task) is not data:
                    with as_task(module, own):
                        check_score(module, data, task, self._datamodules.get(task))
            self._checked[task] = data

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
        if module.trainer.limit_test_batches == 0 or (data := self._data(task)) is None:
            return Score(math.nan, None)
        with undisturbed(module):
            measured = score(module, data, task, self._datamodules.get(task))
        self._checked[task] = data
        return _agreed(measured, module.device)

    def _ask(self, datamodule: L.LightningDataModule | None, task: str) -> None:
        """Ask this datamodule for the metric of a task from here on."""
        self._datamodules.pop(task, None)
        if datamodule is not None and hasattr(datamodule, "task_metric"):
            self._datamodules[task] = datamodule

    def _data(self, task: str) -> Iterable | None:
        if not self._enabled:
            return None
        given = self.given.get(task)
        if isinstance(given, L.LightningDataModule):
            self._ask(given, task)
            # From here on its loaders are used, so that the datamodule is set up once.
            with isolate_rng():
                given = data_of(given)
            if given is None:
                del self.given[task]
            else:
                self.given[task] = given
        return self._found.get(task) if given is None else given


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
