import math

import pytest
import torch

from lightning_odem.flow import LowestPoint, NonFiniteLossError


def walk(lowest, times):
    theta = torch.zeros(1)
    for t in times:
        theta.fill_(t)  # one memory for all points, as in a path
        lowest(t, theta)
    return theta


def test_no_point_looked_at_is_lower_than_the_one_it_keeps():
    lowest = LowestPoint(lambda theta: math.sin(20 * theta.item()), start=0.1, end=0.9, every=0.05)
    theta = walk(lowest, [0.05 * step for step in range(18)] + [0.9])
    assert len(lowest.t) == 17
    lowest.write_(theta)
    assert theta.item() == pytest.approx(lowest.best_t)
    assert lowest.loss[lowest.t.index(lowest.best_t)] == min(lowest.loss)


def test_of_equal_losses_the_first_counts():
    lowest = LowestPoint(lambda theta: 1.0, start=0.2, end=0.4, every=0.1)
    walk(lowest, [0.0, 0.1, 0.2, 0.3, 0.4])
    assert (lowest.t, lowest.best_t) == ([0.2, 0.3, 0.4], 0.2)


def test_of_losses_that_differ_by_rounding_the_first_counts():
    losses = iter([1.0, 1.0 - 6e-8, 1.0 - 1.2e-7, 1.0 + 6e-8])
    lowest = LowestPoint(lambda theta: next(losses), start=0.1, end=0.4, every=0.1)
    walk(lowest, [0.1, 0.2, 0.3, 0.4])
    assert lowest.best_t == 0.1


def test_a_loss_that_falls_by_less_at_each_point_is_followed_all_the_same():
    lowest = LowestPoint(lambda theta: 1.0 - 1e-6 * theta.item(), start=0.0, end=10.0, every=0.5)
    walk(lowest, [0.5 * step for step in range(21)])
    assert lowest.best_t > 8.0


def test_points_closer_together_than_asked_are_passed_over_but_not_the_end():
    lowest = LowestPoint(lambda theta: theta.item(), start=0.0, end=0.25, every=0.1)
    walk(lowest, [step / 100 for step in range(26)])
    assert lowest.t == [0.0, 0.1, 0.2, 0.25]


def test_a_loss_that_is_not_finite_stops_the_search():
    lowest = LowestPoint(lambda theta: math.nan, start=0.0, end=0.5, every=0.1)
    with pytest.raises(NonFiniteLossError, match="held-out samples is nan at step 0"):
        lowest(0.0, torch.zeros(1))
