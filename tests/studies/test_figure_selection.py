import pytest
from made_up_cells import many, two_methods

from lightning_odem.studies.accuracy_figures import accuracy_over_tasks, sizes
from lightning_odem.studies.radar import radar
from lightning_odem.studies.results import Comparison


@pytest.fixture
def comparison() -> Comparison:
    return two_methods()


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


@pytest.mark.parametrize("draw", [radar, accuracy_over_tasks, sizes])
def test_twelve_methods_look_different(draw) -> None:
    drawn = [line for line in draw(many(12)).axes[0].lines if line.get_marker() not in ("None", "_")]
    assert len(drawn) == 12
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 12
