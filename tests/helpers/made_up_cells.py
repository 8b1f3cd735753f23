"""Made-up cells of a comparison on three tasks, for tests of its figures."""

import numpy as np
from matplotlib.figure import Figure
from torch import nan

from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.studies.results import CellResult, Comparison

PRETRAINED = {"a": 0.4, "b": 0.5, "c": 0.6}
FINE_TUNED = {"a": 0.9, "b": 0.95, "c": 1.0}
PATH = {"t": [0.0, 0.1, 0.2, 0.25], "gamma": [1.0, 0.5, 1.0], "alignment_ratio": [0.11, 0.12, 0.24]}


def cell(
    method: str, order: int, final: list[float], weighting: str = "uniform", size: int = 64, path: dict | None = None
) -> CellResult:
    """A stream whose final accuracies on a, b and c are given; its order is a, b, c or c, b, a."""
    tasks = ["a", "b", "c"] if order == 0 else ["c", "b", "a"]
    accuracies = dict(zip("abc", final, strict=True))
    report = StreamReport(
        tasks=tasks,
        weights=[1.0] * 3 if weighting == "uniform" else [2.0, 1.0, 1.0],
        accuracy=[[0.9], [0.8, 0.7], [accuracies[task] for task in tasks]],
        pretrained=[PRETRAINED[task] for task in tasks],
        fine_tuned=[FINE_TUNED[task] for task in tasks],
        before_training=[nan] * 3,
        merges=[MergeRecord(task, 0.25, method, path=(path or {}) if k else {}) for k, task in enumerate(tasks)],
    )
    return CellResult(method, 0, order, weighting, size, report, [nan] * 3)


def two_methods() -> Comparison:
    return Comparison([
        cell("average", 0, [0.5, 0.6, 0.7]),
        cell("average", 1, [0.6, 0.7, 0.8]),
        cell("odem", 0, [0.7, 0.8, 0.9], path=PATH),
        cell("odem", 1, [0.8, 0.8, 0.8], path=PATH),
    ])  # fmt: skip


def many(methods: int) -> Comparison:
    return Comparison([cell(f"method {k}", order, [0.5, 0.6, 0.7]) for k in range(methods) for order in range(2)])


def lines(figure: Figure) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
