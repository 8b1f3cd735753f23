import math

import pytest
import torch

from lightning_odem.flow import RectifiedField, StepControl, integrate

FP64 = torch.float64


def waves(seed=0, d=7):
    """Two points and a non-convex loss on the way."""
    generator = torch.Generator().manual_seed(seed)
    theta0, theta1 = 2 * torch.randn(2, d, generator=generator, dtype=FP64)
    angles = torch.randn(5, d, generator=generator, dtype=FP64)

    def loss_and_grad(theta):
        phases = angles @ theta
        return 5.0 + 0.05 * theta.dot(theta) + phases.sin().sum(), 0.1 * theta + angles.T @ phases.cos()

    return theta0, theta1, loss_and_grad


def test_the_bands_of_the_excess_decide_on_the_next_length():
    control = StepControl(tolerance=0.1)
    assert [control.factor(excess, scale=2.0) for excess in (0.21, 0.2, 0.11, 0.1, -5.0)] == [0.5, 1.0, 1.0, 1.5, 1.5]


@pytest.mark.parametrize(
    "settings", [{"tolerance": 0.0}, {"shrink": 1.0}, {"shrink": 0.0}, {"grow": 0.9}, {"smallest": 0.0}]
)
def test_numbers_outside_their_ranges_are_refused(settings):
    with pytest.raises(ValueError, match=r"got StepControl\("):
        StepControl(**settings)


def test_steps_grow_where_the_loss_falls_and_end_exactly():
    theta0, theta1 = torch.zeros(3, dtype=FP64), torch.ones(3, dtype=FP64)
    path = integrate(
        theta0, theta1, lambda x: (-x.sum(), -torch.ones_like(x)), 0.5, step_size=0.1, control=StepControl()
    )
    assert path.t == pytest.approx([0.0, 0.1, 0.25, 0.475, 0.5])
    assert (path.t[-1], path.rejected_t) == (0.5, [])
    torch.testing.assert_close(path.theta, 0.5 * theta1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_every_step_that_is_not_the_shortest_stays_within_the_tolerance(seed, solver):
    *ends, loss_and_grad = waves(seed)
    control = StepControl(tolerance=0.01, smallest=1e-3)
    path = integrate(*ends, loss_and_grad, 0.8, step_size=0.2, control=control, solver=solver)
    assert path.t[-1] == 0.8
    allowed = 0.01 * max(abs(path.loss[0]), abs(path.loss1))
    lengths = [after - before for before, after in zip(path.t, path.t[1:], strict=False)]
    for length, loss, bound in zip(lengths, path.loss[1:], path.envelope[1:], strict=True):
        assert loss <= bound + allowed or length <= 0.2e-3 * (1 + 1e-9)


def test_rejected_steps_are_kept_as_data_and_cost_no_gradient():
    rejected = 0
    for seed in range(6):
        *ends, loss_and_grad = waves(seed)
        path = integrate(*ends, loss_and_grad, 0.8, step_size=0.4, control=StepControl())
        rejected += len(path.rejected_t)
        assert path.gradient_evaluations == len(path.gamma) == len(path.t) - 1
        bound = [path.loss[0] + t * max(path.delta_loss, 0.0) for t in path.rejected_t]
        assert all(loss > limit for loss, limit in zip(path.rejected_loss, bound, strict=True))
        assert path.as_dict().get("rejected_t", []) == path.rejected_t
    assert rejected > 3


def test_after_a_rejection_the_path_goes_on_from_where_it_was():
    """Euler's rule written out on the accepted times."""
    theta0, theta1, loss_and_grad = waves(1)
    path = integrate(theta0, theta1, loss_and_grad, 0.8, step_size=0.4, control=StepControl())
    assert path.rejected_t
    theta, field = theta0.clone(), RectifiedField()
    for t, t_next, loss in zip(path.t, path.t[1:], path.loss, strict=False):
        value, grad = loss_and_grad(theta)
        assert float(value) == loss
        field(t, theta, theta1, grad, path.delta_loss).add_to(theta, t_next - t)
    assert torch.equal(theta, path.theta)


@pytest.mark.parametrize("seed", range(3))
def test_a_tight_tolerance_keeps_the_envelope_where_steps_of_the_same_length_leave_it(seed):
    *ends, loss_and_grad = waves(seed)
    coarse = integrate(*ends, loss_and_grad, 0.8, step_size=0.4)
    control = StepControl(tolerance=1e-3, smallest=1e-4)
    fine = integrate(*ends, loss_and_grad, 0.8, step_size=0.4, control=control)
    assert fine.envelope_excess <= max(0.1 * coarse.envelope_excess, 0.05)


def test_the_ends_of_the_unit_interval_are_exact():
    theta0, theta1, loss_and_grad = waves(2)
    still = integrate(theta0, theta1, loss_and_grad, 0.0, control=StepControl())
    assert torch.equal(still.theta, theta0)
    assert (still.t, still.gradient_evaluations) == ([0.0], 0)
    assert torch.equal(integrate(theta0, theta1, loss_and_grad, 1.0, control=StepControl()).theta, theta1)


def test_a_path_that_no_step_can_keep_below_the_envelope_arrives():
    """The gradient is wrong, so no step is short enough."""
    path = integrate(
        torch.zeros(2, dtype=FP64), torch.ones(2, dtype=FP64),
        lambda x: (1.0 + 9 * x.sum() * (1 - x.mean()), torch.zeros_like(x)), 0.5, control=StepControl(smallest=0.25),
    )  # fmt: skip
    assert path.t[-1] == 0.5
    assert path.rejected_t
    assert min(after - before for before, after in zip(path.t, path.t[1:], strict=False)) > 0.012
    assert path.envelope_excess > 1.0


def test_progress_ends_at_the_number_of_steps():
    *ends, loss_and_grad = waves(1)
    told = []
    path = integrate(
        *ends, loss_and_grad, 0.8, step_size=0.4, control=StepControl(), on_step=lambda *step: told.append(step)
    )
    steps = len(path.gamma)
    assert [done for done, _ in told] == list(range(steps + 1))
    assert told[-1] == (steps, steps)


def test_a_controlled_step_to_a_non_finite_loss_stops_the_path():
    def loss(theta):
        return math.nan if theta[0] > 0.3 and theta[0] < 0.9 else 1.0

    ends = torch.zeros(1, dtype=FP64), torch.ones(1, dtype=FP64)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        integrate(*ends, lambda x: (loss(x), torch.zeros_like(x)), 0.5, loss=loss, control=StepControl())
