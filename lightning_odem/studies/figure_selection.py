"""What the figures of a comparison show: which cells, and which methods in which colours."""

import math
from collections.abc import Sequence
from typing import Any

from lightning_odem.metrics import ACCURACY
from lightning_odem.report.drawing import COLORS, MARKERS
from lightning_odem.studies.results import CellResult, Comparison

# The first six colours are those of the report. The others differ from them and from the references' black and grey.
_METHOD_COLORS = (*COLORS, "#882255", "#999933", "#7B4A12", "#332288")
_ACC = {"uniform": "ACC", "dirichlet": r"$\mathrm{ACC}_w$"}


def cells_of_largest_size(comparison: Comparison, weighting: str) -> list[CellResult]:
    """Select the cells with a weighting and the largest calibration size it was run with.

    Args:
        comparison: What to show.
        weighting: The weighting.

    Raises:
        ValueError: If the weighting does not occur.
    """
    cells = comparison.select(weighting=weighting)
    if not cells:
        found = ", ".join(comparison.weightings) or "none"
        raise ValueError(f"No cell has the weighting {weighting!r}; weightings in this comparison: {found}.")
    largest = max(cell.calibration_size for cell in cells)
    return [cell for cell in cells if cell.calibration_size == largest]


def fully_evaluated(cells: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    """Group cells by method, without methods that have a cell not evaluated after every merge."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(cell.method, []).append(cell)
    unmeasured = {cell.method for cell in cells if any(math.isnan(a) for row in cell.report.accuracy for a in row)}
    return {method: group for method, group in groups.items() if method not in unmeasured}


def references(comparison: Comparison, cell: CellResult) -> dict[str, list[float]]:
    """Scores on each task of a cell of the base model, the fine-tuned models and, if there was any, joint training."""
    report = cell.report
    found = {"pretrained": report.pretrained, "fine-tuned": report.fine_tuned}
    if joint := comparison.joint.get(cell.seed):
        found["joint training"] = [joint.get(task, math.nan) for task in report.tasks]
    return found


REFERENCE_STYLES: dict[str, dict[str, Any]] = {
    "pretrained": {"color": "0.55", "ls": "--", "lw": 1.8},
    "fine-tuned": {"color": "black", "ls": "--", "lw": 1.8},
    "joint training": {"color": "black", "ls": ":", "lw": 1.8},
}


def method_styles(comparison: Comparison, methods: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method to draw.

    They follow from the method's place in the comparison, so they are the same in all figures.

    Args:
        comparison: What to show.
        methods: Labels of the methods to draw, all by default.

    Raises:
        ValueError: If a method does not occur.
    """
    styles = {
        method: {
            "color": _METHOD_COLORS[index % len(_METHOD_COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        for index, method in enumerate(comparison.methods)
    }
    unknown = [method for method in methods or () if method not in styles]
    if unknown:
        raise ValueError(f"No cell has the method {unknown[0]!r}; methods in this comparison: {', '.join(styles)}.")
    return {method: styles[method] for method in methods or styles}


def acc_scale(comparison: Comparison) -> float:
    """Factor by which ACC is multiplied to be drawn."""
    return (comparison.metric or ACCURACY).scale


def acc_label(comparison: Comparison, weighting: str) -> str:
    """Label of the ACC axis."""
    metric = comparison.metric or ACCURACY
    return f"{_ACC[weighting]} (%)" if metric == ACCURACY else f"{_ACC[weighting]}: {metric.label}"
