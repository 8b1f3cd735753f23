import numpy as np
import pytest
from made_up_cells import cell, lines, two_methods
from numpy.testing import assert_allclose

from lightning_odem.studies.radar import radar
from lightning_odem.studies.results import Comparison


@pytest.fixture
def comparison() -> Comparison:
    return two_methods()


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


def test_joint_training_is_an_outline_if_there_was_any() -> None:
    comparison = two_methods()
    assert "joint training" not in lines(radar(comparison))
    comparison.joint = {0: {"a": 0.8, "b": 0.85, "c": 0.9}}
    assert_allclose(lines(radar(comparison))["joint training"], [80, 85, 90, 80])
