"""Why a merge ended where it did, in words."""

import math
from collections.abc import Iterator

from lightning_odem.report.merge_record import MergeRecord
from lightning_odem.report.record import StreamReport


def why_there(report: StreamReport, merge: int) -> str:
    """Say what decided where a merged model lies between the models it was merged from.

    Args:
        report: A report.
        merge: 0-based index of the merge.

    Example:
        >>> path = {"t": [0.0, 0.5], "loss": [1.0, 0.7], "scale": [0.5, 0.7, 1.0], "scale_loss": [0.8, 0.75, 0.9]}
        >>> path |= {"scale_taken": [0.68], "average_loss": [0.85]}
        >>> merges = [MergeRecord("mnist", 1.0, "ode"), MergeRecord("svhn", 0.5, "ode", path)]
        >>> report = StreamReport(["mnist", "svhn"], [1.0, 1.0], merges=merges)
        >>> why_there(report, 1).partition(":")[0]
        'The calibration loss is lowest at scale 0.68 of the path'
    """
    return " ".join(_reasons(report.merges[merge], report.weights[: merge + 1]))


def _reasons(record: MergeRecord, weights: list[float]) -> Iterator[str]:
    path = record.path
    if path.get("scale_taken"):
        yield _search(path)
    elif path.get("held_out_t"):
        times = path["held_out_t"]
        yield (
            f"The loss on held-out samples is lowest at t = {record.t:.3g}: {min(path['held_out_loss']):.4g}, of "
            f"{len(times)} times tried from {min(times):.3g} to {max(times):.3g}."
        )
    elif len(weights) == 1:
        yield "It is the first task, so its own model is the merged one."
    elif record.t == 0.0:
        yield "t is 0, so the task changes nothing."
    elif math.isclose(record.t, weights[-1] / (sum(weights) or 1.0), rel_tol=1e-6):
        yield f"t = {record.t:.3g} is the task's share of the utility weights so far."
    else:
        yield f"t = {record.t:.3g} is not the task's share of the utility weights: the method {record.method} set it."
    if path.get("descent_loss"):
        yield _descent(path["descent_loss"], int(path["descent_taken"][0]))
    if taken_back := path.get("rejected_t"):
        yield f"Steps taken back on the way because the loss rose: {len(taken_back)}."


def _search(path: dict[str, list[float]]) -> str:
    lowest = min((loss for loss in path["scale_loss"] if not math.isnan(loss)), default=math.nan)
    tried, average = len(path["scale"]), path["average_loss"][0]
    if not path["scale_taken"][0]:
        return (
            f"The running average is taken: its calibration loss is {average:.4g}, the lowest of {tried} scales tried "
            f"on the path {lowest:.4g}."
        )
    return (
        f"The calibration loss is lowest at scale {path['scale_taken'][0]:.3g} of the path: of {tried} scales tried "
        f"the lowest loss is {lowest:.4g}, that of the running average {average:.4g}."
    )


def _descent(losses: list[float], taken: int) -> str:
    kept = f"Gradient flow from there: {taken} of {len(losses) - 1} pieces kept"
    change = f"which took the loss on held-out samples from {losses[0]:.4g} to {losses[taken]:.4g}"
    back = f"the next one took it to {losses[-1]:.4g}, no better than by chance"
    if taken == len(losses) - 1:
        return f"{kept}, {change}."
    if taken:
        return f"{kept}, {change}; {back}."
    first = f"the first took the loss on held-out samples from {losses[0]:.4g} to {losses[1]:.4g}"
    return f"{kept}: {first}, no better than by chance."
