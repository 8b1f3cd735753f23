"""What is known about a stream after each merge, as plain data."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, float64, tensor

from lightning_odem.metrics import (
    ACCURACY,
    TaskMetric,
    backward_transfer,
    forgetting,
    forward_transfer,
    weighted_accuracy,
)
from lightning_odem.parameters.files import NotRegularError, read_regular, replacing
from lightning_odem.parameters.json_text import json_lines, map_values, nan_to_none, none_to_nan
from lightning_odem.report.lines import Line, lines, record_line, score_line
from lightning_odem.report.merge_record import MergeRecord, RemovalRecord
from lightning_odem.report.summaries import Summaries

Lines = tuple[Line, ...]
_COUNTED = 20  # merges with their samples per task, or a stream of K tasks has K^2 / 2 such numbers
_LISTS = ("tasks", "weights", "pretrained", "fine_tuned", "before_training")


@dataclass
class StreamReport:
    """Everything measured on a stream so far; ``report.json`` is this object.

    Accuracies are fractions in [0, 1]. If a task has brought another metric, they are the scores of that metric. A
    value that was not or could not be measured is NaN (``null`` in JSON).

    Args:
        tasks: Names in the order they were merged.
        weights: Utility weight of each task.
        accuracy: Row k holds the accuracy of the model after merge k on tasks 1..k (ragged, row k has k entries).
        pretrained: Accuracy of the base model on each task.
        fine_tuned: Accuracy of each incoming model on its own task.
        before_training: Accuracy of the merged model on each task before that task was trained.
        merges: One record per merge. Only the last 20 tell the samples per task. After a removal, the last record names
            the checkpoint of the model without the task.
        removed: One record per task that was taken out again. Nothing else of the task is left in the report. Nothing
            is measured at a removal, so the last row of ``accuracy`` belongs to the model before it, if that row's task
            is in ``measured_with``.
        metrics: The metrics of tasks that are not measured by accuracy, by task.
    """

    tasks: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    pretrained: list[float] = field(default_factory=list)
    fine_tuned: list[float] = field(default_factory=list)
    before_training: list[float] = field(default_factory=list)
    merges: list[MergeRecord] = field(default_factory=list)
    removed: list[RemovalRecord] = field(default_factory=list)
    metrics: dict[str, TaskMetric] = field(default_factory=dict)

    # Kept from earlier merges, so that one more costs its own numbers alone.
    _known = Summaries()
    _written = Lines(), Lines()

    def with_merge(
        self,
        record: MergeRecord,
        *,
        weight: float,
        accuracy: list[float],
        metrics: Mapping[str, TaskMetric] = {},
        **measured: float,
    ) -> "StreamReport":
        """Return a report with one more merge; this one stays as it is.

        Args:
            record: The merge.
            weight: Utility weight of its task.
            accuracy: Accuracy on every task, with this task last.
            metrics: The metrics of tasks.
            **measured: ``pretrained``, ``fine_tuned`` and ``before_training`` of the task.
        """
        added = {"tasks": record.task, "weights": weight, "accuracy": accuracy, "merges": record, **measured}
        others = {task: metric for task, metric in {**self.metrics, **metrics}.items() if metric != ACCURACY}
        report = replace(self, **{name: [*getattr(self, name), value] for name, value in added.items()}, metrics=others)
        report._written = self._lines()
        for older in report.merges[:-_COUNTED][-1:]:
            report.merges[-_COUNTED - 1] = replace(older, calibration={})
        if _but(others, record.task) == self.metrics:
            report._known = self._summarized()
        return report

    def without(self, task: str) -> "StreamReport":
        """Return a report without a task's row and column but with a record of it; this one stays as it is."""
        gone = self.tasks.index(task)
        names = [entry.name for entry in fields(self) if entry.name not in ("removed", "metrics")]
        left: dict[str, list] = {name: _without(getattr(self, name), gone) for name in names}
        left["accuracy"] = [_without(row, gone) for row in left["accuracy"]]
        left["merges"] = [replace(record, further=_but(record.further, task)) for record in left["merges"]]
        # Names mean the tasks as they are now: a task that comes again is measured again.
        before = [
            replace(record, measured_with=[name for name in record.measured_with if name != task])
            for record in self.removed
        ]
        note = RemovalRecord(task, self.weights[gone], self.tasks[gone + 1 :])
        return StreamReport(**left, removed=[*before, note], metrics=_but(self.metrics, task))

    def keeping_checkpoints(self, count: int) -> "StreamReport":
        """Return a report that names the checkpoints of the last merges only; this one stays as it is."""
        older = [replace(record, checkpoint=None) if record.checkpoint else record for record in self.merges[:-count]]
        report = replace(self, merges=[*older, *self.merges[-count:]])
        report._known, report._written = self._known, self._written
        return report

    def metric_of(self, task: str) -> TaskMetric:
        """The metric of a task."""
        return self.metrics.get(task, ACCURACY)

    def measured(self) -> dict[str, TaskMetric]:
        """The metric of each task that has a score."""
        return {
            task: self.metric_of(task)
            for index, task in enumerate(self.tasks)
            if not all(math.isnan(row[index]) for row in self.accuracy[index:])
        }

    @property
    def has_scores(self) -> bool:
        """Whether any task was measured after a merge."""
        return any(first < size for size, first in enumerate(self._summarized().unmeasured, start=1))

    def metric(self, size: int | None = None) -> TaskMetric | None:
        """The common metric of the first tasks, or of all; None if they differ, and means over them are NaN."""
        if not self.metrics:
            return ACCURACY
        found = {self.metric_of(task) for task in self.tasks[:size]}
        return found.pop() if len(found) == 1 else None if found else ACCURACY

    def matrix(self) -> Tensor:
        """Accuracy matrix a_{k,i} of shape [K, K], fp64, NaN above the diagonal."""
        size = len(self.accuracy)
        rows = [row + [math.nan] * (size - len(row)) for row in self.accuracy]
        return tensor(rows, dtype=float64).view(size, size)

    def weighted_accuracy(self, accuracies: list[float]) -> float:
        """Weighted mean of scores on the first tasks of the stream; NaN if all these tasks have weight 0."""
        return self._summarize(lambda values, weights, _: weighted_accuracy(values, weights), accuracies)

    def acc(self, merge: int = -1) -> float:
        """ACC_w after a merge (eq. 2; 0-based index, the last one by default)."""
        return self.weighted_accuracy(self.accuracy[merge])

    def bwt(self, merge: int = -1) -> float:
        """BWT_w after a merge (eq. 3); NaN after the first."""
        return self._summarize(backward_transfer, self._rows(merge))

    def forgetting(self, merge: int = -1) -> float:
        """Weighted forgetting after a merge (Chaudhry et al., 2018); NaN after the first."""
        return self._summarize(forgetting, self._rows(merge))

    def fwt(self, merge: int = -1) -> float:
        """Weighted forward transfer after a merge (Lopez-Paz & Ranzato, 2017, base model as baseline)."""
        size = len(self.accuracy[merge])
        return self._summarize(forward_transfer, self.before_training[:size], self.pretrained[:size])

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, with ACC_w, BWT_w, forgetting and forward transfer after every merge added."""
        return {
            **{name: list(getattr(self, name)) for name in _LISTS[:2]},
            "accuracy": [list(row) for row in self.accuracy],
            **{name: list(getattr(self, name)) for name in _LISTS[2:]},
            "merges": [record.as_dict() for record in self.merges],
            **self._notes(),
            **self.summaries(),
        }

    def stored(self) -> dict[str, Any]:
        """:meth:`as_dict` without what can be computed from the rest, has its default value, or was not measured.

        So a stored report of a long stream grows by as much as was measured. Numbers are JSON text, and that of a
        merge is made once. :meth:`from_dict` reads it too.
        """
        merges, scores = self._lines()
        return {
            "tasks": list(self.tasks),
            **{name: json.dumps(getattr(self, name)) for name in _LISTS[1:]},
            "accuracy": [line.stored for line in scores],
            "unmeasured": list(self._summarized().unmeasured),
            "merges": [line.stored for line in merges],
            **self._notes(),
        }

    def summaries(self) -> dict[str, list[float]]:
        """``acc``, ``bwt``, ``forgetting`` and ``fwt`` after every merge, see the methods of these names."""
        found = self._summarized()
        return {name: list(getattr(found, name)) for name in ("acc", "bwt", "forgetting", "fwt")}

    def _summarized(self) -> Summaries:
        found = self._known
        kinds = [self.metric_of(task) for task in self.tasks]
        alike = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
        sign = 1.0 if not kinds or kinds[0].higher_is_better else -1.0
        for size in range(len(found.acc) + 1, len(self.accuracy) + 1):
            scores = (values[:size] for values in (self.weights, self.before_training, self.pretrained))
            found = found.with_merge(self.accuracy[size - 1], *scores, sign=sign, alike=size <= alike)
        return found

    def _lines(self) -> tuple[Lines, Lines]:
        """The merges, and the scores after them."""
        merges, scores = self._written
        return lines(self.merges, merges, record_line), lines(self.accuracy, scores, score_line)

    def _notes(self) -> dict[str, Any]:
        return {
            "removed": [asdict(record) for record in self.removed],
            "metrics": {task: asdict(metric) for task, metric in self.metrics.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "StreamReport":
        """Rebuild a report from :meth:`as_dict`, :meth:`stored` or the parsed ``report.json``."""
        data = {"removed": [], "metrics": {}, **data}  # older reports lack these
        values = {entry.name: data[entry.name] for entry in fields(cls)}
        values |= {name: _read(values[name]) for name in _LISTS[1:]}
        values |= {name: list(map(_read, values[name])) for name in ("accuracy", "merges")}
        if "unmeasured" in data:
            rows = zip(data["unmeasured"], values["accuracy"], strict=True)
            values["accuracy"] = [[math.nan] * first + row for first, row in rows]
        values["merges"] = [MergeRecord(**record) for record in values["merges"]]
        values["removed"] = [RemovalRecord(**record) for record in values["removed"]]
        values["metrics"] = {task: TaskMetric(**metric) for task, metric in values["metrics"].items()}
        return cls(**values)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the report as JSON, in one step: a reader sees the old file or the new one, never half of it.

        A row of ``accuracy`` is empty if nothing was measured after its merge.
        """
        path, (merges, scores) = Path(path), self._lines()
        lists = {name: map_values(getattr(self, name), nan_to_none) for name in _LISTS}
        data = {
            **{name: lists[name] for name in _LISTS[:2]},
            "accuracy": [line.public for line in scores],
            **{name: lists[name] for name in _LISTS[2:]},
            "merges": [line.public for line in merges],
            **map_values({**self._notes(), **self.summaries()}, nan_to_none),
        }
        text = json_lines(data, depth=2)
        with replacing(path) as draft:
            draft.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "StreamReport":
        """Read a ``report.json``.

        Raises:
            ValueError: If the file is not a report; the message names the file and what is wrong.
        """
        try:
            report = cls.from_dict(map_values(json.loads(read_regular(path)), none_to_nan))
            report.accuracy = [row or [math.nan] * size for size, row in enumerate(report.accuracy, start=1)]
            lengths = [len(row) for row in report.accuracy]
        except (NotRegularError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a merge report: {error!r}.") from error
        if lengths != list(range(1, len(report.tasks) + 1)):
            raise ValueError(f"{path} is damaged: {len(report.tasks)} tasks, but accuracy rows of lengths {lengths}.")
        return report

    def _rows(self, merge: int) -> list[list[float]]:
        """The accuracy matrix up to a merge."""
        size = len(self.accuracy[merge])
        return [row + [math.nan] * (size - len(row)) for row in self.accuracy[:size]]

    def _summarize(self, metric: Callable[..., Tensor], *accuracies: list) -> float:
        weights = tensor(self.weights[: len(accuracies[0])], dtype=float64)
        # The metrics refuse such weights, but a stream may start with tasks of weight 0.
        kind = self.metric(len(weights))
        if not weights.any() or kind is None:
            return math.nan
        scores = (tensor(values, dtype=float64) for values in accuracies)
        return metric(*scores, weights, kind.higher_is_better).item()


def _read(value: Any) -> Any:
    """What a text stands for; states of earlier versions have that itself."""
    return json.loads(value) if isinstance(value, str) else value


def _but(values: dict[str, Any], task: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != task}


def _without(values: list, index: int) -> list:
    return values[:index] + values[index + 1 :]
