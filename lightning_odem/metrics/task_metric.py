"""What the score of a task is: its name, its unit, and whether a higher score is better."""

import math
from dataclasses import dataclass
from typing import Any

from torchmetrics import Metric, MetricCollection

from lightning_odem.metrics.class_accuracy import ClassAccuracy


@dataclass(frozen=True)
class TaskMetric:
    """What is needed to read the metric of a task; accuracy by default.

    Args:
        name: Name of the metric.
        unit: ``"%"`` for fractions that are shown in percent, empty for numbers that are shown as they are.
        higher_is_better: Whether a larger score is the better one.

    Example:
        >>> from torchmetrics.regression import MeanSquaredError
        >>> error = TaskMetric.of(MeanSquaredError())
        >>> error
        TaskMetric(name='MeanSquaredError', unit='', higher_is_better=False)
        >>> error.text(0.12345), TaskMetric().text(0.12345), TaskMetric().label
        ('0.123', '12.3', 'accuracy (%)')
    """

    name: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True

    @classmethod
    def of(cls, metric: Metric | MetricCollection) -> "TaskMetric":
        """Read it from a metric, or from the first entry of a collection.

        A metric is a fraction if the bounds it gives for its plots are 0 and 1. If it does not say which way is better,
        higher is better.
        """
        if isinstance(metric, MetricCollection):
            name, metric = next(iter(metric.items(keep_base=False, copy_state=False)))
        elif isinstance(metric, ClassAccuracy):
            return cls()
        else:
            name = type(metric).__name__
        is_fraction = (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0)
        return cls(str(name), "%" if is_fraction else "", metric.higher_is_better is not False)

    @property
    def label(self) -> str:
        """Name with the unit, and the direction if lower is better."""
        remarks = [self.unit] * bool(self.unit) + ["lower is better"] * (not self.higher_is_better)
        return f"{self.name} ({', '.join(remarks)})" if remarks else self.name

    @property
    def scale(self) -> float:
        """The factor by which scores are multiplied for display."""
        return 100.0 if self.unit == "%" else 1.0

    def text(self, score: float, sign: str = "", digits: int = 0) -> str:
        """Format a score without its unit: one decimal in percent, else about three digits; a dash for NaN.

        Args:
            score: The score, or a difference of two.
            sign: ``"+"`` also shows the sign of positive scores.
            digits: Number of additional digits.
        """
        if math.isnan(score):
            return "—"
        # Adding 0.0 turns a (rounded) -0.0 into 0.0.
        if self.unit == "%":
            return format(round(100 * score, 1 + digits) + 0.0, f"{sign}.{1 + digits}f")
        score, size = score + 0.0, abs(score)
        if size >= 1e6 or 0 < size < 0.01:
            return format(score, f"{sign}.{3 + digits}g")
        decimals = max(3 - max(math.floor(math.log10(size)), 0), 0) if size else 3
        return format(score, f"{sign}.{decimals + digits}f")


ACCURACY = TaskMetric()


def find_metric(task: str, *owners: Any) -> Metric | MetricCollection:
    """The metric of a task: from the first of the owners whose ``task_metric(task)`` gives one, else class accuracy.

    It has no state yet. It computes from what this process has seen.

    Args:
        task: Name of the task.
        owners: Module and datamodule, or None.

    Raises:
        ValueError: If an owner gives something that is not a metric.
    """
    kinds = (Metric, MetricCollection)
    for owner in owners:
        metric = getattr(owner, "task_metric", None)
        if callable(metric) and not isinstance(metric, kinds):
            metric = metric(task)
        if metric is None:
            continue
        if not isinstance(metric, kinds) or (isinstance(metric, MetricCollection) and not metric):
            raise ValueError(
                f"task_metric({task!r}) of {type(owner).__name__} gives a torchmetrics.Metric, or a MetricCollection "
                f"whose first entry is the score, or None for the default; got {metric!r}."
            )
        # It may be the module's own metric, which is in use elsewhere.
        metric = metric.clone()
        metric.reset()
        break
    else:
        metric = ClassAccuracy()
    for part in metric.modules():
        if isinstance(part, Metric):
            part.sync_on_compute = False
    return metric
