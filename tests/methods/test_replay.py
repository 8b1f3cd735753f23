import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy import Classifier, Task, fit, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import AverageMerge, MergeContext, Minibatches, PaperODEMerge
from lightning_odem.methods.needs import Calibration
from lightning_odem.methods.replay import ReplayMerge
from lightning_odem.parameters.vector import ParameterVector

FP64 = torch.float64
SIZES = {"a": 13, "b": 5, "c": 8}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).to(FP64)


def make_buffer(quota="utility"):
    buffer, generator = CalibrationBuffer(100, quota), torch.Generator().manual_seed(1)
    for task, size in SIZES.items():
        samples = torch.randn(size, 3, generator=generator, dtype=FP64), torch.arange(size) % 4
        buffer.add(task, samples, weight=WEIGHTS[task])
    return buffer


def make_context(net, on_step=None, batch_loss=None):
    vector = ParameterVector(net)
    batch_loss = batch_loss or (lambda batch: cross_entropy(net(batch.samples[0]), batch.samples[1]))
    objective = CalibrationObjective(vector, make_buffer(), batch_loss)
    return MergeContext(vector.names, vector.shapes, needed={Calibration: objective}, on_step=on_step)


def endpoints():
    return [ParameterVector(make_net(seed)).read() for seed in (1, 2)]


def merge(method, t=0.5, **settings):
    merged, incoming = endpoints()
    context = make_context(make_net(), **settings)
    return method.merge(merged, incoming, t, context).theta, context[Calibration]


def test_it_is_adam_on_weighted_minibatches_from_the_average_on():
    """With an ordinary module, samples numbered through and one weight for each."""
    net = make_net()
    for parameter, first, second in zip(
        *(model.parameters() for model in (net, make_net(1), make_net(2))), strict=True
    ):
        parameter.data = 0.7 * first.data + 0.3 * second.data
    batches = list(make_buffer().micro_batches(100))
    inputs, labels = (torch.cat([batch.samples[i] for batch in batches]) for i in (0, 1))
    sample_weights = torch.cat(
        [torch.full((size,), WEIGHTS[task] / 3.5 / size, dtype=FP64) for task, size in SIZES.items()]
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for index in torch.randperm(26, generator=generator).split(4):
            losses = cross_entropy(net(inputs[index]), labels[index], reduction="none")
            optimizer.zero_grad()
            (losses * sample_weights[index] * 26 / len(index)).sum().backward()
            optimizer.step()
    theta, _ = merge(ReplayMerge(lr=0.01, batch_size=4, step_size=0.1, seed=3), t=0.3)
    torch.testing.assert_close(theta, ParameterVector(net).read(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("step_size", [0.05, 0.3])
@pytest.mark.parametrize("t", [0.0, 0.05, 1 / 14, 0.15, 1 / 3, 0.5, 0.95, 1.0])
def test_it_spends_as_many_sample_gradients_as_ode(t, step_size):
    _, of_minibatches = merge(PaperODEMerge(step_size, minibatches=Minibatches(7)), t)
    _, of_paper = merge(PaperODEMerge(step_size), t)
    _, of_replay = merge(ReplayMerge(batch_size=7, step_size=step_size), t)
    assert of_replay.sample_gradients == of_minibatches.sample_gradients == of_paper.sample_gradients
    assert of_replay.gradient_evaluations == of_minibatches.gradient_evaluations == 4 * of_paper.gradient_evaluations
    assert (of_replay.sample_gradients > 0) == (t > 0)


def test_the_calibration_loss_falls():
    average, objective = merge(AverageMerge())
    theta, _ = merge(ReplayMerge(lr=0.01, batch_size=8))
    assert objective.loss(theta) < 0.9 * objective.loss(average)


def test_it_finds_the_minimum_of_a_quadratic_that_all_samples_share():
    net = make_net()

    def batch_loss(batch):
        return sum(((parameter - 0.5) ** 2).sum() for parameter in net.parameters())

    merged, incoming = endpoints()
    context = make_context(net, batch_loss=batch_loss)
    theta = ReplayMerge(lr=0.02, batch_size=26, step_size=0.001).merge(merged, incoming, 0.5, context).theta
    torch.testing.assert_close(theta, torch.full_like(theta, 0.5), atol=1e-3, rtol=0)


def test_a_small_learning_rate_leaves_the_average():
    average, _ = merge(AverageMerge())
    theta, _ = merge(ReplayMerge(lr=1e-12))
    torch.testing.assert_close(theta, average, atol=1e-9, rtol=0)


def test_the_seed_alone_decides_the_merge():
    first, second, other = (merge(ReplayMerge(batch_size=4, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_at_time_0_nothing_changes():
    assert torch.equal(merge(ReplayMerge(), t=0.0)[0], endpoints()[0])


def test_it_works_in_the_memory_of_the_merged_model_and_leaves_the_incoming_one():
    merged, incoming = endpoints()
    theta = ReplayMerge().merge(merged, incoming, 0.5, make_context(make_net())).theta
    assert theta is merged
    assert theta.grad is None
    assert torch.equal(incoming, endpoints()[1])


def test_it_tells_how_far_it_is():
    steps = []
    merge(ReplayMerge(batch_size=13, step_size=0.25), on_step=lambda *step: steps.append(step))
    assert steps == [(done, 4) for done in range(5)]


def test_a_loss_that_is_not_finite_is_an_error():
    net, (merged, incoming) = make_net(), endpoints()
    context = make_context(net, batch_loss=lambda batch: math.inf * net[0].weight.square().sum())
    with pytest.raises(NonFiniteLossError, match=r"calibration loss is inf at step 0 \(t = 0.5\)"):
        ReplayMerge().merge(merged, incoming, 0.5, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr must lie in \(0, inf\), got lr=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"step_size": 0.0}, r"step_size must lie in \(0, 1\], got step_size=0.0"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReplayMerge(**settings)


def test_a_stream_costs_what_it_costs_with_algorithm_1(small_stream):
    merges, modules = {}, {}
    for name, method in {
        "replay": ReplayMerge(lr=0.01, batch_size=5),
        "ode_paper": PaperODEMerge(),
        "average": AverageMerge(),
    }.items():
        module, merge = Classifier(), ContinualMergeCallback(method=method)
        for number in range(3):
            fit(module, Task(number), merge)
            if number == 0:
                modules[f"{name} first"] = weights(module)
        merges[name], modules[name] = merge.report.merges, weights(module)
    for name in ("replay", "ode_paper"):
        assert [record.sample_gradients for record in merges[name]] == [0, 10 * 48, 7 * 72]
    assert same(modules["replay first"], modules["average first"])
    assert not same(modules["replay"], modules["average"])
