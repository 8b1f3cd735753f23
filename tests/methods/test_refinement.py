import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.methods.refinement import refine
from lightning_odem.parameters.vector import ParameterVector

FP64 = torch.float64
SIZES = {"old": 30, "new": 12}


def linear_problem(batch_size=100, quota="equal"):
    """Squared loss of a linear model on two tasks that disagree."""
    net, generator = nn.Linear(4, 1, bias=False).double(), torch.Generator().manual_seed(3)
    buffer = CalibrationBuffer(100, quota=quota)
    for scale, (task, size) in enumerate(SIZES.items(), start=1):
        inputs = torch.randn(size, 4, generator=generator, dtype=FP64)
        buffer.add(task, (inputs, scale * inputs.sum(1, keepdim=True)), weight=float(scale))
    return CalibrationObjective(
        ParameterVector(net), buffer, lambda batch: mse_loss(net(batch.samples[0]), batch.samples[1]), batch_size
    )


def task_loss(objective, theta, task):
    inputs, targets = next(batch.samples for batch in objective.buffer.micro_batches(100) if batch.task == task)
    return (inputs @ theta - targets.flatten()).square().mean()


def start():
    return torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=FP64)


@pytest.mark.parametrize("quota", ["equal", "utility"])
@pytest.mark.parametrize("radius", [1.0, 0.01])
def test_it_is_adam_with_an_anchor_in_a_ball(quota, radius):
    """Batches that hold all samples, so that chance decides only their order."""
    objective = linear_problem(quota=quota)
    shares = objective.buffer.shares()
    theta, first, second, points = start(), torch.zeros(4, dtype=FP64), torch.zeros(4, dtype=FP64), []
    for step in range(1, 13):
        point = theta.clone().requires_grad_()
        anchor = 0.5 * (point - start()).square().sum() / start().square().sum()
        loss = sum(share * task_loss(objective, point, task) for task, share in shares.items()) + anchor
        (gradient,) = torch.autograd.grad(loss, point)
        gradient = gradient / max(float(gradient.norm()), 1.0)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        theta = theta - 0.02 * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        offset = theta - start()
        theta = start() + offset * min(1.0, float(radius * start().norm() / offset.norm()))
        points.append(theta)
    best = min(
        points, key=lambda theta: sum(share * task_loss(objective, theta, task) for task, share in shares.items())
    )
    found = refine(start(), objective, steps=12, lr=0.02, radius=radius, penalty=0.5, rise=100.0)
    torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-9)


def test_a_start_that_is_best_is_returned_bit_by_bit():
    objective = linear_problem()
    samples = [(batch.samples, len(batch.samples[1])) for batch in objective.micro_batches()]
    matrix = sum(x.T @ x / size for (x, _), size in samples)
    target = sum(x.T @ y / size for (x, y), size in samples)
    minimum = torch.linalg.solve(matrix, target).flatten()
    assert torch.equal(refine(minimum, objective, steps=5, lr=0.01), minimum)


def test_no_task_gets_worse_than_allowed_though_the_mean_would_gain():
    objective = linear_problem()
    best_for_old = torch.ones(4, dtype=FP64)
    found = refine(best_for_old, objective, steps=30, lr=0.02, radius=1.0)
    unbounded = refine(best_for_old, objective, steps=30, lr=0.02, radius=1.0, rise=10.0)
    rises = [
        float(task_loss(objective, theta, "old") - task_loss(objective, best_for_old, "old"))
        for theta in (found, unbounded)
    ]
    assert 0.0 < rises[0] <= 0.02 < rises[1]
    assert task_loss(objective, found, "new") < task_loss(objective, best_for_old, "new")


def test_a_step_costs_one_random_batch_of_every_task_and_one_pass():
    objective = linear_problem(batch_size=10)
    refine(start(), objective, steps=7)
    assert objective.gradient_evaluations == 7
    assert objective.sample_gradients == 7 * 20
    assert objective.loss_evaluations == 7 + 1


def test_the_random_batches_change_from_step_to_step_and_come_again_in_another_run():
    drawn = []
    for _ in range(2):
        objective = linear_problem(batch_size=10)
        plain = objective.loss_and_grad

        def watched(theta, batches, plain=plain):
            drawn.append(torch.cat([batch.samples[1] for batch in batches]))
            return plain(theta, batches)

        objective.loss_and_grad = watched
        result = refine(start(), objective, steps=3)
    assert torch.equal(result, refine(start(), linear_problem(batch_size=10), steps=3))
    assert all(torch.equal(drawn[index], drawn[index + 3]) for index in range(3))
    assert not torch.equal(drawn[0], drawn[1])
