import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_odem.flow import constraints
from lightning_odem.flow.constraints import project_

FP64 = torch.float64


def problem(seed, count, d=9, scale=1.0):
    """A velocity, gradients and bounds that exclude the velocity but not everything."""
    generator = torch.Generator().manual_seed(seed)
    velocity = torch.randn(d, generator=generator, dtype=FP64)
    gradients = scale * torch.randn(count, d, generator=generator, dtype=FP64)
    bounds = -scale * torch.rand(count, generator=generator, dtype=FP64)
    return velocity, list(gradients.unbind()), bounds.tolist()


def by_scipy(velocity, gradients, bounds):
    start, g, b = velocity.numpy(), torch.stack(gradients).numpy(), np.array(bounds)
    result = minimize(
        lambda v: 0.5 * ((v - start) ** 2).sum(),
        start,
        jac=lambda v: v - start,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: b - g @ v, "jac": lambda v: -g},
        options={"ftol": 1e-14, "maxiter": 200},
    )
    assert result.success
    return torch.from_numpy(result.x)


def check_kkt(start, velocity, gradients, bounds, multipliers, rtol=1e-6):
    """Stationary, feasible, multipliers of one sign, and none where there is slack."""
    g, mu = torch.stack(gradients).to(FP64), torch.tensor(multipliers, dtype=FP64)
    torch.testing.assert_close(velocity.to(FP64), start.to(FP64) - mu @ g, rtol=rtol, atol=rtol)
    lengths = g.norm(dim=1).clamp(min=1e-300)
    slack = (torch.tensor(bounds, dtype=FP64) - g @ velocity.to(FP64)) / lengths
    assert (mu >= 0).all()
    assert (slack >= -rtol * start.norm()).all()
    assert (mu * lengths * slack).abs().max() <= rtol * start.norm() ** 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_nearest_feasible_velocity(seed, count):
    start, gradients, bounds = problem(seed, count)
    expected = by_scipy(start, gradients, bounds)
    velocity = start.clone()
    multipliers = project_(velocity, gradients, bounds)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    check_kkt(start, velocity, gradients, bounds, multipliers)


def test_a_feasible_velocity_stays_bit_by_bit():
    velocity = torch.tensor([-1.0, 0.3, 2.0])
    before = velocity.clone()
    assert project_(velocity, [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])], [-0.5, 0.5]) == [0.0, 0.0]
    assert torch.equal(velocity, before)


def test_one_constraint_takes_out_the_component_along_its_gradient():
    velocity = torch.tensor([3.0, 4.0], dtype=FP64)
    assert project_(velocity, [torch.tensor([2.0, 0.0], dtype=FP64)], [-1.0]) == pytest.approx([1.75])
    torch.testing.assert_close(velocity, torch.tensor([-0.5, 4.0], dtype=FP64))


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e-2, 1e6])
def test_gradients_of_any_length_keep_their_constraints(scale):
    """Multipliers are of the order 1 / scale; a tolerance that ignores it drops every constraint of a small one."""
    start, gradients, _ = problem(3, 3, d=50, scale=scale)
    velocity, bounds = start.clone(), [-20.0 * scale] * 3
    multipliers = project_(velocity, gradients, bounds)
    assert min(multipliers) > 0.1 / scale
    check_kkt(start, velocity, gradients, bounds, multipliers)
    expected = start.clone()
    project_(expected, problem(3, 3, d=50)[1], [-20.0] * 3)
    torch.testing.assert_close(velocity, expected)


def test_gradients_of_very_different_lengths_are_all_obeyed():
    start, gradients, _ = problem(1, 4)
    for gradient, scale in zip(gradients, (1e-6, 1.0, 1e6, 1e-3), strict=True):
        gradient *= scale
    velocity = start.clone()
    check_kkt(start, velocity, gradients, [0.0] * 4, project_(velocity, gradients, [0.0] * 4))


@pytest.mark.parametrize("difference", [0.0, 1e-12, 1e-8, 1e-5, 1e-2])
@pytest.mark.parametrize("bounds", [[-0.5, -0.5], [-0.5, -0.5 - 1e-9], [-0.1, -0.8]])
def test_nearly_equal_gradients_are_obeyed_together(difference, bounds):
    velocity, other, gradient = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=FP64).unbind()
    gradients = [gradient, gradient + difference * other]
    project_(velocity, gradients, bounds)
    for gradient, bound in zip(gradients, bounds, strict=True):
        assert float(gradient @ velocity) <= bound + 1e-6


def test_contradictory_constraints_leave_the_velocity():
    velocity, gradient = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    assert project_(velocity, [gradient, -gradient], [-1.0, -1.0]) == [0.0, 0.0]
    assert torch.equal(velocity, torch.tensor([1.0, 2.0]))


def test_opposite_constraints_that_agree_are_both_obeyed():
    velocity, gradient = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    project_(velocity, [gradient, -gradient], [1.0, -1.0])
    torch.testing.assert_close(velocity, torch.tensor([0.0, 1.0]))


def test_a_zero_gradient_does_not_stand_in_the_way_of_others():
    velocity = torch.tensor([1.0, 2.0])
    assert project_(velocity, [torch.zeros(2), torch.tensor([1.0, 0.0])], [-1.0, 0.0]) == [0.0, 1.0]
    assert torch.equal(velocity, torch.tensor([0.0, 2.0]))


def test_without_constraints_nothing_happens():
    velocity = torch.ones(2)
    assert project_(velocity, [], []) == []
    assert torch.equal(velocity, torch.ones(2))


def test_inner_products_are_accumulated_in_double_precision_over_blocks(monkeypatch):
    monkeypatch.setattr(constraints, "_BLOCK", 1000)
    size = 10_001
    velocity = torch.full((size,), 1.0)
    velocity[0] = 1e8  # in fp32 the ones after it would be lost
    project_(velocity, [torch.ones(size)], [0.0])
    assert float(velocity[1]) == pytest.approx(1.0 - (1e8 + 10_000) / size, rel=1e-6)
