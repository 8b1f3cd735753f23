import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import MergeContext, Minibatches, PaperODEMerge
from lightning_odem.methods.became import became_time, laplace_time
from lightning_odem.methods.needs import Calibration
from lightning_odem.parameters.vector import ParameterVector

FP64 = torch.float64
D = 12
WEIGHTS = {"a": 1.0, "b": 3.0, "new": 2.0}
T = 1 / 3  # of the weights
SLOPES = {"a": torch.linspace(0.5, 2, D, dtype=FP64), "b": torch.linspace(3, 1, D, dtype=FP64)}
SLOPES["new"] = torch.linspace(0.1, 4, D, dtype=FP64)


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(D, dtype=FP64))


def make_objective(tasks=tuple(SLOPES), weights=WEIGHTS):
    """Sample i of a task has the loss s_i theta_i^2 / 2: gradients of two samples never meet in an entry."""
    module, buffer = Point(), CalibrationBuffer(100)
    for task in tasks:
        buffer.add(task, (torch.diag(SLOPES[task]),), weight=weights[task])
    loss = lambda batch: (batch.samples[0] @ module.theta.square() / 2).mean()  # noqa: E731
    return CalibrationObjective(ParameterVector(module), buffer, loss)


def models():
    return torch.linspace(1, 2, D, dtype=FP64), torch.linspace(-1, 3, D, dtype=FP64)


@pytest.mark.parametrize(("t", "old", "new"), [(0.5, 1.0, 1.0), (0.25, 3.0, 0.4), (0.8, 0.1, 7.0)])
def test_it_is_the_minimum_of_the_weighted_parabolas(t, old, new):
    found = minimize_scalar(lambda a: (1 - t) * old * a**2 / 2 + t * new * (1 - a) ** 2 / 2, (0.0, 1.0), tol=1e-12)
    assert laplace_time(t, old, new) == pytest.approx(found.x, abs=1e-7)


def test_three_tasks_with_exact_curvatures_are_merged_at_the_minimum_of_their_sum():
    """Quadratic losses with their minima in the two models: a* is where their weighted sum is lowest."""
    theta0, theta1 = models()
    curvature = {task: slope.square() for task, slope in SLOPES.items()}

    def total(a):
        point = torch.lerp(theta0, theta1, a)
        centre = {"a": theta0, "b": theta0, "new": theta1}
        return sum(WEIGHTS[k] * float((curvature[k] * (point - centre[k]).square()).sum()) / 2 for k in SLOPES)

    quadratic = {task: float((c * (theta1 - theta0).square()).sum()) for task, c in curvature.items()}
    old = (quadratic["a"] + 3 * quadratic["b"]) / 4
    best = minimize_scalar(total, (0.0, 1.0), tol=1e-12).x
    assert laplace_time(T, old, quadratic["new"]) == pytest.approx(best, abs=1e-7)


def test_the_fisher_information_is_that_of_the_old_tasks_at_merged_and_of_the_new_at_incoming():
    theta0, theta1 = models()
    d = theta1 - theta0

    def curvature(task, theta):  # gradients of sample i: s_i theta_i in entry i, zero elsewhere
        return float((d * SLOPES[task] * theta).square().sum()) / D

    old = WEIGHTS["a"] * curvature("a", theta0) + WEIGHTS["b"] * curvature("b", theta0)
    new = WEIGHTS["new"] * curvature("new", theta1)
    objective = make_objective()
    assert became_time(objective, theta0, theta1, T) == pytest.approx(new / (old + new))
    assert objective.sample_gradients == 3 * D


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_stay_and_cost_nothing(t):
    objective = make_objective()
    assert became_time(objective, *models(), t) == t
    assert objective.gradient_evaluations == 0


def test_flat_losses_leave_the_utility_time():
    assert laplace_time(0.3, 0.0, 0.0) == 0.3


@pytest.mark.parametrize("tasks", [["new"], ["a", "new"]])
def test_an_earlier_task_with_samples_and_a_weight_is_needed(tasks):
    objective = make_objective(tasks, {"a": 0.0, "new": 1.0})
    with pytest.raises(ValueError, match="operating_time='became'"):
        became_time(objective, *models(), 0.5)


def test_an_infinite_gradient_is_an_error_that_names_the_task():
    theta0, theta1 = models()
    theta1[3] = math.inf
    with pytest.raises(NonFiniteLossError, match="curvature of task"):
        became_time(make_objective(), theta0, theta1, 0.5)


def test_the_merge_is_the_flow_to_that_time():
    merged, incoming = models()
    objective = make_objective()
    context = MergeContext(["theta"], [(D,)], needed={Calibration: objective})
    time = became_time(objective, merged, incoming, T)
    expected = PaperODEMerge(minibatches=Minibatches(64)).merge(merged.clone(), incoming, time, context)
    result = PaperODEMerge(minibatches=Minibatches(64), operating_time="became").merge(
        merged.clone(), incoming, T, context
    )
    assert torch.equal(result.theta, expected.theta)
    assert (result.t, result.trajectory.t[-1]) == (time, time)
