import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.merging import Calibration, merging
from lightning_odem.methods import AverageMerge, MergeContext, ODEMerge, PaperODEMerge
from lightning_odem.methods.cross_fit import best_share
from lightning_odem.methods.linalg import cosine
from lightning_odem.methods.sampling import halve, minibatch_gradients
from lightning_odem.parameters import ParameterVector


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"descent": -0.1}, "descent=-0.1"),
        ({"step_control": True}, r"step_control takes steps back, .*\(descent=0.018\); set descent=0"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ODEMerge(**settings)


SIZES = {"a": 20, "b": 7, "c": 13}


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).double().eval()


def make_objective(net):
    """Classes that can be learnt from the inputs, alike in all tasks."""
    buffer, generator = CalibrationBuffer(100), torch.Generator().manual_seed(1)
    teacher = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    for task, size in SIZES.items():
        inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        buffer.add(task, (inputs, (inputs @ teacher).argmax(1)))
    batch_loss = lambda batch: cross_entropy(net(batch.samples[0]), batch.samples[1])  # noqa: E731
    return CalibrationObjective(ParameterVector(net), buffer, batch_loss)


def merge(method, t=0.4):
    """The merge of two random networks."""
    merged, incoming = (5 * ParameterVector(make_net(seed)).read() for seed in (1, 2))
    vector = ParameterVector(net := make_net())
    objective = make_objective(net)
    context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], calibration=objective)
    return method.merge(merged.clone(), incoming, t, context), merged, incoming, objective


OPTIONS = [
    {"operating_time": 0.3},
    {"operating_time": "search"},
    {"operating_time": "became"},
    {},
    {"batch_size": 8},
    {"batch_size": None},
    {"reuse": 3},
    {"granularity": "row"},
    {"operating_time": "search", "batch_size": 8, "reuse": 2, "solver": "heun"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_task_without_weight_leaves_the_merged_model_untouched(options):
    result, merged, *_ = merge(ODEMerge(**options), t=0.0)
    assert torch.equal(result.theta, merged)
    assert result.t in (None, 0.0)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_task_that_alone_has_a_weight_overwrites_the_merged_model(options):
    result, _, incoming, _ = merge(ODEMerge(**options), t=1.0)
    assert torch.equal(result.theta, incoming)
    assert result.t in (None, 1.0)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_settings_give_the_same_model(options):
    first, second = (merge(ODEMerge(**options))[0] for _ in range(2))
    assert torch.equal(first.theta, second.theta)
    assert first.trajectory.as_dict() == second.trajectory.as_dict()


def test_a_minibatch_of_everything_is_the_whole_buffer():
    first, second = (merge(ODEMerge(batch_size=size))[0] for size in (40, None))
    torch.testing.assert_close(first.theta, second.theta)


def test_the_seed_decides_on_the_path_of_minibatches():
    first, second = (merge(ODEMerge(batch_size=8, seed=seed))[0] for seed in (0, 1))
    assert not torch.equal(first.theta, second.theta)


# ---------------------------------------------------------------------------------------------------- the descent


@pytest.mark.parametrize(
    ("t", "step_size", "size"),
    [(0.4, 0.05, 8), (0.4, 0.05, None), (1 / 3, 0.1, 16), (0.02, 0.05, 8), (0.02, 0.05, None), (0.4, 0.05, 64)],
)
@pytest.mark.parametrize("most", [2, 100])
def test_a_path_is_transport_rectification_and_adam_written_out(t, step_size, size, most):
    """Both halves' paths, judged and averaged as the docstrings say."""
    result, merged, incoming, objective = merge(
        ODEMerge(step_size, batch_size=size, descent=0.02, epochs=most, seed=5), t
    )
    epochs = min(math.ceil(t / step_size - 1e-9), most)
    distance = float((incoming - merged).square().mean().sqrt())
    length = 0.02 * distance * epochs**0.5 * (40 / size if size else 1)
    halves, ends = halve(objective), []
    for half in halves:
        samples = len(half.buffer)
        assert samples == 20
        steps = epochs * (math.ceil(samples / size) if size else 1)
        gradient = minibatch_gradients(objective, half.buffer, size or samples, seed=5)
        # Whole-buffer steps have length h and a shorter last one, those of minibatches are all alike.
        times = [min(k * (t / steps if size or epochs == most else step_size), t) for k in range(steps)] + [t]
        budget = max(half.loss(incoming) - half.loss(merged), 0.0)
        theta, mean, square = merged.clone(), torch.zeros_like(merged), torch.zeros_like(merged)
        for k, (now, later) in enumerate(zip(times, times[1:], strict=False), start=1):
            g = gradient(theta)[1]
            u = (incoming - theta) / (1 - now)
            rise = float(g @ u)
            v = u - (1 - min(budget / rise, 1.0)) * rise / float(g @ g) * g if rise > 0 else u
            mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
            direction = mean / (1 - 0.9**k) / (square / (1 - 0.99**k)).sqrt()
            covered = length * ((1 - now / t) ** 2 - (1 - later / t) ** 2)
            theta = theta + (later - now) * v - covered * direction.nan_to_num()
        ends.append(theta)
    straight = torch.lerp(merged, incoming, t)
    unseen = [
        sum(other.loss(straight + s * (end - straight)) for other, end in zip(halves[::-1], ends, strict=True)) / 2
        for s in (0.0, 0.5, 1.0)
    ]
    share = best_share(unseen, cosine(*(end - straight for end in ends)))
    assert share > 0.0
    expected = straight + share * ((ends[0] + ends[1]) / 2 - straight)
    torch.testing.assert_close(result.theta, expected, rtol=1e-7, atol=1e-8)
    assert result.trajectory.departure_loss == pytest.approx(unseen)
    assert result.trajectory.departure_taken == [pytest.approx(share)]


@pytest.mark.parametrize("t", [1e-2, 1e-5, 1e-8])
def test_a_task_of_hardly_any_weight_leaves_one_epoch_of_descent_from_the_average(t):
    result, merged, incoming, _ = merge(ODEMerge(batch_size=8), t)
    distance = float((incoming - merged).square().mean().sqrt())
    furthest = float((result.theta - merged).abs().max())
    assert 1e-3 * distance < furthest <= t * float((incoming - merged).abs().max()) + 2.35 * 0.018 * distance * 5


def merge_linear(method, seed, t, scale=1.0):
    """Two linear classifiers, whose loss is convex; the incoming one is ``scale`` times a random one."""
    torch.manual_seed(seed)
    net = nn.Linear(3, 4).double()
    vector, objective = ParameterVector(net), make_objective(net)
    merged, incoming = torch.randn(2, len(vector), dtype=torch.float64)
    context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], calibration=objective)
    incoming *= scale
    return method.merge(merged.clone(), incoming, t, context), merged, incoming, objective


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_loss_of_a_convex_problem_is_lower_than_the_averages(t, seed):
    (descended, _, _, objective), (averaged, *_) = (
        merge_linear(method, seed, t) for method in (ODEMerge(batch_size=8), AverageMerge())
    )
    assert objective.loss(descended.theta) < objective.loss(averaged.theta) - 0.01


@pytest.mark.parametrize("t", [0.1, 0.25, 0.4])
def test_no_weight_is_further_from_the_path_without_descent_than_the_length_allows(t):
    """Where nothing is damped, the transport draws both paths to the same model, and so to each other."""
    (first, merged, incoming, _), (second, *_) = (
        merge_linear(method, 0, t, scale=0.1) for method in (ODEMerge(batch_size=None, descent=0.02), PaperODEMerge())
    )
    assert {*first.trajectory.gamma, *second.trajectory.gamma} == {1.0}
    length = 0.02 * float((incoming - merged).square().mean().sqrt()) * math.ceil(t / 0.05 - 1e-9) ** 0.5
    (share,) = first.trajectory.departure_taken
    assert 0.0 < float((first.theta - second.theta).abs().max()) <= share * 2.35 * length


def test_samples_that_do_not_count_do_not_lengthen_the_descent():
    def merged_with(*tasks):
        net = make_net()
        full, buffer = make_objective(net), CalibrationBuffer(100, shares="utility")
        held = {batch.task: batch.samples for batch in full.micro_batches()}
        for task in tasks:
            buffer.add(task, held[task], weight=float(task != "b"))
        vector = full.vector
        objective = CalibrationObjective(vector, buffer, full.batch_loss)
        context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], calibration=objective)
        merged, incoming = (ParameterVector(make_net(seed)).read() for seed in (1, 2))
        return ODEMerge(batch_size=8).merge(merged, incoming, 0.4, context).theta

    torch.testing.assert_close(merged_with("a", "c", "b"), merged_with("a", "c"), rtol=1e-12, atol=1e-12)


def test_weights_that_are_not_finite_are_reported_as_such():
    net, before = make_net(1), make_net(2)
    net[0].weight.data[0, 0] = math.nan
    objective = make_objective(net)
    calibration = Calibration(objective.buffer, objective.batch_loss)
    settings = {"task": "c", "t": 0.5, "merged": before.state_dict(), "base": {}, "calibration": calibration}
    message = "Merging task 'c': the loss of the incoming model is nan"
    with pytest.raises(NonFiniteLossError, match=message), merging(net, ODEMerge(), **settings):
        pass


def test_calibration_is_what_it_needs():
    assert ODEMerge.needs == {"calibration"}


def test_the_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match="keeps an average, but the stream's state has: scale, norms"):
        ODEMerge().load_state_dict({"scale": 1.0, "norms": []})
