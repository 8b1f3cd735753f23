import math

import pytest

from lightning_odem.flow import operating_time, scaled_time


def test_equal_weights_give_one_over_k():
    assert [operating_time([2.0] * k) for k in range(1, 6)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_the_times_of_a_stream_give_each_task_its_utility_share():
    weights = [1.0, 4.0, 0.5, 0.0, 2.5]
    shares = []
    for k in range(1, len(weights) + 1):
        t = operating_time(weights[:k])
        shares = [share * (1 - t) for share in shares] + [t]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights])


def test_the_first_task_is_taken_whole_whatever_its_weight():
    assert operating_time([0.0]) == operating_time([7.0]) == 1.0


def test_a_task_of_weight_zero_has_time_zero():
    assert operating_time([1.0, 0.0]) == operating_time([0.0, 0.0]) == 0.0


def test_a_task_after_weightless_ones_has_time_one():
    assert operating_time([0.0, 0.0, 3.0]) == 1.0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_no_utilities_are_refused(weight):
    with pytest.raises(ValueError, match="for task 2"):
        operating_time([1.0, weight])


def test_no_weight_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        operating_time([])


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 2.0, 3.3])
def test_a_scaled_time_is_that_of_a_scaled_weight(factor):
    weights = [1.0, 2.5, 0.7]
    expected = operating_time([*weights[:-1], factor * weights[-1]])
    assert scaled_time(operating_time(weights), factor) == pytest.approx(expected, rel=1e-14)
    assert (scaled_time(0.0, factor), scaled_time(1.0, factor)) == (0.0, 1.0)
