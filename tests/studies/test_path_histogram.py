import numpy as np
import pytest
from made_up_cells import PATH, cell, two_methods
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from lightning_odem.studies.path_histogram import path_histogram
from lightning_odem.studies.results import Comparison


@pytest.fixture
def comparison() -> Comparison:
    return two_methods()


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
