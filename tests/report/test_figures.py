import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from torch import nan

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport, plot_accuracy_matrix, plot_accuracy_over_stream, plot_path
from lightning_odem.report.changes_figure import plot_changes


@pytest.fixture
def report() -> StreamReport:
    return StreamReport(
        tasks=["a", "b", "c"],
        weights=[2.0, 1.0, 1.0],
        accuracy=[[0.9], [0.8, 0.7], [nan, 0.75, 0.95]],
        pretrained=[0.25, nan, 0.5],
        fine_tuned=[0.9, 0.85, 0.99],
        before_training=[nan] * 3,
    )


def record(loss_incoming: float, barrier: float = 0.0) -> MergeRecord:
    path = {
        "t": [0.0, 0.2, 0.4, 0.5],
        "loss": [1.0, 0.9, 1.1, 0.8],
        "alignment": [-1.0, 2.0, -1.0],
        "gamma": [1.0, 0.25, 1.0],
        "alignment_ratio": [0.1, 0.2, 0.3],
        "step_norm": [1.0, 1.0, 0.5],
    }
    return MergeRecord("b", 0.5, "odem", path, loss_incoming=loss_incoming, barrier=barrier)


def lines(figure: Figure, axes: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): line.get_data() for line in figure.axes[axes].lines}


def tick_labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_matrix_shows_percent_and_leaves_the_rest_blank(report: StreamReport) -> None:
    upper, lower, colorbar = plot_accuracy_matrix(report).axes
    assert_allclose(upper.images[0].get_array().filled(nan), [[25, nan, 50], [90, 85, 99]])
    expected = [[90, nan, nan], [80, 70, nan], [nan, 75, 95]]
    assert_allclose(lower.images[0].get_array().filled(nan), expected, rtol=1e-6)
    assert colorbar.get_ylabel() == "accuracy (%)"
    assert lower.images[0].norm is upper.images[0].norm
    assert (lower.images[0].norm.vmin, lower.images[0].norm.vmax) == (20, 100)


def test_matrix_cells_hold_their_numbers(report: StreamReport) -> None:
    upper, lower, _ = plot_accuracy_matrix(report).axes
    texts = {text.get_position(): text.get_text() for text in lower.texts}
    expected = {(0, 0): "90.0", (0, 1): "80.0", (1, 1): "70.0", (0, 2): "—", (1, 2): "75.0", (2, 2): "95.0"}
    assert texts == expected
    assert {text.get_position(): text.get_text() for text in upper.texts}[1, 0] == "—"


def test_matrix_names_models_and_weighted_tasks(report: StreamReport) -> None:
    upper, lower, _ = plot_accuracy_matrix(report).axes
    assert tick_labels(upper.yaxis) == ["pretrained", "fine-tuned"]
    assert tick_labels(lower.yaxis) == ["after a", "after b", "after c"]
    assert tick_labels(lower.xaxis) == ["a (w=2)", "b (w=1)", "c (w=1)"]
    report.weights = [1.0] * 3
    assert tick_labels(plot_accuracy_matrix(report).axes[1].xaxis) == ["a", "b", "c"]


def test_matrix_of_unmeasured_accuracies_is_all_dashes() -> None:
    figure = plot_accuracy_matrix(StreamReport(["a"], [1.0], [[nan]], [nan], [nan], [nan]))
    assert [text.get_text() for axes in figure.axes[:2] for text in axes.texts] == ["—"] * 3


def test_stream_shows_each_task_from_its_merge_on(report: StreamReport) -> None:
    figure = plot_accuracy_over_stream(report)
    drawn = lines(figure)
    assert list(drawn) == [r"$\mathrm{ACC}_w$", "a (w=2)", "b (w=1)", "c (w=1)"]
    assert_allclose(drawn[r"$\mathrm{ACC}_w$"], [[1, 2, 3], [90, (2 * 80 + 70) / 3, nan]])
    assert_allclose(drawn["a (w=2)"], [[1, 2, 3], [90, 80, nan]])
    assert_allclose(drawn["b (w=1)"], [[2, 3], [70, 75]])
    assert_allclose(drawn["c (w=1)"], [[3], [95]])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("number of merges", "accuracy (%)")


@pytest.mark.parametrize("size", [1, 6, 20])
def test_stream_tells_tasks_apart(size: int) -> None:
    tasks = [f"task {k}" for k in range(size)]
    accuracy = [[0.5] * (k + 1) for k in range(size)]
    figure = plot_accuracy_over_stream(StreamReport(tasks, [1.0] * size, accuracy))
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in figure.axes[0].lines[1:]}
    assert len(looks) == size
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())
    assert figure.axes[0].lines[0].get_label() == "ACC"


def test_path_is_compared_with_chord_and_envelope_of_a_falling_loss() -> None:
    drawn = lines(plot_path(record(loss_incoming=0.6)))
    assert_allclose(drawn[r"path, $L(\theta(t))$"], [[0, 0.2, 0.4, 0.5], [1.0, 0.9, 1.1, 0.8]])
    assert_allclose(drawn[r"chord to $L(\theta_1)$ = 0.6 at t = 1"], [[0, 0.5], [1.0, 0.8]])
    assert_allclose(drawn["envelope (Theorem 3.4)"], [[0, 0.5], [1.0, 1.0]])
    assert_allclose(drawn["operating time t = 0.5"][0], [0.5, 0.5])


def test_envelope_is_the_chord_of_a_rising_loss() -> None:
    drawn = lines(plot_path(record(loss_incoming=2.0)))
    assert_allclose(drawn["envelope (Theorem 3.4)"], [[0, 0.5], [1.0, 1.5]])
    assert_allclose(drawn[r"chord to $L(\theta_1)$ = 2 at t = 1"], [[0, 0.5], [1.0, 1.5]])


def test_barrier_stands_where_the_path_is_highest_above_the_chord() -> None:
    drawn = lines(plot_path(record(loss_incoming=0.6, barrier=0.26)))
    assert_allclose(drawn["barrier = 0.26"], [[0.4, 0.4], [1.0 - 0.4 * 0.4, 1.1]])
    assert not any("barrier" in label for label in lines(plot_path(record(loss_incoming=2.0))))


def test_barrier_of_estimated_losses_stands_at_the_end_where_it_was_measured() -> None:
    noisy = record(loss_incoming=0.2, barrier=0.2)
    noisy.estimated = True
    drawn = lines(plot_path(noisy))
    assert_allclose(drawn["barrier = 0.2"], [[0.5, 0.5], [0.6, 0.8]])
    assert_allclose(drawn["path, losses of minibatches"], [[0, 0.2, 0.4, 0.5], [1.0, 0.9, 1.1, 0.8]])
    assert_allclose(drawn[r"$L(\theta(t))$ at the ends of the path"], [[0, 0.5], [1.0, 0.8]])
    assert r"path, $L(\theta(t))$" not in drawn


def test_held_out_losses_and_steps_taken_back_are_drawn_where_there_are_any() -> None:
    searched = record(loss_incoming=0.6)
    plain = set(lines(plot_path(searched)))
    searched.path |= {
        "held_out_t": [0.5, 0.7],
        "held_out_loss": [0.9, 1.2],
        "rejected_t": [0.6],
        "rejected_loss": [3.0],
    }
    drawn = lines(plot_path(searched))
    assert_allclose(drawn["held-out samples"], [[0.5, 0.7], [0.9, 1.2]])
    assert_allclose(drawn["steps taken back"], [[0.6], [3.0]])
    assert set(drawn) - plain == {"held-out samples", "steps taken back"}


def test_points_of_very_many_steps_have_no_markers() -> None:
    path = {
        "t": list(np.linspace(0, 1, 200)),
        "loss": [1.0] * 200,
        "gamma": [1.0] * 199,
        "alignment_ratio": [0.1] * 199,
    }
    many = plot_path(MergeRecord("b", 1.0, "ode", path, loss_incoming=1.0))
    for figure, marker in ((many, ""), (plot_path(record(loss_incoming=0.6)), "o")):
        (found,) = (line for line in figure.axes[0].lines if line.get_label().startswith("path"))
        assert found.get_marker() == marker


def test_gamma_and_alignment_ratio_span_their_steps() -> None:
    gamma, ratio = plot_path(record(loss_incoming=0.6)).axes[1].patches
    assert_allclose(gamma.get_data().values, [1.0, 0.25, 1.0])
    assert_allclose(gamma.get_data().edges, [0.0, 0.2, 0.4, 0.5])
    assert_allclose(ratio.get_data().values, [0.1, 0.2, 0.3])
    assert "gamma" in gamma.get_label()
    assert "alignment ratio" in ratio.get_label()


def test_steps_without_damping_are_drawn_by_their_lengths() -> None:
    undamped = record(loss_incoming=0.6)
    undamped.path |= {"gamma": [], "alignment_ratio": [], "step_norm": [3.0, 0.0, 1.5]}
    figure = plot_path(undamped)
    (length,) = figure.axes[1].patches
    assert_allclose(length.get_data().values, [3.0, 0.0, 1.5])
    assert_allclose(length.get_data().edges, [0.0, 0.2, 0.4, 0.5])
    assert figure.axes[1].get_ylim()[1] > 3.0
    assert length.get_label() == "length of the step"


@pytest.mark.parametrize("path", [{}, {"t": [0.0], "loss": [1.0], "gamma": [], "alignment_ratio": []}])
def test_merge_without_steps_has_no_path_to_plot(path: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="task 'a' \\(average\\) followed no path"):
        plot_path(MergeRecord("a", 0.0, "average", path))


def test_legends_do_not_cover_data(report: StreamReport) -> None:
    for figure in (plot_path(record(loss_incoming=0.6, barrier=0.26)), plot_accuracy_over_stream(report)):
        figure.draw_without_rendering()
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        assert legends
        for legend in legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
            assert box.x1 <= figure.bbox.x1


def test_figures_stay_out_of_pyplot(report: StreamReport) -> None:
    before = plt.get_fignums()
    plot_accuracy_matrix(report)
    plot_accuracy_over_stream(report)
    plot_path(record(loss_incoming=0.6))
    assert plt.get_fignums() == before


def test_plain_scores_have_no_ceiling_and_the_better_is_the_brighter(report: StreamReport) -> None:
    report.metrics = dict.fromkeys("abc", TaskMetric("Perplexity", "", False))
    report.accuracy = [[9.0], [120.5, 7.0], [nan, 7.5, 9.5]]
    _, lower, colorbar = plot_accuracy_matrix(report).axes
    image = lower.images[0]
    assert (image.norm.vmin, image.norm.vmax, image.cmap.name) == (0.25, 120.5, "viridis_r")
    assert colorbar.get_ylabel() == "Perplexity (lower is better)"
    assert {text.get_position(): text.get_text() for text in lower.texts}[0, 1] == "120.5"
    figure = plot_accuracy_over_stream(report)
    assert figure.axes[0].get_ylabel() == "Perplexity (lower is better)"
    assert_allclose(lines(figure)["a (w=2)"][1], [9.0, 120.5, nan])


def test_unlike_metrics_are_coloured_by_task_and_have_axes_of_their_own(report: StreamReport) -> None:
    report.metrics = {"b": TaskMetric("MeanSquaredError", "", False)}
    upper, lower, colorbar = plot_accuracy_matrix(report).axes
    assert_allclose(lower.images[0].get_array().filled(nan)[:2], [[1, nan, nan], [0.55 / 0.65, 1, nan]])
    assert [text.get_text() for text in colorbar.get_yticklabels()] == ["worst", "best"]
    assert tick_labels(lower.xaxis)[1] == "b (w=1)\nMeanSquaredError"
    figure = plot_accuracy_over_stream(report)
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy (%)", "MeanSquaredError (lower is better)"]
    assert list(lines(figure)) == ["a (w=2)", "c (w=1)"]
    assert_allclose(lines(figure, 1)["b (w=1)"][1], [0.7, 0.75])


def test_joint_training_is_a_row_of_the_matrix_if_it_is_given(report: StreamReport) -> None:
    upper, _, _ = plot_accuracy_matrix(report, joint={"b": 0.875, "a": 0.75}).axes
    assert tick_labels(upper.yaxis) == ["pretrained", "fine-tuned", "joint training"]
    texts = {text.get_position(): text.get_text() for text in upper.texts}
    assert [texts[column, 2] for column in range(3)] == ["75.0", "87.5", "—"]


def test_references_of_the_stream_are_means_over_the_tasks_merged_so_far(report: StreamReport) -> None:
    report.weights = [1.0, 1.0, 1.0]
    figure = plot_accuracy_over_stream(report, joint=dict.fromkeys("abc", 0.875))
    drawn = {step.get_label(): step.get_data().values for step in figure.axes[0].patches}
    assert list(drawn) == ["ACC pretrained", "ACC fine-tuned", "ACC joint training"]
    assert_allclose(drawn["ACC fine-tuned"], [90, 87.5, 274 / 3])
    assert_allclose(drawn["ACC pretrained"], [25, nan, nan])
    assert_allclose(drawn["ACC joint training"], [87.5] * 3)


def test_references_that_were_not_measured_are_left_out(report: StreamReport) -> None:
    report.pretrained = [nan] * 3
    assert [step.get_label()[-10:] for step in plot_accuracy_over_stream(report).axes[0].patches] == ["fine-tuned"]


def test_the_end_of_a_path_is_the_merged_model() -> None:
    assert_allclose(lines(plot_path(record(loss_incoming=0.6)))["merged model, 0.8 (before: 1)"], [[0.5], [0.8]])


def test_figures_of_a_long_stream_are_of_bounded_size_and_number_the_tasks() -> None:
    sizes = []
    for size in (31, 300):
        names = [f"task {k}" for k in range(size)]
        measured = [[0.5] * size] * 3
        report = StreamReport(names, [1.0] * size, [[nan] * k + [0.5] for k in range(size)], *measured)
        matrix, over = plot_accuracy_matrix(report), plot_accuracy_over_stream(report)
        changed = plot_changes(report)
        assert not matrix.axes[1].texts
        assert not changed.axes[0].texts
        assert [tick_labels(axis)[-1] for axis in (matrix.axes[1].xaxis, matrix.axes[1].yaxis)] == [str(size)] * 2
        assert list(lines(over)) == ["ACC", "median"]
        sizes.append([tuple(figure.get_size_inches()) for figure in (matrix, over, changed)])
    assert sizes[0] == sizes[1]
