import pytest
import torch

from lightning_odem.flow import Euler, Heun, ReusedGradient, integrate

FP64 = torch.float64
ENDS = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 1.0]], dtype=FP64)


def hill(theta):
    return float(-0.5 * theta.dot(theta) + theta.sum()), 1 - theta


def slope(theta):
    return float(theta[0]) + 2 * float(theta[1]), torch.tensor([1.0, 2.0, 0.0], dtype=FP64)


@pytest.mark.parametrize("rule", [Euler(), Heun()])
def test_a_gradient_that_never_changes_can_be_reused_without_loss(rule):
    reused = integrate(*ENDS, slope, 0.6, step_size=0.3, solver=ReusedGradient(rule, 3))
    fine = integrate(*ENDS, slope, 0.6, step_size=0.1, solver=rule)
    torch.testing.assert_close(reused.theta, fine.theta, rtol=1e-13, atol=1e-13)
    assert reused.gradient_evaluations == 2
    assert fine.gradient_evaluations >= 6


def test_only_the_gradient_is_old():
    theta0, theta1 = ENDS
    path = integrate(theta0, theta1, hill, 0.4, step_size=0.4, solver=ReusedGradient(Euler(), 2))
    gradient, budget = hill(theta0)[1], max(hill(theta1)[0] - hill(theta0)[0], 0.0)
    theta = theta0.clone()
    for t in (0.0, 0.2):
        u = (theta1 - theta) / (1 - t)
        rise = float(gradient @ u)
        gamma = min(budget / rise, 1.0) if rise > 0 else 1.0
        theta += 0.2 * (u - (1 - gamma) * max(rise, 0.0) / float(gradient @ gradient) * gradient)
    torch.testing.assert_close(path.theta, theta, rtol=1e-13, atol=1e-13)


def test_one_use_is_the_rule_itself():
    plain = integrate(*ENDS, hill, 0.7)
    assert torch.equal(integrate(*ENDS, hill, 0.7, solver=ReusedGradient(Euler(), 1)).theta, plain.theta)


def test_shorter_groups_come_closer_to_a_gradient_at_every_step():
    exact = integrate(*ENDS, hill, 0.8, step_size=0.01).theta
    errors = [
        (integrate(*ENDS, hill, 0.8, step_size=0.01 * n, solver=ReusedGradient(Euler(), n)).theta - exact).norm()
        for n in (16, 4, 2)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_a_gradient_has_to_be_used():
    with pytest.raises(ValueError, match="times=0"):
        ReusedGradient(Euler(), 0)
