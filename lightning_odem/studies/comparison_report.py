"""A comparison as files in a directory: data, tables and figures."""

import os
from pathlib import Path

from lightning_odem.studies.accuracy_figures import accuracy_over_tasks, cost, sizes
from lightning_odem.studies.figure_selection import cells_of_largest_size, fully_evaluated
from lightning_odem.studies.path_histogram import PATH_LABELS, path_histogram, recorded_paths
from lightning_odem.studies.radar import radar
from lightning_odem.studies.results import Comparison
from lightning_odem.studies.tables import markdown_comparison, render_comparison, render_sizes


def save(comparison: Comparison, directory: str | os.PathLike) -> list[Path]:
    """Write data, tables and figures; files of the same names are replaced.

    The files are those of :meth:`~lightning_odem.studies.Comparison.save`, ``comparison.txt`` and ``comparison.md``,
    and the figures there is data for: ``radar.png`` (from three tasks), ``accuracy_over_tasks.png``, ``cost.png`` (if a
    method takes gradients) and ``sizes.png`` (from two calibration sizes), each also as ``..._w.png`` for drawn utility
    weights; ``path_gamma.png`` and ``path_alignment_ratio.png``. If tasks have different metrics, only the last two are
    drawn.

    Args:
        comparison: What to write.
        directory: Directory to write to. It is created if it does not exist.

    Returns:
        The files written.
    """
    directory = Path(directory)
    written = [*comparison.save(directory), directory / "comparison.txt", directory / "comparison.md"]
    several = len(comparison.calibration_sizes) > 1
    text = render_comparison(comparison, width=140) + (f"\n{render_sizes(comparison, width=140)}" if several else "")
    written[-2].write_text(text, encoding="utf-8")
    written[-1].write_text(markdown_comparison(comparison), encoding="utf-8")
    figures = {}
    for weighting in comparison.weightings:
        suffix = "" if weighting == "uniform" else "_w"
        cells = cells_of_largest_size(comparison, weighting)
        if comparison.metric is None:
            continue
        if len(cells[0].report.tasks) > 2:
            figures[f"radar{suffix}"] = radar(comparison, weighting=weighting)
        if fully_evaluated(cells):
            figures[f"accuracy_over_tasks{suffix}"] = accuracy_over_tasks(comparison, weighting=weighting)
        if any(cell.per_merge()["sample_gradients"] > 0 for cell in cells):
            figures[f"cost{suffix}"] = cost(comparison, weighting=weighting)
        if several:
            figures[f"sizes{suffix}"] = sizes(comparison, weighting=weighting)
    for name in PATH_LABELS:
        if recorded_paths(comparison, name):
            figures[f"path_{name}"] = path_histogram(comparison, name)
    for name, figure in figures.items():
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1])
    return written
