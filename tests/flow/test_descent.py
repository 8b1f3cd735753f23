import math

import pytest
import torch

from lightning_odem.flow import AdaptiveDescent, Euler, Heun, ReusedGradient, integrate

FP64 = torch.float64
ENDS = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 1.0]], dtype=FP64)
CURVATURE = torch.tensor([1.0, 4.0, 0.5], dtype=FP64)
SLOPE = torch.tensor([1.0, -30.0, 1e-3], dtype=FP64)


def valley(theta):
    """A quadratic loss around (3, 1.5, -2)."""
    offset = theta - torch.tensor([3.0, 1.5, -2.0], dtype=FP64)
    return float(CURVATURE @ offset.square()) / 2, CURVATURE * offset


def slope(theta):
    return float(SLOPE @ theta), SLOPE.clone()


def noise(seed=0):
    """A flat loss whose gradients are random."""
    generator = torch.Generator().manual_seed(seed)
    return lambda theta: (0.0, torch.randn(3, generator=generator, dtype=FP64))


class Still:
    """A rule that stays where it is."""

    order = 1

    def step(self, theta, velocity, t, h, evaluate):
        pass


class Watching:
    """Notes the point before and after the steps of a rule."""

    def __init__(self, rule):
        self.order, self.rule, self.points, self.times = rule.order, rule, [], []

    def step(self, theta, velocity, t, h, evaluate):
        before = theta.clone()
        self.rule.step(theta, velocity, t, h, evaluate)
        self.points.append((before, theta.clone()))
        self.times.append((t, h))


def adam(length, end, times, gradients, betas=(0.9, 0.99)):
    """The moves of Adam, from the definition, with a speed that falls linearly to zero at the end."""
    moves, mean, square = [], torch.zeros(3, dtype=FP64), torch.zeros(3, dtype=FP64)
    for k, ((t, h), gradient) in enumerate(zip(times, gradients, strict=True), start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        direction = mean / (1 - betas[0] ** k) / (square / (1 - betas[1] ** k)).sqrt()
        # The integral of 2 l / T (1 - s / T) from t to t + h.
        covered = length * ((1 - t / end) ** 2 - (1 - (t + h) / end) ** 2)
        moves.append(-covered * direction)
    return moves


@pytest.mark.parametrize("h", [0.05, 0.3, 0.07, 1.0])
@pytest.mark.parametrize("end", [0.1, 0.6, 0.95])
def test_constant_gradients_are_followed_over_the_whole_length_however_long_the_steps(h, end):
    """The last step is shorter where h does not divide the path."""
    path = integrate(*ENDS, slope, end, step_size=h, solver=AdaptiveDescent(Still(), 0.25, end))
    torch.testing.assert_close(path.theta, ENDS[0] - 0.25 * SLOPE.sign(), rtol=0, atol=1e-8)


def test_the_speed_falls_linearly_to_zero():
    rule = Watching(AdaptiveDescent(Still(), 0.25, 0.8))
    integrate(*ENDS, slope, 0.8, step_size=0.1, solver=rule)
    speeds = [float((before - after)[0]) / 0.1 for before, after in rule.points]
    assert speeds == pytest.approx([2 * 0.25 / 0.8 * (1 - (k + 0.5) / 8) for k in range(8)])


@pytest.mark.parametrize("transport", [Euler, Heun])
@pytest.mark.parametrize("loss_and_grad", [valley, noise()])
def test_every_step_is_the_transports_and_one_of_adam(transport, loss_and_grad):
    gradients = []

    def kept(theta):
        value, gradient = loss_and_grad(theta)
        gradients.append(gradient)
        return value, gradient

    inner = Watching(transport())
    outer = Watching(AdaptiveDescent(inner, 0.3, 0.75))
    path = integrate(*ENDS, kept, 0.75, step_size=0.1, solver=outer, loss=lambda _: 1.0)
    expected = adam(0.3, 0.75, outer.times, gradients[:: transport.order])
    found = [after - moved for (_, after), (_, moved) in zip(outer.points, inner.points, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert path.gradient_evaluations == 8 * transport.order


@pytest.mark.parametrize("rule", [Euler(), Heun(), ReusedGradient(Euler(), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, FP64])
def test_a_length_of_zero_is_the_rule_itself_bit_by_bit(rule, dtype):
    ends = ENDS.to(dtype)

    def loss_and_grad(theta):
        value, gradient = valley(theta.double())
        return value, gradient.to(dtype) * torch.tensor([1, 0, 1], dtype=dtype)

    expected = integrate(*ends, loss_and_grad, 0.7, solver=rule)
    path = integrate(*ends, loss_and_grad, 0.7, solver=AdaptiveDescent(rule, 0.0, 0.7))
    assert torch.equal(path.theta, expected.theta)
    assert path.as_dict() == expected.as_dict()


def test_a_path_to_time_1_ends_in_the_incoming_model_bit_by_bit():
    path = integrate(*ENDS, valley, 1.0, solver=AdaptiveDescent(Euler(), 0.5, 1.0))
    assert torch.equal(path.theta, ENDS[1])


def test_neither_gradients_nor_ends_are_written_to():
    ends, gradients = ENDS.clone(), []

    def kept(theta):
        gradients.append((SLOPE.clone(), SLOPE))
        return 0.0, gradients[-1][0]

    path = integrate(*ends, kept, 0.5, solver=AdaptiveDescent(Euler(), 0.3, 0.5))
    assert all(torch.equal(given, before) for given, before in gradients)
    assert torch.equal(ends, ENDS)
    assert path.theta.grad is None


def test_the_same_gradients_give_the_same_path():
    first, second = (
        integrate(*ENDS, noise(3), 0.6, solver=AdaptiveDescent(Euler(), 0.3, 0.6), loss=lambda _: 0.0).theta
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_adam_starts_afresh_with_every_path():
    rule = AdaptiveDescent(Euler(), 0.3, 0.6)
    first = integrate(*ENDS, valley, 0.6, solver=rule).theta
    before = first.clone()
    assert torch.equal(integrate(*ENDS, valley, 0.6, solver=rule).theta, first)
    assert torch.equal(first, before)


@pytest.mark.parametrize("end", [0.2, 0.5, 0.8])
def test_the_loss_of_a_valley_becomes_lower_the_longer_the_descent(end):
    losses = [
        integrate(*ENDS, valley, end, step_size=0.01, solver=AdaptiveDescent(Euler(), length, end)).loss[-1]
        for length in (0.0, 0.05, 0.1, 0.2)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


def test_gradients_that_are_noise_are_followed_less_far():
    moved = []
    for seed in range(20):
        rule = AdaptiveDescent(Still(), 1.0, 0.9)
        path = integrate(*ENDS, noise(seed), 0.9, step_size=0.01, solver=rule)
        moved.append((path.theta - ENDS[0]).square().mean())
    assert 0.0 < math.sqrt(torch.stack(moved).mean()) < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_no_entry_moves_by_more_than_its_bound(seed):
    """|mean| <= sqrt(sum of w1^2 / w2) sqrt(square): with decay rates 0.9 and 0.99 at most 2.35."""
    rule = AdaptiveDescent(Still(), 0.1, 0.9)
    path = integrate(*ENDS, noise(seed), 0.9, step_size=0.02, solver=rule)
    bound = 0.1 * math.sqrt(0.1**2 / 0.01 / (1 - 0.9**2 / 0.99))
    assert float((path.theta - ENDS[0]).abs().max()) <= bound


def test_descent_goes_once_per_gradient_where_gradients_are_reused():
    inner = Watching(Euler())
    outer = Watching(AdaptiveDescent(ReusedGradient(inner, 3), 0.3, 0.6))
    gradients = []

    def kept(theta):
        gradients.append(valley(theta)[1])
        return valley(theta)

    path = integrate(*ENDS, kept, 0.6, step_size=0.15, solver=outer, loss=lambda theta: valley(theta)[0])
    assert (len(inner.points), len(outer.points), path.gradient_evaluations) == (12, 4, 4)
    found = [after - moved for (_, after), (_, moved) in zip(outer.points, inner.points[2::3], strict=True)]
    for ours, theirs in zip(found, adam(0.3, 0.6, outer.times, gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"must not be negative, got length=-0.1"):
        AdaptiveDescent(Euler(), -0.1, 0.5)
