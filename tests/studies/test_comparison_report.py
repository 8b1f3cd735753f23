from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from made_up_cells import cell, many, two_methods
from torch import nan

from lightning_odem.studies.accuracy_figures import accuracy_over_tasks, sizes
from lightning_odem.studies.comparison_report import save
from lightning_odem.studies.path_histogram import path_histogram
from lightning_odem.studies.radar import radar
from lightning_odem.studies.results import Comparison
from lightning_odem.studies.tables import markdown_comparison, render_comparison, render_sizes


@pytest.fixture
def comparison() -> Comparison:
    return two_methods()


def test_long_labels_and_legends_lie_inside_the_figure() -> None:
    comparison = many(8)
    for entry in comparison.cells:
        entry.report.tasks = [f"{task}_oxford_flowers102" for task in entry.report.tasks]
    for figure in (radar(comparison), accuracy_over_tasks(comparison), sizes(comparison)):
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        axes = figure.axes[0].get_tightbbox()
        assert axes.x0 >= 0
        assert axes.x1 <= legend.x0
        assert legend.x1 <= figure.bbox.x1


@pytest.mark.slow
def test_directory_holds_everything_there_is_data_for(comparison: Comparison, tmp_path: Path) -> None:
    comparison.cells.append(cell("odem", 0, [0.9, 0.9, 0.9], "dirichlet", size=512))
    comparison.cells[2].report.merges[1].sample_gradients = 640
    written = save(comparison, tmp_path / "new")
    assert sorted(tmp_path.joinpath("new").iterdir()) == sorted(written)
    assert sorted(file.name for file in written) == [
        "accuracies.csv", "accuracy_over_tasks.png", "accuracy_over_tasks_w.png", "cells.csv", "comparison.md",
        "comparison.txt", "cost.png", "path_alignment_ratio.png", "path_gamma.png", "radar.png",
        "radar_w.png", "results.json", "sizes.png", "sizes_w.png",
    ]  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written if file.suffix == ".png")
    text = (tmp_path / "new" / "comparison.txt").read_text(encoding="utf-8")
    assert text == f"{render_comparison(comparison, 140)}\n{render_sizes(comparison, 140)}"
    assert (tmp_path / "new" / "comparison.md").read_text(encoding="utf-8") == markdown_comparison(comparison)
    assert repr(Comparison.load(tmp_path / "new")) == repr(comparison)


def test_what_has_no_data_is_skipped(tmp_path: Path) -> None:
    tables = ["accuracies.csv", "cells.csv", "comparison.md", "comparison.txt", "results.json"]
    save(Comparison([]), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == tables
    final_only = cell("average", 0, [0.5, 0.6, 0.7])
    final_only.report.accuracy[:2] = [[nan], [nan, nan]]
    save(Comparison([final_only]), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [*tables[:-1], "radar.png", tables[-1]]
    assert "calibration samples\n\n" in (tmp_path / "comparison.txt").read_text(encoding="utf-8")


def test_figures_stay_out_of_pyplot(comparison: Comparison) -> None:
    before = plt.get_fignums()
    for draw in (radar, accuracy_over_tasks, sizes):
        draw(comparison)
    path_histogram(comparison, "gamma")
    assert plt.get_fignums() == before
