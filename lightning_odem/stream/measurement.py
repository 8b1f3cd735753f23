"""Accuracies of a module with the weights and the task-specific parameters it is to be measured with."""

import math
from collections.abc import Iterable, Mapping

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.report.progress import progress
from lightning_odem.stream.evaluation import accuracy, check_classes, data_of, evaluation_data


class Measurement:
    """Measures accuracies, each task with its own data and parameters, and leaves the module as it was.

    Args:
        division: Which parameters all tasks share.

    Attributes:
        given: Data to measure accuracies on, by name of the task, where the user chose it: batches, or a datamodule
            with them.
    """

    def __init__(self, division: Division) -> None:
        self.given: dict[str, Iterable | L.LightningDataModule] = {}
        # Loaders of the user, so never part of a checkpoint.
        self._found: dict[str, Iterable | None] = {}
        self._checked: dict[str, Iterable] = {}
        self._remembered: set[str] = set()
        self._division = division

    def find_data(self, trainer: L.Trainer, task: str) -> None:
        """Find out where the accuracy of the task being fitted is measured."""
        self._found[task] = evaluation_data(trainer)
        if self._data(task) is None:
            rank_zero_warn(
                f"Task {task!r} has no test or validation data: its accuracies will be NaN. Pass val_dataloaders to "
                "fit, or give the datamodule a test_dataloader()."
            )

    def remember(self, task: str, datamodule: L.LightningDataModule) -> None:
        """Measure a task merged earlier on the data of its datamodule, unless the user chose other data."""
        if task not in self.given:
            self.given[task] = datamodule
            self._remembered.add(task)

    def forget(self, task: str) -> None:
        """Measure a task that was taken out on its own data if it comes again, unless the user chose other data."""
        if task in self._remembered:
            self.given.pop(task, None)
            self._remembered.discard(task)

    def warn_of_missing(self, tasks: Iterable[str]) -> None:
        """Say so if tasks merged in another process cannot be measured in this one."""
        missing = [task for task in tasks if task not in self._found and task not in self.given]
        if missing:
            rank_zero_warn(
                f"Accuracies of {', '.join(missing)} will be NaN: this process has not seen their data. Give it in the "
                "callback's evaluation_data, a dataloader by task name."
            )

    def check(self, module: L.LightningModule, tasks: Iterable[str]) -> None:
        """Refuse predictions that are no classes, on the first batch of each task's data that is new.

        Raises:
            ValueError: As :func:`~lightning_odem.stream.evaluation.accuracy`.
        """
        for task in tasks:
            data = self._data(task)
            if data is not None and self._checked.get(task) is not data:
                with undisturbed(module):
                    check_classes(module, data, task)
                self._checked[task] = data

    def current(self, module: L.LightningModule, task: str) -> float:
        """Accuracy on a task of the module as it is; NaN where there is no data."""
        data = self._data(task)
        if data is None:
            return math.nan
        with undisturbed(module):
            measured = accuracy(module, data, task)
        self._checked[task] = data
        return measured

    def with_weights(self, module: L.LightningModule, weights: Snapshot | None, task: str) -> float:
        """Accuracy on a task with other shared weights, which are taken out again; NaN without weights."""
        if weights is None:
            return math.nan
        is_shared = self._division.shared(module)
        before = take_snapshot(module, is_shared)
        try:
            load_snapshot(module, weights, is_shared)
            return self.current(module, task)
        finally:
            load_snapshot(module, before, is_shared)

    def every_task(
        self, trainer: L.Trainer, module: L.LightningModule, task_parameters: Mapping[str, Snapshot]
    ) -> list[float]:
        """Accuracy on every task, each with its own parameters; the last task's are left in place."""
        row = []
        *_, last = task_parameters.values()
        with progress(trainer, "evaluating") as advance:
            try:
                for index, (task, own) in enumerate(task_parameters.items()):
                    advance(index, len(task_parameters))
                    load_task_parameters(module, own)
                    row.append(self.current(module, task))
            finally:
                load_task_parameters(module, last)
        return row

    def _data(self, task: str) -> Iterable | None:
        given = self.given.get(task)
        if isinstance(given, L.LightningDataModule):
            # Its loaders from here on: what a datamodule does before it gives them is done once.
            with isolate_rng():
                given = data_of(given)
            if given is None:
                del self.given[task]
            else:
                self.given[task] = given
        return self._found.get(task) if given is None else given


def load_task_parameters(module: nn.Module, own: Snapshot) -> None:
    """Write what a task keeps for itself into a module."""
    load_snapshot(module, own, lambda name: name in own)
