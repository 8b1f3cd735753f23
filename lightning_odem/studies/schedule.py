"""Where along each merge's path the best model lies, against the operating time 1 / k (Table 7 of the paper)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torchmetrics.functional import spearman_corrcoef

from lightning_odem.calibration.prediction_loss import calibration_loss
from lightning_odem.flow.largest import first_largest
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.stream.folding import Folding
from lightning_odem.stream.measurement import Measurement, load_task_parameters
from lightning_odem.stream.merging import Calibration
from lightning_odem.studies.cells import Cell, run_cells
from lightning_odem.studies.finetuning import loader
from lightning_odem.studies.path import SAME_ACCURACY, check_points, follow_path, store_logits_of
from lightning_odem.studies.plan import StreamPlan
from lightning_odem.studies.workbench import Workbench

Follow = Literal["schedule", "best"]


@dataclass(frozen=True)
class OperatingPoint:
    r"""The models along the path of one merge, and which of them is best.

    Args:
        k: Number of the merge, 2 or more.
        task: Name of the incoming task.
        t: Times of the candidates, from 0 to 1.
        validation: Mean validation accuracy of each over the tasks seen.
        test_best: Mean test accuracy, over the tasks seen, of the candidate chosen by validation.
        test_schedule: That of the model at t = 1 / k.

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
        r""":math:`t_k^\star`, the time of the best validation accuracy; of equals the smallest."""
        return self.t[first_largest(self.validation, SAME_ACCURACY)]

    @property
    def t_schedule(self) -> float:
        """1 / k, eq. 18 for equal utility weights."""
        return 1 / self.k

    @property
    def gain(self) -> float:
        """Test accuracy gained by the chosen candidate over the scheduled model."""
        return self.test_best - self.test_schedule


@dataclass(frozen=True)
class ScheduleStudy:
    """One task order.

    Args:
        order: 0-based index of the task order.
        tasks: Names of the tasks in this order.
        follow: Which model the stream went on with, ``"schedule"`` or ``"best"``.
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

    An order's result is written when it is done, so a study that is started again does only what is missing.

    Args:
        bench: The fine-tuned models.
        plans: The streams, with equal utility weights.
        method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
        directory: Where the results are kept, under ``schedule``.
        points: Candidates at evenly spaced times, 0 and 1 included.
        follow: Model that the stream goes on with: ``"schedule"``, the one at t = 1 / k, as Algorithm 1 defines the
            merged model; or ``"best"``, the candidate chosen. The paper does not say which it took.
        show_progress: Show orders done and the time left.

    Raises:
        TypeError: For a method that is no flow.
        ValueError: If a candidate lies between two steps.
    """
    check_points(method, points)
    for seed in dict.fromkeys(plan.seed for plan in plans):
        bench.module(seed)  # fine-tunes, with a progress display of its own
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
    options = replace(bench.settings.calibration, seed=bench.settings.calibration.seed + plan.seed)
    validation, test = Measurement(bench.division), Measurement(bench.division)
    own: dict[str, Snapshot] = {}
    merges = []
    with attached(module, bench.trainer) as trainer:
        folding = Folding(
            module,
            method,
            calibration_size=plan.calibration_size,
            exclude=bench.division.exclude,
            batch_norm=bench.settings.batch_norm,
            calibration=options,
        )
        buffer = options.buffer(plan.calibration_size)
        calibration = Calibration(buffer, calibration_loss(module, options.loss), options.micro_batch_size())

        def mean_accuracy(on: Measurement) -> float:
            return fmean(on.every_task(trainer, module, own))

        for k, name in enumerate(plan.tasks, start=1):
            task, model, merged = bench.stream[name], bench.fine_tuned(plan.seed, name), folding.merged
            own[name] = model.own
            load_task_parameters(module, model.own)
            validation.given[name], test.given[name] = loader(task, "val"), loader(task, "test")
            samples = folding.draw(task.calibration_dataset())
            buffer.add(name, samples)
            if merged is None:
                store_logits_of(model, module, task=name, calibration=calibration, division=bench.division)
            else:
                candidates = _Candidates(partial(mean_accuracy, validation))
                follow_path(
                    module,
                    method,
                    merged,
                    model.weights,
                    task=name,
                    calibration=calibration,
                    points=points,
                    visit=candidates.visit,
                    division=bench.division,
                    batch_norm=bench.settings.batch_norm,
                )
            folding.fold(model.weights, name, samples=samples)
            if merged is not None:
                test_schedule = mean_accuracy(test)
                load_snapshot(module, candidates.best, is_shared)
                test_best = mean_accuracy(test)
                merges.append(OperatingPoint(k, name, candidates.t, candidates.accuracy, test_best, test_schedule))
                if follow == "best":
                    folding.merged = candidates.best
    return [asdict(merge) for merge in merges]


class _Candidates:
    """The models on a path, of which the best is kept."""

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
