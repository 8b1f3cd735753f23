import pytest
from numpy.testing import assert_allclose

from lightning_odem.report import MergeRecord, plot_path, plot_search

PATH = {
    "t": [0.0, 0.5],
    "loss": [1.0, 0.7],
    "step_norm": [],
    "gamma": [],
    "alignment_ratio": [],
    "scale": [0.7, 1.0, 0.5],
    "scale_loss": [0.75, 0.9, 0.8],
    "scale_taken": [0.68],
    "average_loss": [0.85],
    "descent_loss": [0.9, 0.8, 0.82],
    "descent_taken": [1.0],
}


def record(**changes):
    return MergeRecord("b", 0.5, "ode", PATH | changes, loss_incoming=1.5)


def lines(axes):
    return {line.get_label(): line.get_xydata().T for line in axes.lines}


def test_losses_are_drawn_over_the_scales_in_their_order():
    left, _ = plot_search(record()).axes
    assert_allclose(lines(left)["tried"], [[0.5, 0.7, 1.0], [0.8, 0.75, 0.9]])
    assert_allclose(lines(left)["scale taken: 0.68"][0], [0.68, 0.68])


def test_the_losses_of_the_models_are_lines():
    drawn = lines(plot_search(record()).axes[0])
    for label, loss in (
        ("merged model before: 1", 1.0),
        ("merged model after: 0.7", 0.7),
        ("incoming model: 1.5", 1.5),
    ):
        assert_allclose(drawn[label][1], [loss, loss])
    assert_allclose(drawn["running average: 0.85"][1], [0.85, 0.85])


def test_where_the_average_was_taken_no_scale_is():
    drawn = lines(plot_search(record(scale_taken=[0.0])).axes[0])
    assert not [label for label in drawn if label.startswith("scale taken")]


def test_the_chosen_point_is_the_loss_of_the_merged_model():
    drawn = lines(plot_search(record()).axes[0])
    assert_allclose(drawn["chosen point"], [[0.68], [0.7]])
    averaged = lines(plot_search(record(scale_taken=[0.0])).axes[0])
    assert "chosen point" not in averaged
    assert "running average, taken: 0.85" in averaged


def test_the_piece_that_was_taken_is_circled():
    _, right = plot_search(record()).axes
    curve, circle = right.lines
    assert_allclose(curve.get_xydata().T, [[0, 1, 2], [0.9, 0.8, 0.82]])
    assert_allclose(circle.get_xydata(), [[1, 0.8]])


def test_a_merge_without_descent_has_no_pieces():
    path = {key: value for key, value in PATH.items() if not key.startswith("descent")}
    _, right = plot_search(MergeRecord("b", 0.5, "ode", path, loss_incoming=1.5)).axes
    assert right.get_title(loc="left") == "no descent"


def test_a_merge_without_a_search_is_refused():
    with pytest.raises(ValueError, match="task 'b' \\(average\\) did not search for an operating point"):
        plot_search(MergeRecord("b", 0.5, "average"))


def test_a_path_is_drawn_as_before():
    assert [axes.get_ylabel() for axes in plot_path(record(step_norm=[1.0])).axes] == ["calibration loss", "per step"]
