import math

import pytest
import torch

from lightning_odem.flow import Descent, NonFiniteLossError

FP64 = torch.float64
CURVATURE = torch.tensor([1.0, 4.0, 0.5], dtype=FP64)


def valley(theta):
    """A quadratic loss around (3, 1.5, -2)."""
    offset = theta - torch.tensor([3.0, 1.5, -2.0], dtype=FP64)
    return float(CURVATURE @ offset.square()) / 2, CURVATURE * offset


def noise(seed=0):
    """A flat loss whose gradients are random."""
    generator = torch.Generator().manual_seed(seed)
    return lambda theta: (0.0, torch.randn(3, generator=generator, dtype=FP64))


def adam(length, gradients, betas=(0.9, 0.99)):
    """The moves of Adam, from the definition, with a speed that falls linearly to zero at the end."""
    moves, mean, square = [], torch.zeros(3, dtype=FP64), torch.zeros(3, dtype=FP64)
    for k, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        direction = mean / (1 - betas[0] ** k) / (square / (1 - betas[1] ** k)).sqrt()
        # The integral of 2 l (1 - t) over the step.
        begin, end = (k - 1) / len(gradients), k / len(gradients)
        moves.append(-length * ((1 - begin) ** 2 - (1 - end) ** 2) * direction)
    return moves


@pytest.mark.parametrize("steps", [1, 4, 37])
def test_constant_gradients_are_followed_over_the_whole_length(steps):
    point = torch.zeros(3, dtype=FP64)
    Descent(point, 0.5, steps).follow(lambda theta: (0.0, CURVATURE.clone()), steps)
    torch.testing.assert_close(point, torch.full((3,), -0.5, dtype=FP64))


def test_every_step_is_one_of_adam():
    gradients, points = [], [torch.tensor([1.0, -1.0, 2.0], dtype=FP64)]

    def recorded(theta):
        loss, gradient = valley(theta)
        gradients.append(gradient.clone())
        return loss, gradient

    point = points[0].clone()
    descent = Descent(point, 0.7, 9)
    for _ in range(9):
        descent.follow(recorded, 1)
        points.append(point.clone())
    moves = [after - before for before, after in zip(points[:-1], points[1:], strict=True)]
    for move, expected in zip(moves, adam(0.7, gradients), strict=True):
        torch.testing.assert_close(move, expected, rtol=1e-6, atol=1e-10)


def test_pieces_make_the_same_path_as_one():
    ends = []
    for pieces in ([8], [3, 5], [1] * 8):
        point, gradient = torch.zeros(3, dtype=FP64), noise()
        descent = Descent(point, 0.3, 8)
        for steps in pieces:
            descent.follow(gradient, steps)
        ends.append(point)
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_a_length_of_zero_stays_where_it_is():
    point = torch.tensor([1.0, 2.0, 3.0])
    Descent(point, 0.0, 5).follow(lambda theta: (0.0, torch.randn(3)), 5)
    assert torch.equal(point, torch.tensor([1.0, 2.0, 3.0]))


def test_gradients_that_are_noise_are_followed_less_far():
    point = torch.zeros(3, dtype=FP64)
    Descent(point, 1.0, 100).follow(noise(), 100)
    assert point.norm() / math.sqrt(3) < 0.3


def test_a_longer_descent_goes_further_down_a_valley():
    losses = []
    for length in (0.0, 0.2, 0.8):
        point = torch.zeros(3, dtype=FP64)
        Descent(point, length, 50).follow(valley, 50)
        losses.append(valley(point)[0])
    assert losses == sorted(losses, reverse=True)


def test_progress_counts_all_steps():
    told = []
    descent = Descent(torch.zeros(3, dtype=FP64), 0.1, 5)
    descent.follow(valley, 2, lambda *done: told.append(done))
    descent.follow(valley, 3, lambda *done: told.append(done))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert descent.taken == 5


@pytest.mark.parametrize(
    ("loss_and_grad", "message"),
    [
        (lambda theta: (math.nan, torch.ones(3)), "the loss is nan"),
        (lambda theta: (1.0, torch.tensor([1.0, math.nan, 1.0])), "a gradient or a weight is not finite"),
    ],
)
def test_what_is_not_finite_is_an_error(loss_and_grad, message):
    with pytest.raises(NonFiniteLossError, match=message):
        Descent(torch.zeros(3), 0.1, 4).follow(loss_and_grad, 4)


@pytest.mark.parametrize(("length", "steps"), [(-0.1, 3), (0.1, 0)])
def test_a_negative_length_and_no_step_are_refused(length, steps):
    with pytest.raises(ValueError, match="a length >= 0 and at least one step"):
        Descent(torch.zeros(3), length, steps)
