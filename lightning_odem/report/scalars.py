"""The numbers of the last merge under the names that loggers show."""

import math

from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.report.record import StreamReport


def latest_scalars(report: StreamReport) -> dict[str, float]:
    """Scalars of the last merge, all under ``merge/``. Undefined ones (BWT of the first task) are left out.

    Accuracies and their summaries are fractions. Scores of tasks with another metric have its name in place of ``acc``.
    Further values besides the score are named ``merge/<name>/<task>``. Times are seconds, evaluations are passes over
    the calibration set. ``merge/scale`` is the scale that a search has chosen, or 0 for the running average.

    Example:
        >>> from lightning_odem.report import MergeRecord
        >>> report = StreamReport(["a"], [1.0], [[0.5]], [0.1], [0.5], [0.1], [MergeRecord("a", 1.0, "ode")])
        >>> {name: value for name, value in latest_scalars(report).items() if "acc" in name}
        {'merge/acc': 0.5, 'merge/acc/a': 0.5, 'merge/fine_tuned_acc': 0.5}
    """
    record, task = report.merges[-1], report.tasks[-1]
    shared = report.metric()
    latest = {name: values[-1] for name, values in report.summaries().items()}
    acc = latest.pop("acc")
    scalars = {
        **({_key(shared): acc} if shared else {}),
        **latest,
        **{
            f"{_key(report.metric_of(task))}/{task}": value
            for task, value in zip(report.tasks, report.accuracy[-1], strict=True)
        },
        **{f"{name}/{task}": value for task, found in record.further.items() for name, value in found.items()},
        f"fine_tuned_{_key(report.metric_of(task))}": report.fine_tuned[-1],
        "t": record.t,
        "loss_before": record.loss_before,
        "loss_after": record.loss_after,
        "loss_incoming": record.loss_incoming,
        "barrier": record.barrier,
        "envelope_excess": record.envelope_excess,
        "seconds": record.merge_seconds,
        "evaluation_seconds": record.evaluation_seconds,
        "gradient_seconds": record.gradient_seconds,
        "gradient_evaluations": float(record.gradient_evaluations),
        "sample_gradients": float(record.sample_gradients),
    }
    if taken := record.path.get("scale_taken"):
        scalars["scale"] = taken[0]
    for name in ("gamma", "alignment_ratio"):
        values = record.path.get(name, [])
        if values:
            scalars |= {f"{name}_mean": math.fsum(values) / len(values), f"{name}_min": min(values)}
            scalars[f"{name}_max"] = max(values)
    return {f"merge/{name}": float(value) for name, value in scalars.items() if math.isfinite(value)}


def _key(metric: TaskMetric) -> str:
    return "acc" if metric == ACCURACY else metric.name
