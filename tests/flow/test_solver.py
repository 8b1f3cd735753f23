import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from lightning_odem.flow import (
    Heun,
    NonFiniteLossError,
    RectifiedField,
    TransportField,
    integrate,
)

FP64 = torch.float64
GRANULARITIES = {"vector": "vector", "blocks": torch.tensor([1, 3, 1, 2]), "coordinate": "coordinate"}
every_granularity = pytest.mark.parametrize("blocks", GRANULARITIES.values(), ids=GRANULARITIES.keys())


def vectors(d=7, seed=0, dtype=FP64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, d, generator=generator, dtype=FP64).to(dtype).unbind()


def linear(slope):
    return lambda theta: (slope.dot(theta), slope)


def quadratic(matrix, centre):
    def loss_and_grad(theta):
        residual = theta - centre
        return 0.5 * residual.dot(matrix @ residual), matrix @ residual

    return loss_and_grad


def spd(d, seed):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=FP64)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=FP64)


def rough(d, seed):
    """A non-convex loss: random waves on a quadratic bowl."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(5, d, generator=generator, dtype=FP64)
    phases = 6.28 * torch.rand(5, generator=generator, dtype=FP64)

    def loss_and_grad(theta):
        angles = waves @ theta + phases
        return 0.05 * theta.dot(theta) + angles.sin().sum(), 0.1 * theta + waves.T @ angles.cos()

    return loss_and_grad


def reference(theta0, theta1, loss_and_grad, t_end):
    """The rectified flow of eq. 10-14 written out again, in scipy at rtol 1e-10."""
    delta = float(loss_and_grad(theta1)[0] - loss_and_grad(theta0)[0])

    def velocity(t, point):
        g = loss_and_grad(torch.from_numpy(point))[1].numpy()
        u = (theta1.numpy() - point) / (1 - t)
        if g @ u <= 0:
            return u
        parallel = (u @ g) / (g @ g) * g
        return (u - parallel) + np.clip(delta / (g @ u), 0, 1) * parallel

    solution = solve_ivp(velocity, (0, t_end), theta0.numpy(), rtol=1e-10, atol=1e-13, method="DOP853")
    assert solution.success
    return torch.from_numpy(solution.y[:, -1])


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_without_rectification_the_path_is_the_straight_line(solver):
    theta0, theta1 = vectors()
    for t_end in (0.05, 1 / 3, 0.5, 0.97):
        path = integrate(theta0, theta1, rough(7, 1), t_end, field=TransportField(), solver=solver)
        torch.testing.assert_close(path.theta, (1 - t_end) * theta0 + t_end * theta1, rtol=1e-13, atol=1e-13)
        assert path.gamma == [1.0] * len(path.gamma)


def test_a_linear_loss_that_rises_is_followed_on_the_straight_line():
    # <g, u> equals delta L everywhere on the line, so eq. 14 gives gamma = 1.
    theta0, theta1 = vectors()
    slope = theta1 - theta0
    path = integrate(theta0, theta1, linear(slope), 0.8)
    torch.testing.assert_close(path.theta, 0.2 * theta0 + 0.8 * theta1, rtol=1e-12, atol=1e-12)
    assert path.gamma == pytest.approx([1.0] * 16)
    assert path.barrier == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_function_may_return_a_tensor_it_keeps():
    theta0, theta1 = vectors()
    slope = torch.ones(7, dtype=FP64)
    integrate(theta0, theta1, linear(slope), 0.5, solver="heun")
    assert torch.equal(slope, torch.ones(7, dtype=FP64))


def hill(seed):
    """A concave quadratic loss, which rises from theta0 more steeply than delta L, so that damping sets in at once."""
    centre = torch.randn(7, generator=torch.Generator().manual_seed(100 + seed), dtype=FP64)
    return quadratic(-spd(7, seed), centre)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(("seed", "regime"), [(0, "budgeted"), (16, "budgeted"), (6, "forbidden"), (11, "forbidden")])
def test_the_observed_order_is_the_solvers_own_where_the_field_is_smooth(solver, order, seed, regime):
    theta0, theta1 = vectors(seed=seed)
    exact = reference(theta0, theta1, hill(seed), 0.5)
    paths = [integrate(theta0, theta1, hill(seed), 0.5, step_size=0.5 / n, solver=solver) for n in (32, 64, 128)]
    for path in paths:  # one branch of gamma all along: no kink in the field
        assert all(0 < gamma < 1 for gamma in path.gamma) if regime == "budgeted" else set(path.gamma) == {0.0}
    errors = [(path.theta - exact).norm().item() for path in paths]
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([order] * 2, abs=0.2)
    assert errors[-1] > 1e-10  # an error that is all rounding would show no order


@pytest.mark.parametrize("seed", range(4))
def test_small_steps_reach_the_reference_on_quadratic_losses(seed):
    theta0, theta1 = vectors(seed=seed)
    loss_and_grad = quadratic(
        spd(7, seed), torch.randn(7, generator=torch.Generator().manual_seed(9 + seed), dtype=FP64)
    )
    exact = reference(theta0, theta1, loss_and_grad, 0.6)
    path = integrate(theta0, theta1, loss_and_grad, 0.6, step_size=2e-3, solver=Heun())
    torch.testing.assert_close(path.theta, exact, rtol=0, atol=2e-3 * (theta1 - theta0).norm().item())


@pytest.mark.parametrize("seed", range(6))
def test_the_envelope_of_theorem_3_4_holds_in_the_small_step_limit(seed):
    theta0, theta1 = (2 * vector for vector in vectors(seed=seed))
    excess = [integrate(theta0, theta1, rough(7, seed), 0.9, step_size=h).envelope_excess for h in (2e-2, 4e-3, 8e-4)]
    assert all(value >= 0 for value in excess)
    assert excess[-1] < 4e-2
    assert excess[-1] <= max(excess[0] / 5, 1e-9)  # first order: at least linear in h over a factor of 25


def indefinite(seed):
    """A quadratic loss with curvature of both signs."""
    root = torch.randn(7, 7, generator=torch.Generator().manual_seed(50 + seed), dtype=FP64)
    return quadratic(root + root.T, torch.randn(7, generator=torch.Generator().manual_seed(9 + seed), dtype=FP64))


@every_granularity
def test_no_step_outruns_the_budget_in_the_small_step_limit(blocks):
    """dL/dt <= max(delta L, 0), the step to Theorem 3.4; Euler's own error is of first order in h."""

    def excess(seed, h):
        path = integrate(*vectors(seed=seed), indefinite(seed), 0.8, step_size=h, field=RectifiedField(blocks))
        steps = zip(path.loss, path.loss[1:], path.t, path.t[1:], strict=False)
        return max((after - before) / (t1 - t0) for before, after, t0, t1 in steps) - max(path.delta_loss, 0.0)

    coarse, fine = ([excess(seed, h) for seed in range(6)] for h in (2e-2, 4e-3))
    assert max(coarse) > 0.1
    assert all(after <= max(before / 4.5, 1e-9) for before, after in zip(coarse, fine, strict=True))


@every_granularity
@pytest.mark.parametrize("seed", range(3))
def test_the_envelope_holds_for_every_granularity_up_to_an_error_of_first_order(blocks, seed):
    # Waves that are steepest where the path begins and rise along every entry: the budget is used up at once.
    generator = torch.Generator().manual_seed(seed)
    height, theta1 = 0.5 + torch.rand(2, 7, generator=generator, dtype=FP64)

    def loss_and_grad(theta):
        phase = 4 * theta - 1
        return height @ (theta + phase.sin()), height * (1 + 4 * phase.cos())

    paths = [
        integrate(torch.zeros(7, dtype=FP64), theta1, loss_and_grad, 0.9, step_size=h, field=RectifiedField(blocks))
        for h in (2e-2, 1e-2, 5e-3)
    ]
    excess = [path.envelope_excess for path in paths]
    assert [math.log2(coarse / fine) for coarse, fine in zip(excess, excess[1:], strict=False)] == pytest.approx(
        [1.0, 1.0], abs=0.1
    )
    assert excess[-1] < 0.01 * paths[-1].delta_loss


@every_granularity
@pytest.mark.parametrize("seed", range(4))
def test_random_waves_keep_the_envelope_at_every_granularity(blocks, seed):
    theta0, theta1 = (2 * vector for vector in vectors(seed=seed))
    path = integrate(theta0, theta1, rough(7, seed), 0.9, step_size=1e-3, field=RectifiedField(blocks))
    assert path.envelope_excess < 1e-2
    assert max(path.damped_share) > 0.3


@every_granularity
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_loss_that_falls_along_every_entry_is_followed_on_the_straight_line(blocks, solver):
    theta0, theta1 = vectors()
    path = integrate(theta0, theta1, linear(theta0 - theta1), 0.8, field=RectifiedField(blocks), solver=solver)
    torch.testing.assert_close(path.theta, 0.2 * theta0 + 0.8 * theta1, rtol=1e-12, atol=1e-12)
    assert (path.gamma, path.damped_share) == ([1.0] * 16, [0.0] * 16)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_order_is_the_solvers_own_with_blocks(solver, order):
    # One loss per entry, all rising: every entry is damped by the same factor, whose flow is smooth.
    theta0, theta1 = torch.zeros(3, dtype=FP64), torch.tensor([1.0, 0.8, 0.6], dtype=FP64)

    def concave(theta):
        return float((4 * theta - theta.square()).sum()), 4 - 2 * theta

    def end(n):
        field = RectifiedField("coordinate")
        return integrate(theta0, theta1, concave, 0.5, step_size=0.5 / n, solver=solver, field=field)

    ends = [end(n) for n in (16, 32, 64, 128)]
    assert all(0 < gamma < 1 for gamma in ends[0].gamma)
    steps = [(a.theta - b.theta).norm().item() for a, b in zip(ends, ends[1:], strict=False)]
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(steps, steps[1:], strict=False)]
    assert min(slopes) > order - 0.1


def test_the_straight_line_leaves_that_envelope_on_the_same_losses():
    excess = [
        integrate(
            *(2 * v for v in vectors(seed=seed)), rough(7, seed), 0.9, step_size=4e-3, field=TransportField()
        ).envelope_excess
        for seed in range(6)
    ]
    assert max(excess) > 0.5


def test_time_zero_leaves_the_merged_model_untouched():
    theta0, theta1 = vectors(dtype=torch.float32)
    path = integrate(theta0, theta1, quadratic(torch.eye(7), torch.zeros(7)), 0.0)
    assert torch.equal(path.theta, theta0)
    assert (path.t, path.gamma, path.gradient_evaluations) == ([0.0], [], 0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("step_size", [0.05, 0.3, 1.0])
def test_time_one_arrives_at_the_incoming_model(solver, step_size):
    theta0, theta1 = vectors(seed=3)
    path = integrate(theta0, theta1, rough(7, 3), 1.0, step_size=step_size, solver=solver)
    assert torch.equal(path.theta, theta1)
    assert path.t[-1] == 1.0


@pytest.mark.parametrize(
    ("t_end", "step_size", "steps"),
    [(0.5, 0.05, 10), (0.15, 0.05, 3), (1 / 3, 0.05, 7), (0.3, 0.1, 3), (0.125, 0.05, 3), (0.05, 1.0, 1)],
)
def test_the_last_step_is_shortened_to_end_exactly_at_the_operating_time(t_end, step_size, steps):
    theta0, theta1 = vectors()
    path = integrate(theta0, theta1, linear(theta1 - theta0), t_end, step_size=step_size)
    assert len(path.gamma) == path.gradient_evaluations == steps
    assert path.t[:-1] == [step * step_size for step in range(steps)]
    assert path.t[-1] == t_end
    torch.testing.assert_close(path.theta, (1 - t_end) * theta0 + t_end * theta1, rtol=1e-12, atol=1e-12)


def test_heun_takes_two_gradients_per_step():
    theta0, theta1 = vectors()
    assert integrate(theta0, theta1, rough(7, 0), 0.5, solver="heun").gradient_evaluations == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_its_input(dtype):
    theta0, theta1 = vectors(dtype=dtype)
    path = integrate(theta0, theta1, quadratic(spd(7, 0).to(dtype), theta1), 0.4)
    assert path.theta.dtype == dtype


def test_single_and_double_precision_agree_to_single_precision():
    theta0, theta1 = vectors(d=5000, dtype=torch.float32)
    matrix = torch.linspace(0.1, 2, 5000, dtype=FP64)

    def loss_and_grad(theta):
        return 0.5 * (matrix.to(theta.dtype) * theta).dot(theta), matrix.to(theta.dtype) * theta

    single = integrate(theta0, theta1, loss_and_grad, 0.5)
    double = integrate(theta0.double(), theta1.double(), loss_and_grad, 0.5)
    torch.testing.assert_close(single.theta.double(), double.theta, rtol=0, atol=2e-6)
    assert single.gamma == pytest.approx(double.gamma, abs=1e-4)


def test_a_zero_gradient_leaves_the_transport_free():
    theta0, theta1 = vectors()
    path = integrate(theta0, theta1, lambda theta: (1.0, torch.zeros_like(theta)), 0.5)
    torch.testing.assert_close(path.theta, (theta0 + theta1) / 2)
    assert path.gamma == [1.0] * 10
    assert path.alignment_ratio == [0.0] * 10


def test_equal_models_stay_where_they_are():
    theta0, _ = vectors()
    path = integrate(theta0, theta0.clone(), rough(7, 0), 0.5)
    torch.testing.assert_close(path.theta, theta0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_stops_with_its_step_and_time(bad):
    theta0, theta1 = vectors()
    calls = []

    def loss_and_grad(theta):
        calls.append(1)
        return (bad if len(calls) == 5 else 1.0), torch.ones_like(theta)

    before = theta0.clone()
    with pytest.raises(NonFiniteLossError, match=r"the loss is (nan|inf) at step 3 \(t = 0.15\)") as error:
        integrate(theta0, theta1, loss_and_grad, 0.5)
    assert error.value.step == 3
    assert torch.equal(theta0, before)


@every_granularity
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entry", range(7))
def test_a_non_finite_gradient_stops_the_path(blocks, bad, entry):
    theta0, theta1 = vectors()
    gradient = torch.ones(7, dtype=FP64)
    gradient[entry] = bad
    with pytest.raises(NonFiniteLossError, match="at step 0"):
        integrate(theta0, theta1, lambda theta: (1.0, gradient), 0.5, field=RectifiedField(blocks))


def test_a_non_finite_incoming_loss_is_found_before_the_first_step():
    theta0, theta1 = vectors()
    with pytest.raises(NonFiniteLossError, match="incoming model is nan"):
        integrate(theta0, theta1, linear(torch.ones(7, dtype=FP64)), 0.5, loss=lambda theta: math.nan)


@pytest.mark.parametrize("t_end", [-0.1, 1.1, math.nan])
def test_an_operating_time_outside_the_unit_interval_is_refused(t_end):
    with pytest.raises(ValueError, match="t_end="):
        integrate(*vectors(), rough(7, 0), t_end)


@pytest.mark.parametrize("step_size", [0.0, -0.1, 1.5, math.nan])
def test_a_step_size_outside_its_interval_is_refused(step_size):
    with pytest.raises(ValueError, match="step_size="):
        integrate(*vectors(), rough(7, 0), 0.5, step_size=step_size)


def test_an_unknown_solver_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'rk4'; the solvers are euler, heun"):
        integrate(*vectors(), rough(7, 0), 0.5, solver="rk4")


def test_vectors_that_do_not_match_are_refused():
    theta0, theta1 = vectors()
    with pytest.raises(ValueError, match="must agree in shape"):
        integrate(theta0, theta1[:-1], rough(7, 0), 0.5)
    with pytest.raises(ValueError, match="flat floating-point"):
        integrate(theta0.long(), theta1.long(), rough(7, 0), 0.5)


def test_integrating_in_the_memory_of_theta0_gives_the_same_path():
    theta0, theta1 = vectors()
    expected = integrate(theta0, theta1, rough(7, 2), 0.5)
    in_place = integrate(theta0, theta1, rough(7, 2), 0.5, out=theta0)
    assert in_place.theta is theta0
    assert torch.equal(in_place.theta, expected.theta)


def test_progress_is_told_before_the_first_and_after_every_step():
    told = []
    integrate(*vectors(), rough(7, 0), 0.15, on_step=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_user_field_decides_the_path():
    class Frozen(RectifiedField):
        def gamma(self, rise, delta_loss):
            return 0.0

    theta0, theta1 = vectors()
    slope = theta1 - theta0
    path = integrate(theta0, theta1, linear(slope), 0.5, field=Frozen())
    torch.testing.assert_close(path.theta, theta0)  # the whole transport is along the gradient
    assert path.alignment_ratio == pytest.approx([1.0] * 10)
