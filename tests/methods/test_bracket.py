import math

import pytest

from lightning_odem.methods.bracket import Bracket


@pytest.mark.parametrize("start", [0.05, 0.9, 1.0, 7.0])
def test_the_minimum_of_a_parabola_in_the_logarithm_is_found_exactly(start):
    bracket = Bracket(lambda scale: 2.0 + 3.0 * math.log(scale / 0.6) ** 2, start, most=30)
    assert bracket.lowest == pytest.approx(0.6)


def test_three_evaluations_do_where_the_start_is_the_lowest():
    bracket = Bracket(lambda scale: abs(math.log(scale)), 1.0)
    assert len(bracket.scales) == len(bracket.losses) == 3
    assert bracket.lowest == pytest.approx(1.0)


def test_no_scale_is_evaluated_twice_and_no_more_than_allowed():
    asked = []
    bracket = Bracket(lambda scale: asked.append(scale) or -scale, 1.0, most=6)
    assert len(asked) == len(set(asked)) == 6
    assert bracket.lowest == pytest.approx(max(asked))  # no bracket: the best that was tried


def test_the_lowest_is_never_outside_the_three_around_it():
    bracket = Bracket(lambda scale: 0.0 if scale == 1.0 else 1.0 + scale, 1.0)
    assert 2**-0.5 < bracket.lowest < 2**0.5


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_gone_to(broken):
    bracket = Bracket(lambda scale: broken if scale > 1.1 else -scale, 1.0)
    assert bracket.lowest == pytest.approx(1.0)
    assert math.inf in bracket.losses


def test_equal_losses_stay_at_the_start():
    assert Bracket(lambda scale: 1.0, 0.7).lowest == pytest.approx(0.7)
