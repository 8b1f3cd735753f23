from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from torch import nan

from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.studies.figures import accuracy_over_tasks, cost, path_histogram, radar, save, sizes
from lightning_odem.studies.results import CellResult, Comparison
from lightning_odem.studies.tables import markdown_comparison, render_comparison, render_sizes

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


@pytest.fixture
def comparison() -> Comparison:
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


def test_radar_shows_the_mean_final_accuracy_on_each_task(comparison: Comparison) -> None:
    figure = radar(comparison)
    drawn = lines(figure)
    assert list(drawn) == ["pretrained", "fine-tuned", "average", "odem"]
    assert_allclose(drawn["pretrained"], [40, 50, 60, 40])  # closed: the first task again
    assert_allclose(drawn["fine-tuned"], [90, 95, 100, 90])
    assert_allclose(drawn["average"], [55, 65, 75, 55])
    assert_allclose(drawn["odem"], [75, 80, 85, 75])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    assert_allclose(figure.axes[0].lines[0].get_xdata()[:3], np.radians([0, 120, 240]))
    assert figure.axes[0].get_ylim() == (30, 100)


def test_radar_shows_the_largest_calibration_size_of_its_weighting(comparison: Comparison) -> None:
    comparison.cells.append(cell("odem", 0, [0.9, 0.9, 0.9], size=512))
    comparison.cells.append(cell("odem", 0, [0.1, 0.1, 0.1], "dirichlet", size=1024))
    assert_allclose(lines(radar(comparison))["odem"], 90)
    assert_allclose(lines(radar(comparison, weighting="dirichlet"))["odem"], 10)


def test_selected_methods_keep_their_looks(comparison: Comparison) -> None:
    for draw in (radar, accuracy_over_tasks):
        whole, part = draw(comparison).axes[0], draw(comparison, methods=["odem"]).axes[0]
        assert "average" not in [line.get_label() for line in part.lines]
        looks = [(axes.lines[-1].get_color(), axes.lines[-1].get_marker()) for axes in (whole, part)]
        assert looks[0] == looks[1]


def test_unknown_names_are_refused_with_those_that_occur(comparison: Comparison) -> None:
    for draw in (radar, accuracy_over_tasks, sizes):
        with pytest.raises(ValueError, match="method 'ties'; methods in this comparison: average, odem"):
            draw(comparison, methods=["ties"])
        with pytest.raises(ValueError, match="weighting 'dirichlet'; weightings in this comparison: uniform"):
            draw(comparison, weighting="dirichlet")


def test_accuracy_over_tasks_is_the_mean_with_a_band_of_one_deviation(comparison: Comparison) -> None:
    axes = accuracy_over_tasks(comparison).axes[0]
    average, odem = axes.lines
    assert_allclose(average.get_data(), [[1, 2, 3], [90, 75, 65]])
    assert_allclose(odem.get_data(), [[1, 2, 3], [90, 75, 80]])
    band = axes.collections[0].get_paths()[0].vertices
    deviation = np.std([60, 70], ddof=1)
    assert_allclose([band[band[:, 0] == 3, 1].min(), band[band[:, 0] == 3, 1].max()], [65 - deviation, 65 + deviation])
    assert axes.get_ylabel() == "ACC (%)"


def test_accuracy_over_tasks_weighs_drawn_weights() -> None:
    axes = accuracy_over_tasks(Comparison([cell("odem", 0, [0.5, 0.6, 0.7], "dirichlet")]), weighting="dirichlet").axes[
        0
    ]
    assert_allclose(axes.lines[0].get_ydata(), [90, 100 * (2 * 0.8 + 0.7) / 3, 100 * (2 * 0.5 + 0.6 + 0.7) / 4])
    assert axes.get_ylabel() == r"$\mathrm{ACC}_w$ (%)"


def test_methods_without_all_rows_have_no_course(comparison: Comparison) -> None:
    comparison.cells[1].report.accuracy[0] = [nan]
    assert list(lines(accuracy_over_tasks(comparison))) == ["odem"]
    comparison.cells[3].report.accuracy[1] = [nan, nan]
    with pytest.raises(ValueError, match="No method was evaluated after every merge"):
        accuracy_over_tasks(comparison)


def counts(figure: Figure) -> np.ndarray:
    """Counts by time and value, empty bins 0."""
    return figure.axes[0].collections[0].get_array().filled(0).T


def test_histogram_counts_every_step_of_every_path(comparison: Comparison) -> None:
    figure = path_histogram(comparison, "gamma")
    found = counts(figure)
    assert found.shape == (3, 40)  # steps of 0.1 up to t = 0.25, values from 0 to 1
    expected = np.zeros((3, 40))
    expected[0, 39] = expected[1, 20] = expected[2, 39] = 4  # two cells with two paths each
    assert_allclose(found, expected)
    assert figure.axes[0].collections[0].norm.vmin == 1
    assert figure.axes[0].get_title(loc="left") == "odem: 12 steps"


def test_histogram_of_the_alignment_ratio_ends_above_its_values(comparison: Comparison) -> None:
    figure = path_histogram(comparison, "alignment_ratio")
    found = counts(figure)
    assert found.sum() == 12
    assert_allclose(figure.axes[0].get_ylim(), (0, 0.3))
    assert [int(np.flatnonzero(row)[0]) for row in found] == [14, 16, 32]  # 0.11, 0.12 and 0.24 in bins of 0.0075


def test_histogram_agrees_with_counting_on_uneven_paths() -> None:
    generator = np.random.default_rng(0)
    cells, t, gamma = [], [], []
    for order, end in enumerate([0.5, 0.333]):
        times = [*np.arange(0, end, 0.05), end]
        path = {"t": times, "gamma": list(generator.random(len(times) - 1)), "alignment_ratio": []}
        cells.append(cell("odem", order, [0.5] * 3, path=path))
        t += 2 * times[:-1]
        gamma += 2 * path["gamma"]
    found = counts(path_histogram(Comparison(cells), "gamma"))
    for column in range(10):
        values = [value for value, time in zip(gamma, t, strict=True) if round(time / 0.05) == column]
        expected = np.bincount((np.array(values) * 40).astype(int), minlength=40)
        assert_allclose(found[column], expected)


def test_each_method_has_a_histogram_of_its_own_on_common_axes(comparison: Comparison) -> None:
    fine = {"t": list(np.linspace(0, 0.5, 51)), "gamma": [0.3] * 50, "alignment_ratio": [0.9] * 50}
    comparison.cells.append(cell("ode", 0, [0.5] * 3, path=fine))
    coarse, dense, _ = path_histogram(comparison, "alignment_ratio").axes
    assert coarse.get_title(loc="left") == "odem: 12 steps"
    assert dense.get_title(loc="left") == "ode: 100 steps"
    assert [axes.collections[0].get_array().sum() for axes in (coarse, dense)] == [12, 100]
    assert coarse.get_ylim() == dense.get_ylim() == (0, 0.9)
    assert coarse.get_xlim() == dense.get_xlim() == pytest.approx((0, 0.5))
    assert coarse.collections[0].norm is dense.collections[0].norm


@pytest.mark.parametrize("methods", [3, 4, 7])
def test_many_histograms_continue_below(methods: int) -> None:
    figure = path_histogram(Comparison([cell(f"m{k}", 0, [0.5] * 3, path=PATH) for k in range(methods)]), "gamma")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == [f"m{k}: 6 steps" for k in range(methods)]
    figure.draw_without_rendering()
    assert figure.axes[0].bbox.width > 250
    assert figure.axes[0].bbox.height > 250


def test_very_fine_steps_share_bins() -> None:
    path = {"t": list(np.linspace(0, 1, 1001)), "gamma": [1.0] * 1000}
    found = counts(path_histogram(Comparison([cell("odem", 0, [0.5] * 3, path=path)]), "gamma"))
    assert found.shape == (60, 40)
    assert found.sum() == 2000


def test_histogram_without_data_or_of_another_quantity_is_refused(comparison: Comparison) -> None:
    with pytest.raises(ValueError, match="'loss' of a path: choose one of gamma, alignment_ratio"):
        path_histogram(comparison, "loss")
    comparison.cells = comparison.select(method="average")
    with pytest.raises(ValueError, match="No merge recorded 'gamma'"):
        path_histogram(comparison, "gamma")


def test_sizes_show_mean_and_deviation_at_each_size(comparison: Comparison) -> None:
    comparison.cells += [cell("odem", order, [0.9 - order / 10] * 3, size=512) for order in range(2)]
    axes = sizes(comparison).axes[0]
    bars = {container.get_label(): container.lines for container in axes.containers}
    line, _, (segments,) = bars["odem"]
    assert_allclose(line.get_ydata(), [80, 85])
    assert_allclose(line.get_xdata(), [64, 512], rtol=0.05)
    deviation = np.std([80, 90], ddof=1)
    assert_allclose(segments.get_segments()[1][:, 1], [85 - deviation, 85 + deviation])
    assert_allclose(bars["average"][0].get_ydata(), [65])
    assert list(axes.get_xticks()) == [64, 512]
    assert bars["average"][0].get_xdata()[0] != line.get_xdata()[0]


def test_cost_shows_accuracy_over_gradients_and_methods_without_any_as_level_lines(comparison: Comparison) -> None:
    comparison.cells += [cell("odem", order, [0.9 - order / 10] * 3, size=512) for order in range(2)]
    for entry in comparison.select(method="odem"):
        for number, record in enumerate(entry.report.merges):
            record.sample_gradients = entry.calibration_size * 10 * number  # the first merge does not count
    axes = cost(comparison).axes[0]
    (bars,) = axes.containers
    line, _, (segments,) = bars.lines
    assert_allclose(line.get_xdata(), [64 * 15, 512 * 15])
    assert_allclose(line.get_ydata(), [80, 85])
    deviation = np.std([80, 90], ddof=1)
    assert_allclose(segments.get_segments()[1][:, 1], [85 - deviation, 85 + deviation])
    (level,) = [line for line in axes.lines if line.get_label() == "average"]
    assert_allclose(level.get_ydata(), 65)
    assert axes.get_xscale() == "log"


def test_there_is_no_cost_to_show_without_gradients(comparison: Comparison) -> None:
    with pytest.raises(ValueError, match="No method took a gradient"):
        cost(comparison)


@pytest.mark.parametrize("draw", [radar, accuracy_over_tasks, sizes])
def test_twelve_methods_look_different(draw) -> None:
    drawn = [line for line in draw(many(12)).axes[0].lines if line.get_marker() not in ("None", "_")]
    assert len(drawn) == 12
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 12


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
