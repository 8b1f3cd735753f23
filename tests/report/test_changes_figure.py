import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import StreamReport, plot_changes

nan = math.nan


@pytest.fixture
def report() -> StreamReport:
    return StreamReport(
        tasks=["a", "b", "c"],
        weights=[1.0, 1.0, 1.0],
        accuracy=[[0.9], [nan, 0.7], [0.65, 0.75, 0.95]],
        pretrained=[0.25, 0.5, 0.5],
        fine_tuned=[0.9, 0.85, 0.99],
        before_training=[nan, 0.5, nan],
    )


def texts(axes) -> dict[tuple[int, int], str]:
    return {text.get_position()[::-1]: text.get_text() for text in axes.texts}


def ticks(bar) -> list[str]:
    return [text.get_text() for text in bar.get_yticklabels()]


def test_a_cell_is_after_minus_before_in_points(report: StreamReport) -> None:
    figure = plot_changes(report)
    axes, bar = figure.axes
    found = texts(axes)
    assert found == {(0, 0): "+65.0", (1, 0): "—", (1, 1): "+20.0", (2, 0): "-25.0", (2, 1): "+5.0", (2, 2): "—"}
    assert figure.get_suptitle() == "accuracy after minus before each merge\n(percentage points, higher is better)"
    assert ticks(bar) == ["-65.0", "+0.0", "+65.0"]


def test_better_is_blue_also_where_lower_is_better(report: StreamReport) -> None:
    higher = plot_changes(report).axes[0].images[0].get_array()
    assert_allclose(higher.filled(nan)[2, :2], np.array([-25, 5]) / 65)
    report.metrics = dict.fromkeys("abc", TaskMetric("Perplexity", "", False))
    figure = plot_changes(report)
    axes, bar = figure.axes
    assert_allclose(axes.images[0].get_array().filled(nan), -higher.filled(nan))
    assert texts(axes)[2, 0] == "-0.250"
    assert ticks(bar) == ["+0.650", "+0.000", "-0.650"]
    assert figure.get_suptitle() == "Perplexity after minus before each merge\n(lower is better)"


def test_unlike_metrics_are_coloured_by_task(report: StreamReport) -> None:
    report.metrics = {"b": TaskMetric("MeanSquaredError", "", False)}
    axes, bar = plot_changes(report).axes
    assert_allclose(axes.images[0].get_array().filled(nan)[1:, 1], [-1, -0.25])
    assert ticks(bar) == ["worse", "same", "better"]
    assert axes.get_xticklabels()[1].get_text() == "b\nMeanSquaredError"


def test_a_stream_that_was_not_measured_has_dashes() -> None:
    axes, _ = plot_changes(StreamReport(["a"], [1.0], [[nan]], [nan], [nan], [nan])).axes
    assert texts(axes) == {(0, 0): "—"}
