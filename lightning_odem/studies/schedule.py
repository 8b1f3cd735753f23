"""The best operating time of each merge along its path, to compare it with 1 / k (Table 7 of the paper)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torchmetrics.functional import spearman_corrcoef

from lightning_odem.flow.largest import first_largest
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.stream.measurement import Measurement, load_task_parameters
from lightning_odem.studies.cells import Cell, run_cells
from lightning_odem.studies.finetuning import loader
from lightning_odem.studies.path import (
    SAME_ACCURACY,
    check_measured_by_accuracy,
    check_points,
    follow_path,
)
from lightning_odem.studies.plan import StreamPlan
from lightning_odem.studies.workbench import Workbench

Follow = Literal["schedule", "best"]


@dataclass(frozen=True)
class OperatingPoint:
    r"""The candidates along the path of one merge, and the best of them.

    Args:
        k: Number of the merge, 2 or more.
        task: Name of the incoming task.
        t: Times of the candidates, from 0 to 1.
        validation: Mean validation accuracy of each candidate over the tasks seen.
        test_best: Mean test accuracy over the tasks seen of the candidate with the best validation accuracy.
        test_schedule: Mean test accuracy over the tasks seen of the model at t = 1 / k.

    Example:
        >>> point = OperatingPoint(2, "b", [0.0, 0.5, 1.0], [0.5, 0.75, 0.75], test_best=0.7, test_schedule=0.6)
        >>> point.t_best, point.t_schedule, round(point.gain, 6)
        (0.5, 0.5, 0.1)
    """

    k: int
    task: str
    t: list[float]
    validation: list[float]
    test_best: float
    test_schedule: float

    @property
    def t_best(self) -> float:
        r""":math:`t_k^\star`, the smallest time with the best validation accuracy."""
        return self.t[first_largest(self.validation, SAME_ACCURACY)]

    @property
    def t_schedule(self) -> float:
        """1 / k, the operating time of eq. 18 for equal utility weights."""
        return 1 / self.k

    @property
    def gain(self) -> float:
        """Test accuracy gained by the chosen candidate over the scheduled model."""
        return self.test_best - self.test_schedule


@dataclass(frozen=True)
class ScheduleStudy:
    """The result for one task order.

    Args:
        order: 0-based index of the task order.
        tasks: Names of the tasks in this order.
        follow: Model from which the stream continued, ``"schedule"`` or ``"best"``.
        merges: All merges but the first.
    """

    order: int
    tasks: list[str]
    follow: str
    merges: list[OperatingPoint]

    @property
    def spearman(self) -> float:
        r"""Rank correlation of :math:`1 - t_k^\star` with (k - 1) / k; NaN for one merge or if all times are equal.

        Example:
            >>> merges = [OperatingPoint(k, "", [0.0, 0.25, 0.5, 1.0], row, 0.0, 0.0)
            ...           for k, row in ((2, [0, 0, 1, 0]), (3, [0, 1, 0, 0]))]
            >>> round(ScheduleStudy(0, ["a", "b", "c"], "schedule", merges).spearman, 4)
            1.0
        """
        if len({merge.t_best for merge in self.merges}) < 2:
            return math.nan
        kept = torch.tensor([1 - merge.t_best for merge in self.merges], dtype=torch.float64)
        history = torch.tensor([(merge.k - 1) / merge.k for merge in self.merges], dtype=torch.float64)
        return spearman_corrcoef(kept, history).item()


def run_schedule(
    bench: Workbench,
    plans: Sequence[StreamPlan],
    method: MergeMethod,
    directory: Path,
    *,
    points: int = 21,
    follow: Follow = "schedule",
    show_progress: bool = True,
) -> list[ScheduleStudy]:
    """Find the best operating time of every merge of every order, on validation data.

    A result is written as soon as its order is done, so a study that is started again does only what is missing.

    Args:
        bench: The fine-tuned models.
        plans: The streams, with equal utility weights.
        method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
        directory: Where the results are kept, in the subdirectory ``schedule``.
        points: Number of candidates at evenly spaced times, 0 and 1 included.
        follow: Model from which the stream continues: ``"schedule"``, the one at t = 1 / k, as Algorithm 1 defines the
            merged model; or ``"best"``, the candidate chosen. The paper does not say which it used.
        show_progress: Show how many orders are done and the time left.

    Raises:
        TypeError: For a method that is no flow.
        ValueError: If a candidate lies between two steps, or a task has another metric than accuracy.
    """
    check_points(method, points)
    check_measured_by_accuracy(bench)
    for seed in dict.fromkeys(plan.seed for plan in plans):
        bench.module(seed)  # fine-tunes first: fits have their own progress display
    cells = []
    for plan in plans:
        settings = [describe_method(method), plan.calibration_size, points, follow]
        path = directory / "schedule" / f"{bench.fingerprint(plan.seed, plan.tasks, *settings)}.json"
        cells.append(Cell(path, f"order {plan.order}", partial(_run_order, bench, plan, method, points, follow)))
    return [
        ScheduleStudy(plan.order, list(plan.tasks), follow, [OperatingPoint(**merge) for merge in merges])
        for plan, merges in zip(plans, run_cells(cells, show_progress), strict=True)
    ]


def _run_order(
    bench: Workbench, plan: StreamPlan, method: MergeMethod, points: int, follow: Follow
) -> list[dict[str, Any]]:
    module = bench.module(plan.seed)
    is_shared = bench.division.shared(module)
    validation, test = Measurement(bench.division), Measurement(bench.division)
    own: dict[str, Snapshot] = {}
    merges = []
    with attached(module, bench.trainer) as trainer:
        stream = bench.begin(method, plan)

        def mean_accuracy(on: Measurement) -> float:
            return fmean(score.value for score in on.every_task(trainer, module, own).values())

        for k, name in enumerate(plan.tasks, start=1):
            task, model, merged = bench.stream[name], bench.fine_tuned(plan.seed, name), stream.state.merged
            own[name] = model.own
            load_task_parameters(module, model.own)
            validation.given[name], test.given[name] = loader(task, "val"), loader(task, "test")
            samples = stream.draw(task.calibration_dataset())
            if merged is not None:
                buffer = stream.buffer_with(name, samples)
                assert buffer is not None, "with samples"
                candidates = _Candidates(partial(mean_accuracy, validation))
                follow_path(
                    module,
                    method,
                    merged,
                    model.weights,
                    task=name,
                    calibration=stream.measured_on(module, buffer),
                    points=points,
                    visit=candidates.visit,
                    division=bench.division,
                    batch_norm=bench.settings.batch_norm,
                )
            stream.merge(module, model.weights, name, samples=samples)
            if merged is not None:
                test_schedule = mean_accuracy(test)
                load_snapshot(module, candidates.best, is_shared)
                test_best = mean_accuracy(test)
                merges.append(OperatingPoint(k, name, candidates.t, candidates.accuracy, test_best, test_schedule))
                if follow == "best":
                    stream.state.merged = candidates.best
    return [asdict(merge) for merge in merges]


class _Candidates:
    """Measures the models on a path and keeps the best."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        self.t: list[float] = []
        self.accuracy: list[float] = []
        self.best: Snapshot = {}

    def visit(self, t: float, take: Callable[[], Snapshot]) -> None:
        accuracy = self._measure()
        self.t.append(t)
        self.accuracy.append(accuracy)
        if first_largest(self.accuracy, SAME_ACCURACY) == len(self.accuracy) - 1:
            self.best = take()
