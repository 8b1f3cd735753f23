import math

import numpy as np
import pytest
import scipy.linalg
import torch
from vectors import MATRICES, SHAPES, make_context, make_models, merge_stream, unflatten

from lightning_odem.methods import DOPMerge
from lightning_odem.methods.dop import ProjectionLoss, descend, min_norm_weight, solve


def random_updates(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def loss_from_traces(weight, update):
    """tr(E^T A E) + tr(E B E^T) with A = D D^T and B = D^T D: the loss in full rank without a decomposition."""
    distance = weight - update
    return (distance.T @ update @ update.T @ distance).trace() + (distance @ update.T @ update @ distance.T).trace()


def adam_by_hand(old, new, alpha, steps, lr, smoothing):
    """The published optimisation with autograd for the gradients and the formulas of Adam."""
    weight, first, second = (old + new) / 2, torch.zeros_like(old), torch.zeros_like(old)
    for step in range(1, steps + 1):
        point = weight.clone().requires_grad_()
        losses = [loss_from_traces(point, update) for update in (old, new)]
        gradients = [torch.autograd.grad(loss, point)[0] for loss in losses]
        p, q = (gradient / loss.item() for gradient, loss in zip(gradients, losses, strict=True))
        # The foot of the perpendicular from 0 on the line through p and q.
        balance = min(max(float(((q - p) * q).sum() / (q - p).square().sum()), 0.001), 0.999)
        alpha = smoothing * alpha + (1 - smoothing) * balance
        gradient = alpha * gradients[0] + (1 - alpha) * gradients[1]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight - lr * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_the_loss_in_full_rank_is_a_trace_and_its_gradient_the_derivative(shape):
    update, weight = random_updates(*shape)
    loss, gradient = ProjectionLoss(update)(weight)
    point = weight.clone().requires_grad_()
    expected = loss_from_traces(point, update)
    expected.backward()
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(gradient, point.grad)


@pytest.mark.parametrize(("mass", "kept"), [(1.0, 4), (0.9, 3), (0.5, 2), (0.4, 1), (1e-9, 1)])
def test_directions_count_up_to_the_mass(mass, kept):
    loss = ProjectionLoss(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)), mass)
    assert (loss.left.shape[1], loss.right.shape[1]) == (kept, kept)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_does_not_decide_how_many_directions_count(seed):
    """6 is exactly three quarters of 6 + 2, in whatever basis."""
    bases = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, v = (torch.linalg.qr(basis).Q for basis in bases)
    update = torch.tensor([6.0, 2.0, 0.0, 0.0], dtype=torch.float64).diag()
    assert ProjectionLoss(u @ update @ v.T, 0.75).left.shape[1] == 1


def test_an_update_of_zero_has_no_loss():
    loss, gradient = ProjectionLoss(torch.zeros(3, 4))(torch.ones(3, 4))
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros(3, 4))


@pytest.mark.parametrize("seed", range(4))
def test_the_min_norm_weight_minimises_the_norm(seed):
    first, second = random_updates(5, seed=seed)
    grid = np.linspace(0.001, 0.999, 999)
    norms = [float((c * first + (1 - c) * second).norm()) for c in grid]
    assert min_norm_weight(first, second) == pytest.approx(grid[np.argmin(norms)], abs=1e-3)


@pytest.mark.parametrize(("second", "weight"), [([2.0, 0.0], 0.999), ([0.5, 0.0], 0.001), ([0.0, 0.0], 0.001)])
def test_the_min_norm_weight_stays_inside_the_interval(second, weight):
    assert min_norm_weight(torch.tensor([1.0, 0.0]), torch.tensor(second)) == weight


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_closed_form_solves_the_sylvester_equation(shape, alpha):
    old, new = (update.numpy() for update in random_updates(*shape))
    weights = (alpha, old), (1 - alpha, new)
    left, right = (sum(a * f(d) for a, d in weights) for f in (lambda d: d @ d.T, lambda d: d.T @ d))
    target = 2 * sum(a * d @ d.T @ d for a, d in weights)
    expected = scipy.linalg.solve_sylvester(left, right, target)
    torch.testing.assert_close(solve(torch.tensor(old), torch.tensor(new), alpha), torch.tensor(expected))


def test_the_closed_form_is_a_minimum():
    old, new = random_updates(4, 6)
    weight = solve(old, new, 0.7).requires_grad_()
    (0.7 * loss_from_traces(weight, old) + 0.3 * loss_from_traces(weight, new)).backward()
    torch.testing.assert_close(weight.grad, torch.zeros(4, 6, dtype=torch.float64))


def test_updates_in_orthogonal_directions_are_both_kept_by_the_closed_form():
    left, _ = torch.linalg.qr(random_updates(6, 6)[0])
    right, _ = torch.linalg.qr(random_updates(8, 8)[1])
    old = left[:, :2] @ torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)) @ right[:, :2].T
    new = left[:, 2:4] @ torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)) @ right[:, 2:4].T
    for alpha in (0.2, 0.8):
        torch.testing.assert_close(solve(old, new, alpha), old + new)


@pytest.mark.parametrize(("alpha", "kept"), [(1.0, 0), (0.0, 1)])
def test_the_closed_form_with_all_weight_on_one_model_is_that_model(alpha, kept):
    updates = random_updates(5, 5)
    torch.testing.assert_close(solve(*updates, alpha), updates[kept])


def test_faint_directions_do_not_spoil_the_closed_form():
    left, _ = torch.linalg.qr(random_updates(5, 5)[0])
    spectrum = torch.diag(torch.logspace(0, -12, 5, dtype=torch.float64))
    update = left @ spectrum @ left.T
    torch.testing.assert_close(solve(update, update, 0.5), update, rtol=1e-9, atol=1e-9)
    assert torch.equal(solve(torch.zeros(3, 4), torch.zeros(3, 4), 0.5), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"steps": 30}, {"alpha": 0.5, "lr": 1e-2, "smoothing": 0.9, "steps": 30}])
def test_adam_follows_the_published_optimisation(settings):
    base, models = make_models(2)
    published = {"alpha": 0.8, "lr": 1e-4, "smoothing": 0.999} | settings
    # In a small matrix 0.99999 keeps all directions.
    merged = merge_stream(DOPMerge(**settings), base, models)[-1]
    base, old, new, merged = (unflatten(vector) for vector in (base, *models, merged))
    for name in SHAPES:
        expected = (old[name] + new[name]) / 2
        if name in MATRICES:
            start, updates = base[name].flatten(1), [model[name].flatten(1) for model in (old, new)]
            moved = adam_by_hand(*(update - start for update in updates), **published)
            expected = (start + moved).view(SHAPES[name])
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)


def test_many_steps_of_adam_go_to_the_closed_form():
    updates = random_updates(4, 5)
    settings = {"lr": 3e-2, "smoothing": 1.0, "mass": 1.0}
    few, many = (descend(*updates, 0.6, steps=steps, **settings) for steps in (5, 400))
    exact = solve(*updates, 0.6)
    assert float((many - exact).norm()) < 0.01 * float((few - exact).norm())


@pytest.mark.parametrize("solver", ["adam", "sylvester"])
def test_other_parameters_are_the_plain_mean_or_the_running_average(solver):
    base, models = make_models(3)
    weights = [1.0, 3.0, 4.0]
    mean = unflatten(merge_stream(DOPMerge(solver=solver, steps=2), base, models, weights)[-1])
    average = DOPMerge(solver=solver, steps=2, others="average")
    average = unflatten(merge_stream(average, base, models, weights)[-1])
    first, second, third = (unflatten(model) for model in models)
    for name in SHAPES.keys() - set(MATRICES):
        torch.testing.assert_close(mean[name], first[name] / 4 + second[name] / 4 + third[name] / 2)
        torch.testing.assert_close(average[name], first[name] / 8 + 3 * second[name] / 8 + third[name] / 2)
    for name in MATRICES:
        assert torch.equal(mean[name], average[name])


def test_without_alpha_the_operating_time_weighs_the_models():
    base, models = make_models(2)
    context = make_context(base)
    timed = DOPMerge(alpha=None, solver="sylvester").merge(models[0].clone(), models[1], 0.3, context).theta
    fixed = DOPMerge(alpha=0.7, solver="sylvester").merge(models[0].clone(), models[1], 0.3, context).theta
    assert torch.equal(timed, fixed)
    same = [DOPMerge(solver="sylvester").merge(models[0].clone(), models[1], t, context).theta for t in (0.1, 0.9)]
    assert torch.equal(*same)


def test_layers_can_be_chosen():
    base, models = make_models(2)
    chosen = unflatten(merge_stream(DOPMerge(steps=5, layers=["tall"]), base, models)[-1])
    every = unflatten(merge_stream(DOPMerge(steps=5), base, models)[-1])
    mean = unflatten((models[0] + models[1]) / 2)
    for name in SHAPES:
        torch.testing.assert_close(chosen[name], (every if name == "tall.weight" else mean)[name])


def test_a_layer_that_no_model_moved_stays():
    base, models = make_models(2)
    for model in models:
        unmoved = slice(0, math.prod(SHAPES["conv.weight"]))
        model[unmoved] = base[unmoved]
    for solver in ("adam", "sylvester"):
        merged = merge_stream(DOPMerge(solver=solver, steps=5), base, models)[-1]
        assert torch.equal(merged[unmoved], base[unmoved])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"solver": "sgd"}, "solver is one of adam, sylvester, got 'sgd'"),
        ({"steps": 0}, r"steps must lie in \[1, inf\), got steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"smoothing": 1.1}, "smoothing=1.1"),
        ({"mass": 0.0}, "mass=0.0"),
        ({"others": "base"}, "others is one of mean, average, got 'base'"),
        ({"layers": "fc"}, "layers is a list of patterns"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DOPMerge(**settings)
