"""The results of a comparison as data: one cell per stream and merge method."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.parameters.files import replacing
from lightning_odem.parameters.json_text import map_values, nan_to_none, none_to_nan
from lightning_odem.report.record import StreamReport
from lightning_odem.studies.report_files import write_csv

_SETTING = ("seed", "order", "weighting", "calibration_size")
_KEY = ("method", *_SETTING)
_PER_MERGE = ("seconds_per_merge", "gradient_evaluations", "sample_gradients", "peak_memory_mb")
_CELL_COLUMNS = (*_KEY, "tasks", "weights", "acc", "bwt", *_PER_MERGE)
_ACCURACY_COLUMNS = (*_KEY, "merge", "task", "accuracy")


@dataclass(frozen=True)
class CellResult:
    """One stream merged by one method.

    Args:
        method: The user's label of the method.
        seed: Seed of fine-tuning and of the calibration samples.
        order: 0-based index of the task order. ``report.tasks`` is the order itself.
        weighting: ``"uniform"`` for equal utility weights, ``"dirichlet"`` for drawn weights. They are in
            ``report.weights``.
        calibration_size: Samples kept of all tasks together.
        report: Accuracies, weights and merges. Accuracies that were not evaluated are NaN.
        peak_memory: Bytes in use at the peak of each merge beyond those at its start; NaN if not measured.
    """

    method: str
    seed: int
    order: int
    weighting: str
    calibration_size: int
    report: StreamReport
    peak_memory: list[float]

    @property
    def setting(self) -> tuple[Any, ...]:
        """Seed, order, weighting and calibration size, which cells of other methods share."""
        return tuple(getattr(self, name) for name in _SETTING)

    def per_merge(self) -> dict[str, float]:
        """Mean costs of all merges but the first, which only adopts the incoming model; NaN for a single merge.

        Returns:
            ``seconds_per_merge``, ``gradient_evaluations`` (passes over the calibration samples), ``sample_gradients``
            (gradients of single samples) and ``peak_memory_mb`` (10^6 bytes).
        """
        merges = self.report.merges[1:]
        costs: tuple[list[float], ...] = (
            [record.merge_seconds for record in merges],
            [record.gradient_evaluations for record in merges],
            [record.sample_gradients for record in merges],
            [peak / 1e6 for peak in self.peak_memory[1:]],
        )
        return {name: fmean(values) if values else math.nan for name, values in zip(_PER_MERGE, costs, strict=True)}


@dataclass
class Comparison:
    """Merge methods on the same fine-tuned models, over task orders, utility weightings, seeds and calibration sizes.

    Args:
        cells: One per method, seed, order, weighting and calibration size.
        joint: Score of joint training on each task, by seed; empty if there was none.

    Example:
        >>> report = StreamReport(["a", "b"], [1.0, 1.0], [[0.9], [0.7, 0.8]], [0.1, 0.2], [0.9, 0.8], [math.nan] * 2)
        >>> cells = [CellResult(name, 0, 0, "uniform", 64, report, []) for name in ("average", "odem")]
        >>> comparison = Comparison(cells)
        >>> comparison.methods, comparison.calibration_sizes
        (['average', 'odem'], [64])
        >>> [cell.report.acc() for cell in comparison.select(method="odem")]
        [0.75]
    """

    cells: list[CellResult]
    joint: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Labels in order of appearance."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def weightings(self) -> list[str]:
        """Weightings that occur, uniform first."""
        return sorted({cell.weighting for cell in self.cells}, reverse=True)

    @property
    def calibration_sizes(self) -> list[int]:
        """Calibration sizes that occur, ascending."""
        return sorted({cell.calibration_size for cell in self.cells})

    @property
    def metric(self) -> TaskMetric | None:
        """The metric of all tasks; None if tasks have different metrics."""
        found = {cell.report.metric() for cell in self.cells} or {ACCURACY}
        return found.pop() if len(found) == 1 else None

    def select(self, **values: Any) -> list[CellResult]:
        """Cells with these values, as in ``select(method="odem", seed=0)``."""
        return [cell for cell in self.cells if all(getattr(cell, name) == value for name, value in values.items())]

    def save(self, directory: str | os.PathLike) -> list[Path]:
        """Write ``results.json``, ``cells.csv`` and ``accuracies.csv``.

        ``results.json`` holds everything, and :meth:`load` reads it. It is written in one step, so that a reader sees
        the old file or the new file. ``cells.csv`` has one row per cell, with ``acc`` and ``bwt`` computed with that
        cell's utility weights, and the costs of :meth:`CellResult.per_merge`. ``accuracies.csv`` has one row per cell,
        merge (counted from 1) and task merged so far. Accuracies are fractions, or scores of the task's metric. Values
        that were not measured are ``null`` or an empty field.

        Args:
            directory: Directory to write to. It is created if it does not exist.

        Returns:
            The files written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / name for name in ("results.json", "cells.csv", "accuracies.csv")]
        with replacing(files[0]) as draft:
            draft.write_text(json.dumps(map_values(self._as_dict(), nan_to_none), allow_nan=False), encoding="utf-8")
        write_csv(files[1], _CELL_COLUMNS, (_cell_row(cell) for cell in self.cells))
        write_csv(files[2], _ACCURACY_COLUMNS, (row for cell in self.cells for row in _accuracy_rows(cell)))
        return files

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Comparison":
        """Read the ``results.json`` of a directory.

        Raises:
            ValueError: If the file is not a comparison; the message names the file and what is wrong.
        """
        path = Path(directory) / "results.json"
        try:
            data = map_values(json.loads(path.read_text(encoding="utf-8")), none_to_nan)
            reports = [StreamReport.from_dict(cell["report"]) for cell in data["cells"]]
            cells = [CellResult(**{**cell, "report": rep}) for cell, rep in zip(data["cells"], reports, strict=True)]
            joint: dict[int, dict[str, float]] = {}
            for entry in data["joint"]:
                joint.setdefault(entry["seed"], {})[entry["task"]] = entry["accuracy"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a comparison: {error!r}. Choose the directory of a comparison. "
                "A damaged cell is merged again if its directory is removed."
            ) from error
        return cls(cells, joint)

    def _as_dict(self) -> dict[str, Any]:
        joint = [
            {"seed": seed, "task": task, "accuracy": accuracy}
            for seed, accuracies in self.joint.items()
            for task, accuracy in accuracies.items()
        ]
        return {"cells": [{**vars(cell), "report": cell.report.as_dict()} for cell in self.cells], "joint": joint}


def one_per_stream(cells: Iterable[CellResult]) -> list[CellResult]:
    """Select the first cell of each setting, for values that do not depend on the method."""
    streams: dict[tuple, CellResult] = {}
    for cell in cells:
        streams.setdefault(cell.setting, cell)
    return list(streams.values())


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation. The mean of no value and the deviation of fewer than two values are NaN.

    Example:
        >>> mean_and_std([1.0, 3.0]), mean_and_std([1.0])
        ((2.0, 1.4142135623730951), (1.0, nan))
    """
    mean = fmean(values) if values else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def paired_difference(cells: Sequence[CellResult], method: str, baseline: str) -> tuple[float, float]:
    """Mean difference in final ACC_w between two methods on the same streams.

    Pairing removes the variance that methods share on a stream, because of its order, seed and weights.

    Args:
        cells: Cells of both methods. A cell whose setting the other method does not have is ignored.
        method: Label of the method.
        baseline: Label of the method it is compared with.

    Returns:
        Mean of the differences, and its standard error, which is NaN for fewer than two pairs.
    """
    baseline_acc = {cell.setting: cell.report.acc() for cell in cells if cell.method == baseline}
    pairs = [cell for cell in cells if cell.method == method and cell.setting in baseline_acc]
    mean, std = mean_and_std([cell.report.acc() - baseline_acc[cell.setting] for cell in pairs])
    return mean, std / math.sqrt(max(len(pairs), 1))


def _cell_row(cell: CellResult) -> dict[str, Any]:
    report = cell.report
    return {
        **{name: getattr(cell, name) for name in _KEY},
        "tasks": " ".join(report.tasks),
        "weights": " ".join(map(repr, report.weights)),
        "acc": report.acc(),
        "bwt": report.bwt(),
        **cell.per_merge(),
    }


def _accuracy_rows(cell: CellResult) -> Iterable[dict[str, Any]]:
    key = {name: getattr(cell, name) for name in _KEY}
    for merge, accuracies in enumerate(cell.report.accuracy, start=1):
        for task, accuracy in zip(cell.report.tasks, accuracies, strict=False):
            yield {**key, "merge": merge, "task": task, "accuracy": accuracy}
