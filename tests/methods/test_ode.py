import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective, MicroBatch
from lightning_odem.calibration.batches import Kept
from lightning_odem.flow import NonFiniteLossError, operating_time
from lightning_odem.methods import IsotropicMerge, MergeContext, ODEMerge
from lightning_odem.methods.layout import tensors
from lightning_odem.methods.needs import BaseModel, Calibration
from lightning_odem.methods.ode import falls
from lightning_odem.parameters.vector import ParameterVector

INPUTS, CLASSES = 6, 4


class Problem:
    """Tasks of a classifier: base model, one fine-tuned model a task and their samples."""

    def __init__(self, tasks=3, samples=48, noise=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        for parameter in self.net.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.vector = ParameterVector(self.net)
        self.base = self.vector.read()
        self.models, self.samples = [], []
        for _ in range(tasks):
            inputs = torch.randn(samples, INPUTS, generator=generator, dtype=torch.float64)
            labels = (inputs @ torch.randn(INPUTS, CLASSES, generator=generator, dtype=torch.float64)).argmax(1)
            self.vector.write_(self.base)
            adam = torch.optim.Adam(self.net.parameters(), lr=0.01)
            for _ in range(15):
                adam.zero_grad()
                cross_entropy(self.net(inputs), labels).backward()
                adam.step()
            self.models.append(self.vector.read())
            if noise:
                labels = torch.randint(CLASSES, labels.shape, generator=generator)
            self.samples.append((inputs, labels))

    def context(self, count, capacity=None, loss=cross_entropy, **options):
        buffer = CalibrationBuffer(capacity or 16 * count)
        for number in range(count):
            buffer.add(f"task_{number}", self.samples[number])
        objective = CalibrationObjective(
            self.vector, buffer, lambda batch: loss(self.net(batch.samples[0]), batch.samples[1]), 32
        )
        shapes = [tuple(shape) for shape in self.vector.shapes]
        return MergeContext(self.vector.names, shapes, needed={BaseModel: self.base, Calibration: objective}, **options)

    def stream(self, method, weights=(1.0, 1.0, 1.0), **options):
        """The result of every merge."""
        results = [method.start(self.models[0], self.context(1, **options))]
        for k in range(1, len(weights)):
            t = operating_time(weights[: k + 1])
            context = self.context(k + 1, **options)
            results.append(method.merge(results[-1].theta.clone(), self.models[k], t, context))
        return results


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"descent": -0.1}, {"epochs": 0}])
def test_unusable_settings_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ODEMerge(**settings)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 1.5, 1.0)])
def test_without_descent_it_is_isotropic_merging_at_the_scale_taken(problem, weights):
    results = problem.stream(ODEMerge(descent=0.0), weights)
    for k in (1, 2):
        (scale,) = results[k].trajectory.scale_taken
        assert scale > 0.0
        rule = IsotropicMerge()
        expected = [problem.models[0]]
        rule.start(problem.models[0], problem.context(1))
        for j in range(1, k + 1):
            t = operating_time(weights[: j + 1])
            expected.append(rule.merge(expected[-1].clone(), problem.models[j], t, problem.context(j + 1)).theta)
        pieces = (tensors(vector, problem.context(1)) for vector in (results[k].theta, expected[-1], problem.base))
        for found, at_1, base in zip(*(piece.values() for piece in pieces), strict=True):
            torch.testing.assert_close(found, base + scale * (at_1 - base) if at_1.dim() == 2 else at_1)


def test_no_scale_that_was_tried_has_a_lower_loss(problem):
    for result in problem.stream(ODEMerge(descent=0.0))[1:]:
        path = result.trajectory
        assert path.loss[-1] <= min(path.scale_loss) + 1e-3
        assert path.loss[-1] < path.average_loss[0]


def test_losses_in_the_record_are_those_of_the_models(problem):
    results = problem.stream(ODEMerge())
    objective = problem.context(3)[Calibration]
    path = results[2].trajectory
    assert path.t == [0.0, pytest.approx(1 / 3)]
    assert path.loss == pytest.approx([objective.loss(results[k].theta) for k in (1, 2)])
    assert path.loss1 == pytest.approx(objective.loss(problem.models[2]))


def test_the_running_average_is_taken_where_its_loss_is_lower(problem):
    """As of a loss that is the distance from it."""
    average = (problem.models[0] + problem.models[1]) / 2

    def distance(scores, labels):
        return (torch.cat([p.flatten() for p in problem.net.parameters()]) - average).square().sum()

    result = problem.stream(ODEMerge(descent=0.0), (1.0, 1.0), loss=distance)[1]
    assert result.trajectory.scale_taken == [0.0]
    torch.testing.assert_close(result.theta, average)


def test_a_loss_that_rewards_distance_does_not_choose_the_scale(problem):
    """As the entropy, which is the lower the surer a model is, of whatever."""

    class Sure:
        rewards_distance = True

        def __call__(self, batch):
            return Categorical(logits=problem.net(batch.samples[0])).entropy().mean()

    method = ODEMerge(descent=0.0)
    merged = method.start(problem.models[0], problem.context(1)).theta.clone()
    context = problem.context(2)
    context[Calibration].batch_loss = Sure()
    path = method.merge(merged, problem.models[1], 0.5, context).trajectory
    assert path.scale == path.scale_taken == [1.0]


def test_the_search_begins_at_the_last_scale(problem):
    results = problem.stream(ODEMerge(descent=0.0))
    assert results[2].trajectory.scale[0] == results[1].trajectory.scale_taken[0]


def test_a_descent_that_helps_is_taken(problem):
    path = problem.stream(ODEMerge(descent=0.2, batch_size=8), (1.0, 1.0), capacity=96)[1].trajectory
    assert path.descent_taken == [2.0]
    assert path.descent_loss[2] < path.descent_loss[1] < path.descent_loss[0]
    assert path.gradient_evaluations == 2 * math.ceil(72 / 8)


def test_a_descent_that_held_out_samples_do_not_confirm_leaves_no_trace():
    """Labels are random: what gradients learn from some samples is wrong for the others."""
    problem = Problem(noise=1.0)
    plain = problem.stream(ODEMerge(descent=0.0))[1]
    tried = problem.stream(ODEMerge(descent=0.5, batch_size=4))[1]
    assert tried.trajectory.descent_taken == [0.0]
    assert len(tried.trajectory.descent_loss) == 2  # given up after the first piece
    assert torch.equal(tried.theta, plain.theta)


def test_with_one_sample_of_each_task_there_is_no_descent(problem):
    """There would be nothing to judge it by."""
    path = problem.stream(ODEMerge(), (1.0, 1.0), capacity=2)[1].trajectory
    assert (path.descent_loss, path.gradient_evaluations) == ([], 0)


def test_what_a_merge_without_use_of_gradients_costs(problem):
    """In passes over the buffer, of which one with gradient counts three."""
    problem = Problem(noise=1.0)
    method, objective = ODEMerge(descent=0.5, batch_size=4), problem.context(2)[Calibration]
    seen = []
    loss = objective.batch_loss
    objective.batch_loss = lambda batch: seen.append(len(batch.samples[1])) or loss(batch)
    context = problem.context(2)
    merged = method.start(problem.models[0], context).theta.clone()
    context = MergeContext(context.names, context.shapes, needed={BaseModel: problem.base, Calibration: objective})
    method.merge(merged, problem.models[1], 0.5, context)
    passes = (sum(seen) + 2 * objective.sample_gradients) / len(objective.buffer)
    assert passes <= 15
    assert objective.sample_gradients == 24


def test_the_same_settings_give_the_same_model(problem):
    ends = [problem.stream(ODEMerge(batch_size=8))[-1].theta for _ in range(2)]
    assert torch.equal(*ends)


def test_a_task_without_weight_leaves_merged_model_and_state(problem):
    method = ODEMerge()
    results = problem.stream(method, (1.0, 1.0))
    state, merged = method.state_dict(), results[1].theta
    result = method.merge(merged.clone(), problem.models[2], 0.0, problem.context(3))
    assert torch.equal(result.theta, merged)
    assert method.state_dict() == state


def test_a_task_that_alone_has_a_weight_gives_its_own_model(problem):
    result = problem.stream(ODEMerge(), (0.0, 1.0))[1]
    assert torch.equal(result.theta, problem.models[1])


def test_the_order_of_the_tasks_moves_only_the_samples_kept(problem):
    """Without descent the same two models and samples give the same merge in both orders."""
    ends = []
    for order in ((0, 1), (1, 0)):
        other = Problem()
        other.models = [other.models[index] for index in order]
        other.samples = [other.samples[index] for index in order]
        ends.append(other.stream(ODEMerge(descent=0.0), (1.0, 1.0), capacity=96)[1].theta)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_the_state_goes_on_where_it_was(problem):
    first, second = ODEMerge(), ODEMerge()
    merged = problem.stream(first, (1.0, 1.0))[1].theta
    second.load_state_dict(first.state_dict())
    ends = [
        method.merge(merged.clone(), problem.models[2], 1 / 3, problem.context(3)).theta for method in (first, second)
    ]
    assert torch.equal(*ends)


def test_a_state_of_an_earlier_version_is_dropped(problem):
    method = ODEMerge()
    method.load_state_dict({"average": {"0.weight": torch.zeros(8, 6)}, "departure_a": {}, "departure_b": {}})
    assert method.state_dict() == {}


def test_an_average_of_another_method_is_not_taken_for_an_earlier_version():
    with pytest.raises(ValueError, match="the stream's state has: average, shares, factors"):
        ODEMerge().load_state_dict({"average": {}, "shares": [1.0], "factors": []})


def test_the_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match="the stream's state has: scale, norms"):
        ODEMerge().load_state_dict({"scale": 1.0, "norms": [1.0]})


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_finite_nowhere_is_an_error(problem, broken):
    with pytest.raises(NonFiniteLossError, match="the loss of the incoming model"):
        problem.stream(ODEMerge(), (1.0, 1.0), loss=lambda scores, labels: scores.sum() * broken)


def test_a_fall_is_weighed_by_shares_and_held_against_its_standard_error():
    batches = [MicroBatch((), "a", share, False) for share in (0.5, 0.25, 0.25)]
    assert falls([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], batches)
    assert not falls([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], batches)
    assert not falls([1.0, 1.0, 1.0], [1.1, 0.9, 0.9], batches)
    falls_by = [0.2, 0.0, 0.1]  # mean 0.125; the three differ from it by 0.075, -0.125, -0.025
    error = math.sqrt(1.5 * sum((s * d) ** 2 for s, d in zip((0.5, 0.25, 0.25), (0.075, -0.125, -0.025), strict=True)))
    assert falls([1.0] * 3, [1.0 - fall for fall in falls_by], batches) == (error < 0.125)


def taken_out(problem, method, gone, weights):
    """The end of a stream, and what is left of it without a task; no samples are at hand."""
    merged = problem.stream(method, weights)[-1].theta
    shapes = [tuple(shape) for shape in problem.vector.shapes]
    context = MergeContext(problem.vector.names, shapes, needed={BaseModel: problem.base})
    return merged, method.remove(merged.clone(), problem.models[gone], weights[gone] / sum(weights), context).theta


@pytest.mark.parametrize("descent", [0.0, 0.006])
@pytest.mark.parametrize("gone", range(3))
def test_without_a_task_the_point_is_that_of_the_others_at_the_last_scale(problem, gone, descent):
    method, weights = ODEMerge(descent=descent), (1.0, 1.5, 0.5)
    _, left = taken_out(problem, method, gone, weights)
    others = [index for index in range(3) if index != gone]
    rule, t = IsotropicMerge(), weights[others[1]] / (weights[others[0]] + weights[others[1]])
    start = rule.start(problem.models[others[0]], problem.context(1)).theta
    at_1 = rule.merge(start.clone(), problem.models[others[1]], t, problem.context(2)).theta
    scale = method.state_dict()["scale"]
    pieces = (tensors(vector, problem.context(1)) for vector in (left, at_1, problem.base))
    for found, expected, base in zip(*(piece.values() for piece in pieces), strict=True):
        torch.testing.assert_close(found, base + scale * (expected - base) if expected.dim() == 2 else expected)


def test_without_a_task_the_running_average_stays_one(problem):
    """Where the last merge took it, though one before had found a scale."""
    method = ODEMerge(descent=0.0)
    problem.stream(method, (1.0, 1.0))
    assert method.state_dict()["scale"]
    average = sum(problem.models) / 3

    def distance(scores, labels):
        return (torch.cat([p.flatten() for p in problem.net.parameters()]) - average).square().sum()

    merged = method.merge(average.clone(), problem.models[2], 1 / 3, problem.context(3, loss=distance))
    assert merged.trajectory.scale_taken == [0.0]
    left = method.remove(merged.theta.clone(), problem.models[0], 1 / 3, problem.context(3)).theta
    torch.testing.assert_close(left, (problem.models[1] + problem.models[2]) / 2)


def test_without_the_others_a_task_has_its_own_model(problem):
    _, left = taken_out(problem, ODEMerge(), 0, (1.0, 2.0))
    torch.testing.assert_close(left, problem.models[1])


@pytest.mark.parametrize("joins_tasks", [True, False])
def test_the_passes_of_a_merge_grow_with_the_tasks_only_if_these_cannot_share_samples(joins_tasks):
    problem, passes = Problem(tasks=32, samples=32), []
    for count in (4, 32):
        seen = []

        def batch_loss(batch, seen=seen):
            seen.append(batch.task)
            samples = batch.samples
            inputs, labels = next(samples.batches())[0] if isinstance(samples, Kept) else samples
            return cross_entropy(problem.net(inputs), labels)

        batch_loss.joins_tasks = joins_tasks
        method, context = ODEMerge(batch_size=32), problem.context(count, capacity=128)
        objective = CalibrationObjective(problem.vector, context[Calibration].buffer, batch_loss, 32)
        context = replace(context, needed={**context.needed, Calibration: objective})
        method.start(problem.models[0], context)
        method.merge(problem.models[0].clone(), problem.models[1], 0.5, context)
        passes.append(len(seen))
    few, many = passes
    assert (many < 1.5 * few) if joins_tasks else (many > 3 * few)
