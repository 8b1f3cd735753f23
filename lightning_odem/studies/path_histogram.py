"""Histograms of what is recorded along the paths of a comparison's merges."""

import math

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lightning_odem.report.drawing import new_figure, shown
from lightning_odem.studies.results import Comparison

PATH_LABELS = {
    "gamma": r"damping factor $\gamma$ (1: undamped)",
    "alignment_ratio": r"alignment ratio $\Vert P_g u\Vert / \Vert u\Vert$",
}
"""Labels of the quantities that can be drawn."""


def path_histogram(comparison: Comparison, name: str) -> Figure:
    """Draw how often a quantity of the path had which value at which time (Fig. 5, 6 of the paper).

    All steps of all cells are counted, with one panel per method. Each step counts once, at the middle of its time.
    The colour is logarithmic, and empty bins stay blank.

    Args:
        comparison: What to show. Methods that follow no path are left out.
        name: ``"gamma"`` or ``"alignment_ratio"``.

    Raises:
        ValueError: If the name is unknown, or no path has this quantity.
    """
    if name not in PATH_LABELS:
        raise ValueError(f"Unknown quantity {name!r} of a path: choose one of {', '.join(PATH_LABELS)}.")
    paths = recorded_paths(comparison, name)
    if not paths:
        raise ValueError(f"No merge recorded {name!r} along a path; nothing to plot.")
    values = {method: np.concatenate([path[name] for path in found]) for method, found in paths.items()}
    everything = np.concatenate(list(values.values()))
    top = max(math.ceil(10 * everything.max() - 1e-6), 1) / 10
    value_edges = np.linspace(min(everything.min(), 0), top, 41)
    histograms = {}
    for method, found in paths.items():
        t = np.concatenate([(np.array(path["t"])[1:] + np.array(path["t"])[:-1]) / 2 for path in found])
        histograms[method] = np.histogram2d(t, values[method], bins=[_time_edges(found), value_edges])

    columns = min(len(paths), 3)
    rows = math.ceil(len(paths) / columns)
    figure = new_figure(1.4 + (5.2 if columns == 1 else 3.6 * columns), 4.2 if rows == 1 else 3.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = LogNorm(1, max(10, *(counts.max() for counts, _, _ in histograms.values())))
    for axes in grid.flat[len(paths) :]:
        axes.set_axis_off()
    for axes, (method, (counts, t_edges, _)) in zip(grid.flat, histograms.items(), strict=False):
        image = axes.pcolormesh(t_edges, value_edges, np.ma.masked_equal(counts, 0).T, norm=norm, cmap="viridis")
        axes.set_title(f"{shown(method)}: {len(values[method]):,} steps", loc="left", fontsize="medium")
        axes.set_xlabel("time t")
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(PATH_LABELS[name])
    figure.colorbar(image, ax=grid, label="steps per bin")
    return figure


def recorded_paths(comparison: Comparison, name: str) -> dict[str, list[dict[str, list[float]]]]:
    """Collect the paths on which a quantity was recorded, by method."""
    paths: dict[str, list[dict[str, list[float]]]] = {}
    for cell in comparison.cells:
        found = [record.path for record in cell.report.merges if record.path.get(name)]
        if found:
            paths.setdefault(cell.method, []).extend(found)
    return paths


def _time_edges(paths: list[dict[str, list[float]]]) -> np.ndarray:
    """Edges of at most 60 bins in time. Bins are as wide as a step, so that each holds equally many steps of a path."""
    step = max(np.diff(path["t"]).max() for path in paths)
    end = max(path["t"][-1] for path in paths)
    edges = step * np.arange(max(math.ceil(end / step - 1e-6), 1) + 1)
    return edges if len(edges) <= 61 else np.linspace(0, edges[-1], 61)
