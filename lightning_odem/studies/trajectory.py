"""Accuracies along the whole path between two fine-tuned models (Table 6 of the paper)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.calibration.prediction_loss import calibration_loss
from lightning_odem.calibration.source import draw_by_index
from lightning_odem.flow.largest import first_largest
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.registry import method_name
from lightning_odem.stream.attach import attached
from lightning_odem.stream.evaluation import Score
from lightning_odem.stream.measurement import Measurement, load_task_parameters
from lightning_odem.studies.cells import Cell, run_cells
from lightning_odem.studies.finetuning import loader
from lightning_odem.studies.path import (
    SAME_ACCURACY,
    StraightLine,
    check_measured_by_accuracy,
    check_points,
    follow_path,
    store_logits_of,
)
from lightning_odem.studies.workbench import Workbench

LINE = "straight line"
"""Label of the straight line between two models, the transport alone."""


@dataclass(frozen=True)
class PairPath:
    """Measurements along one path from a model fine-tuned on one task to a model fine-tuned on another.

    Args:
        method: Name of the flow, or :data:`LINE`.
        t: Times of the points, from 0 to 1.
        loss: Loss at each point on the calibration samples of both tasks. Each task is weighted by its share.
        accuracy: Test accuracy at each point by task. The first task is that of the start.

    Example:
        >>> path = PairPath("ode", [0.0, 0.5, 1.0], [1.0] * 3, {"a": [0.9, 0.8, 0.1], "b": [0.1, 0.7, 0.9]})
        >>> path.pair, path.mean, path.best
        (('a', 'b'), [0.5, 0.75, 0.5], 1)
    """

    method: str
    t: list[float]
    loss: list[float]
    accuracy: dict[str, list[float]]

    @property
    def pair(self) -> tuple[str, str]:
        """Names of the two tasks."""
        start, end = self.accuracy
        return start, end

    @property
    def mean(self) -> list[float]:
        """Mean accuracy on the two tasks at each point."""
        return [fmean(accuracies) for accuracies in zip(*self.accuracy.values(), strict=True)]

    @property
    def best(self) -> int:
        """Index of the first point with the best mean."""
        return first_largest(self.mean, SAME_ACCURACY)


def run_trajectory(
    bench: Workbench,
    pairs: Sequence[tuple[str, str]],
    method: MergeMethod,
    directory: Path,
    *,
    points: int = 11,
    calibration_size: int = 1024,
    seed: int = 0,
    show_progress: bool = True,
) -> list[PairPath]:
    """Measure the path of a flow and the straight line between the fine-tuned models of every pair of tasks.

    A result is written as soon as its pair is done, so a study that is started again does only what is missing.

    Args:
        bench: The fine-tuned models.
        pairs: Names of the tasks where a path starts and ends.
        method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
        directory: Where the results are kept, in the subdirectory ``trajectory``.
        points: Number of evenly spaced times at which the model is evaluated, 0 and 1 included.
        calibration_size: Samples of both tasks together.
        seed: Seed of the fine-tuning and of the choice of calibration samples.
        show_progress: Show how many pairs are done and the time left.

    Returns:
        Two paths per pair: that of the flow and the straight line.

    Raises:
        TypeError: For a method that is no flow.
        ValueError: If a point lies between two steps, a pair does not consist of two tasks of the stream, or a task has
            another metric than accuracy.
    """
    check_points(method, points)
    check_pairs(pairs, bench.stream.names)
    check_measured_by_accuracy(bench)
    bench.module(seed)  # fine-tunes first: fits have their own progress display
    cells = [
        Cell(
            directory
            / "trajectory"
            / f"{bench.fingerprint(seed, (start, end), describe_method(method), points, calibration_size)}.json",
            f"{start} → {end}",
            partial(_run_pair, bench, (start, end), method, points, calibration_size, seed),
        )
        for start, end in pairs
    ]
    return [PairPath(**path) for paths in run_cells(cells, show_progress) for path in paths]


def check_pairs(pairs: Sequence[tuple[str, str]], tasks: Sequence[str]) -> None:
    """Refuse pairs that do not consist of two tasks of the stream.

    Raises:
        ValueError: If there is such a pair, or no pair. The message names the pairs and the tasks.
    """
    wrong = [list(pair) for pair in pairs if len(set(pair)) != 2 or not set(pair) <= set(tasks)]
    if wrong or not pairs:
        raise ValueError(f"Expected pairs of two tasks of {', '.join(tasks)}; got {wrong if pairs else 'none'}.")


def _run_pair(
    bench: Workbench, pair: tuple[str, str], method: MergeMethod, points: int, calibration_size: int, seed: int
) -> list[dict[str, Any]]:
    models = {name: bench.fine_tuned(seed, name) for name in pair}
    options = bench.settings.calibration
    buffer = replace(options, seed=options.seed + seed).buffer(calibration_size)
    measurement = Measurement(bench.division)
    for name in pair:
        dataset = bench.stream[name].calibration_dataset()
        samples = draw_by_index(dataset, buffer.room_for_next(), buffer.generator(), balanced=buffer.balanced)
        buffer.add(name, samples)
        measurement.given[name] = loader(bench.stream[name], "test")
    start, end = models.values()
    module, own = bench.module(seed), {name: model.own for name, model in models.items()}
    paths = []
    with attached(module, bench.trainer) as trainer:
        calibration = CalibrationSet(buffer, calibration_loss(module, options.loss), options.micro_batch_size())
        store_logits_of(start, module, task=pair[0], calibration=calibration, division=bench.division)
        for label, flow in {method_name(method): method, LINE: StraightLine(1 / (points - 1))}.items():
            rows: list[dict[str, Score]] = []
            load_task_parameters(module, end.own)
            record = follow_path(
                module,
                flow,
                start.weights,
                end.weights,
                task=pair[1],
                calibration=calibration,
                points=points,
                visit=lambda *_, rows=rows: rows.append(measurement.every_task(trainer, module, own)),
                division=bench.division,
                batch_norm=bench.settings.batch_norm,
            )
            steps = len(record.path["t"]) - 1
            accuracy = {name: [row[name].value for row in rows] for name in pair}
            t = [index / (points - 1) for index in range(points)]
            paths.append(asdict(PairPath(label, t, record.path["loss"][:: steps // (points - 1)], accuracy)))
    return paths
