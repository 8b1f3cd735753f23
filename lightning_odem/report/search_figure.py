"""The figure of a merge that searched for its operating point."""

import numpy as np
from matplotlib.figure import Figure

from lightning_odem.report.drawing import BLUE, GREEN, ORANGE, RED, new_figure, open_frame, shown
from lightning_odem.report.merge_record import MergeRecord


def plot_search(record: MergeRecord) -> Figure:
    """One merge: the calibration loss over the scale of the path, with held-out losses of the gradient flow beside it.

    Horizontal lines are the losses of the merged model before and after, of the incoming model and of the running
    average.

    Args:
        record: A merge that searched: ``record.path`` has ``scale``, see :class:`~lightning_odem.flow.Trajectory`.

    Raises:
        ValueError: If the merge did not search for an operating point.

    Example:
        >>> path = {"t": [0.0, 0.5], "loss": [1.0, 0.7], "scale": [0.5, 0.7, 1.0], "scale_loss": [0.8, 0.75, 0.9]}
        >>> path |= {"scale_taken": [0.68], "average_loss": [0.85], "descent_loss": [0.9, 0.8], "descent_taken": [1.0]}
        >>> figure = plot_search(MergeRecord("svhn", t=0.5, method="ode", path=path, loss_incoming=1.5))
        >>> [axes.get_xlabel().partition(" (")[0] for axes in figure.axes]
        ['scale of the path', 'pieces of gradient flow']
    """
    path = record.path
    if not path.get("scale"):
        raise ValueError(f"The merge of task {record.task!r} ({record.method}) did not search for an operating point.")
    figure = new_figure(8.4, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    order = np.argsort(path["scale"])
    left.plot(np.array(path["scale"])[order], np.array(path["scale_loss"])[order], "o-", color=BLUE, label="tried")
    lines = {
        "merged model before": (path["loss"][0], "0.4", ":"),
        "merged model after": (path["loss"][-1], BLUE, "-"),
        "incoming model": (record.loss_incoming, ORANGE, "--"),
        "running average": (path["average_loss"][0], RED, "-."),
    }
    taken_scale = path["scale_taken"][0]
    for label, (loss, color, style) in lines.items():
        if label == "running average" and not taken_scale:
            label = "running average, taken"
        left.axhline(loss, color=color, ls=style, lw=1.2, label=f"{label}: {loss:.4g}")
    if taken_scale:
        left.axvline(taken_scale, color=GREEN, lw=1.2, label=f"scale taken: {taken_scale:.3g}")
        left.plot([taken_scale], [path["loss"][-1]], "o", color=RED, ms=11, mfc="none", label="chosen point")
    left.set_xscale("log", base=2)
    left.set_xticks(np.array(path["scale"])[order], [f"{scale:.2g}" for scale in np.array(path["scale"])[order]])
    left.set_xlabel("scale of the path (1: as far as the tasks' models in the mean)")
    left.set_ylabel("calibration loss")
    left.set_title(f"merging {shown(record.task)}", loc="left", fontsize="medium")
    pieces = path.get("descent_loss", [])
    right.plot(range(len(pieces)), pieces, "s-", color=GREEN)
    if pieces:
        taken = int(path["descent_taken"][0])
        right.plot([taken], [pieces[taken]], "o", color=RED, ms=11, mfc="none")
        right.set_xticks(range(len(pieces)))
    right.set_xlabel("pieces of gradient flow (epochs)")
    right.set_ylabel("loss on held-out samples")
    right.set_title("taken: circle" if pieces else "no descent", loc="left", fontsize="medium")
    for axes in (left, right):
        open_frame(axes)
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return figure
