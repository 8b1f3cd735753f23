"""The tasks of a stream in turn: which comes next, and after which all are measured."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar
from weakref import ref

import lightning as L

from lightning_odem.flow import operating_time
from lightning_odem.report import StreamReport
from lightning_odem.stream.naming import Weights, next_task_name, next_task_weight

Data = TypeVar("Data", bound=L.LightningDataModule)


class Roster:
    """Knows the names of the tasks that were handed out, and the utility weights of all.

    Args:
        weights: Utility weights by task name or in the order of the tasks; None takes the datamodules'.
        evaluate: After which merges all tasks are measured: ``"every"``, ``"last"``, a number n, or False.
    """

    def __init__(self, weights: Weights, evaluate: str | int | bool) -> None:
        self._weights, self._evaluate = weights, evaluate
        self._names: dict[int, tuple[ref, str]] = {}  # with the datamodules, so that their ids stay theirs
        self._last: Any = None

    def call(self, tasks: Iterable[Data]) -> Iterator[tuple[str, Data]]:
        """Yield the tasks with their names; one without ``task_name`` is called ``task_<number>``."""
        for number, (task, is_last) in enumerate(self._with_last(tasks), start=1):
            name = str(getattr(task, "task_name", f"task_{number}"))
            alive = {key: known for key, known in self._names.items() if known[0]() is not None}
            self._names = {**alive, id(task): (ref(task), name)}
            self._last = task if is_last else None
            yield name, task

    def next(self, trainer: L.Trainer, report: StreamReport) -> dict[str, Any]:
        """Name and utility weight of the task that a Trainer is about to fit.

        Raises:
            ValueError: If the name is taken, or the weight is missing or no utility.
        """
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        known, name = self._names.get(id(datamodule), (None, None))
        task = next_task_name(datamodule, report.tasks, name if known and known() is datamodule else None)
        removed = [record.task for record in report.removed]
        weight = next_task_weight(self._weights, datamodule, report.tasks, task, removed)
        operating_time([*report.weights, weight])  # refuses what is no utility
        return {"task": task, "weight": weight}

    def is_due(self, trainer: L.Trainer, number: int) -> bool:
        """Whether all tasks are measured after a merge; otherwise only its own is."""
        if self._last is not None and trainer.datamodule is self._last:  # type: ignore[attr-defined]
            return True
        every = self._evaluate
        return every == "every" or (isinstance(every, int) and every > 0 and number % every == 0)

    def _with_last(self, tasks: Iterable[Data]) -> Iterator[tuple[Data, bool]]:
        """The tasks, each with whether it is the last one; looks one ahead only where that makes a difference."""
        ahead = iter(tasks)
        if self._evaluate == "every" or self._evaluate is False:
            yield from ((task, False) for task in ahead)
        elif (task := next(ahead, None)) is not None:
            for following in ahead:
                yield task, False
                task = following
            yield task, True
