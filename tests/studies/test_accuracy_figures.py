import numpy as np
import pytest
from made_up_cells import cell, lines, two_methods
from numpy.testing import assert_allclose
from torch import nan

from lightning_odem.studies.accuracy_figures import accuracy_over_tasks, cost, sizes
from lightning_odem.studies.results import Comparison


@pytest.fixture
def comparison() -> Comparison:
    return two_methods()


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


def test_references_of_the_tasks_merged_so_far_are_steps() -> None:
    comparison = two_methods()
    comparison.joint = {0: {"a": 0.8, "b": 0.85, "c": 0.9}}
    steps = {step.get_label(): step.get_data().values for step in accuracy_over_tasks(comparison).axes[0].patches}
    assert list(steps) == ["pretrained", "fine-tuned", "joint training"]
    assert_allclose(steps["pretrained"], [50, 50, 50])  # the orders are a, b, c and c, b, a
    assert_allclose(steps["joint training"], [85, 85, 85])
    comparison.joint = {}
    assert len(accuracy_over_tasks(comparison).axes[0].patches) == 2
