import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_odem.base_gradients import BaseGradients
from lightning_odem.batch_norm import BatchNormStatistics
from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.source import draw_by_index, draw_further
from lightning_odem.methods import MergeContext, ODEMerge, PaperODEMerge
from lightning_odem.methods.control_variate import ControlVariate
from lightning_odem.methods.sampling import halve
from lightning_odem.parameters import ParameterVector

SIZES = {"a": 300, "b": 200, "c": 260}
WEIGHTS = {"a": 1.0, "b": 3.0, "c": 2.0}


def make_data(seed, size):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (size,), generator=generator))


DATA = {task: make_data(seed, size) for seed, (task, size) in enumerate(SIZES.items())}


class Stream:
    """Tasks one after the other in a buffer of few samples, as a merge sees them."""

    def __init__(self, capacity=24, shares="quota", limit=100):
        torch.manual_seed(0)
        self.net = nn.Linear(5, 3).double()
        self.vector = ParameterVector(self.net)
        self.base = {name: tensor.detach().clone() for name, tensor in self.net.named_parameters()}
        self.buffer, self.limit = CalibrationBuffer(capacity, shares=shares), limit
        self.seen = {}
        self.objective = CalibrationObjective(
            self.vector, self.buffer, lambda batch: cross_entropy(self.net(batch.samples[0]), batch.samples[1]), 16
        )

    def arrive(self, task):
        dataset, weight = DATA[task], WEIGHTS[task]
        room, generator = self.buffer.room_for_next(weight), self.buffer.generator
        further = draw_further(dataset, room, self.limit, generator())
        self.seen[task] = draw_by_index(dataset, max(self.limit, room), generator())
        self.buffer.add(task, draw_by_index(dataset, room, generator()), weight=weight)
        statistics = BatchNormStatistics(self.net, (), "average")
        at_base = BaseGradients(self.objective, self.base, self.vector.read(), statistics, task, further)
        shapes = [tuple(shape) for shape in self.vector.shapes]
        return MergeContext(self.vector.names, shapes, calibration=self.objective, at_base=at_base)

    def start(self):
        """At the base model noise is the same as there: the coefficient is 1."""
        return self.vector.gather(self.base)

    def gradient(self, *samples_and_shares):
        """The gradient at the base model, by plain autograd."""
        self.net.load_state_dict(self.base)
        loss = sum(share * cross_entropy(self.net(x), y) for (x, y), share in samples_and_shares)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.net.parameters()))])


def held(half):
    return {task: kept["samples"] for task, kept in half.buffer.state_dict()["tasks"].items()}


def run(stream, tasks="abc"):
    control = ControlVariate()
    for task in tasks:
        context = stream.arrive(task)
        control.add(context)
    return control, context


@pytest.mark.parametrize("shares", ["quota", "utility"])
def test_kept_is_the_mean_over_tasks_by_their_shares(shares):
    stream = Stream(shares=shares)
    control, _ = run(stream)
    proportions = WEIGHTS if shares == "utility" else dict.fromkeys(WEIGHTS, 1.0)
    total = sum(proportions.values())
    expected = stream.gradient(*((stream.seen[task], proportions[task] / total) for task in SIZES))
    state = control.state_dict()
    found = torch.cat([state["gradient"][name].flatten() for name in stream.vector.names])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert state["samples"] == {"a": 100, "b": 100, "c": 100}


@pytest.mark.parametrize("shares", ["quota", "utility"])
def test_a_correction_puts_samples_that_neither_half_has_in_the_place_of_the_halfs_own(shares):
    """With the other half taken out, the gradient on all samples but those that the path is judged by."""
    stream = Stream(shares=shares)
    control, context = run(stream)
    halves = halve(stream.objective)
    corrections = control.corrections(halves, stream.start(), context)
    own = stream.buffer.shares()
    for half, other, correction in zip(halves, halves[::-1], corrections, strict=True):
        kept = [(held(half)[task], share) for task, share in own.items()]
        rest = []
        for task, share in own.items():
            inputs, labels = stream.seen[task]
            judged = held(other)[task][0]
            is_left = ~(inputs[:, None] == judged[None]).all(2).any(1)
            assert int(is_left.sum()) == 100 - len(judged)
            rest.append(((inputs[is_left], labels[is_left]), share))
        expected = stream.gradient(*rest) - stream.gradient(*kept)
        torch.testing.assert_close(correction, expected, rtol=1e-10, atol=1e-13)


def far_away(stream, scale):
    """A point where the noise of gradients is another one than at the base model."""
    generator = torch.Generator().manual_seed(1)
    theta = stream.start()
    return theta + scale * torch.randn(len(theta), generator=generator, dtype=theta.dtype)


def test_it_counts_as_much_as_the_noise_where_paths_start_is_that_at_the_base_model():
    stream = Stream()
    control, context = run(stream)
    halves, theta = halve(stream.objective), far_away(stream, 3.0)
    difference = halves[0].loss_and_grad(theta)[1] - halves[1].loss_and_grad(theta)[1]  # all samples are few here
    there = halves[0].loss_and_grad(stream.start())[1] - halves[1].loss_and_grad(stream.start())[1]
    coefficient = float(difference @ there / (there @ there))
    assert 0.0 < coefficient < 1.0
    whole = control.corrections(halves, stream.start(), context)
    for correction, full in zip(control.corrections(halves, theta, context), whole, strict=True):
        torch.testing.assert_close(correction, coefficient * full, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("factor", "coefficient"), [(-1.0, 0.0), (5.0, 1.0)])
def test_the_coefficient_lies_between_0_and_1(factor, coefficient):
    """A loss whose gradients at the start are a multiple of those at the base model."""
    stream = Stream()
    control, context = run(stream)
    whole = control.corrections(halve(stream.objective), stream.start(), context)
    loss, base = stream.objective.batch_loss, stream.start()

    def batch_loss(batch):
        here = stream.vector.read()
        return loss(batch) * (1.0 if torch.equal(here, base) else factor)

    stream.objective.batch_loss = batch_loss
    corrections = control.corrections(halve(stream.objective), base * (1.0 + 1e-12), context)
    for correction, full in zip(corrections, whole, strict=True):
        torch.testing.assert_close(correction, coefficient * full, rtol=1e-8, atol=1e-12)


def test_it_is_nothing_where_no_more_samples_were_seen_than_are_there():
    stream = Stream(capacity=1000, limit=100)
    control, context = run(stream)
    before = stream.objective.sample_gradients
    assert control.corrections(halve(stream.objective), stream.start(), context) == (None, None)
    assert stream.objective.sample_gradients == before


def test_samples_that_have_left_the_buffer_still_count():
    """Without further samples: the first task had all places once."""
    stream = Stream(capacity=24, limit=0)
    control, context = run(stream, "ab")
    assert control.state_dict()["samples"] == {"a": 24, "b": 12}
    corrections = control.corrections(halve(stream.objective), stream.start(), context)
    assert all(correction.norm() > 0 for correction in corrections)


def test_only_tasks_that_were_taken_in_are_corrected():
    """A stream that another method began."""
    stream, control = Stream(), ControlVariate()
    stream.arrive("a")
    context = stream.arrive("b")
    control.add(context)
    halves = halve(stream.objective)
    first, _ = control.corrections(halves, stream.start(), context)
    inputs, labels = stream.seen["b"]
    is_left = ~(inputs[:, None] == held(halves[1])["b"][0][None]).all(2).any(1)
    expected = stream.gradient(((inputs[is_left], labels[is_left]), 0.5), (held(halves[0])["b"], -0.5))
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-13)


def test_without_a_base_model_there_is_none():
    stream, control = Stream(), ControlVariate()
    context = replace(stream.arrive("a"), at_base=None)
    control.add(context)
    assert control.state_dict() == {}
    assert control.corrections(halve(stream.objective), stream.start(), context) == (None, None)


def test_parameters_new_to_the_stream_are_not_corrected():
    stream = Stream()
    control, context = run(stream, "ab")
    state = control.state_dict()
    control.load_state_dict({**state, "gradient": {"weight": state["gradient"]["weight"]}})
    known, _ = control.corrections(halve(stream.objective), stream.start(), context)
    control.load_state_dict(state)
    whole, _ = control.corrections(halve(stream.objective), stream.start(), context)
    assert torch.equal(known, torch.cat([whole[:15], torch.zeros(3)]))


def test_a_task_without_a_share_of_the_loss_costs_nothing():
    stream, control = Stream(shares="utility"), ControlVariate()
    stream.arrive("a")
    WEIGHTS["b"], kept = 0.0, WEIGHTS["b"]
    try:
        context = stream.arrive("b")
    finally:
        WEIGHTS["b"] = kept
    before = stream.objective.sample_gradients
    control.add(context)
    assert stream.objective.sample_gradients == before


def test_later_merges_leave_a_state_that_was_returned():
    stream, control = Stream(), ControlVariate()
    control.add(stream.arrive("a"))
    state = control.state_dict()
    before = {name: tensor.clone() for name, tensor in state["gradient"].items()}
    control.add(stream.arrive("b"))
    assert all(torch.equal(state["gradient"][name], before[name]) for name in before)
    assert state["samples"] == {"a": 100}


def test_corrected_gradients_are_nearer_to_those_of_all_the_data():
    """At a point near the base model, in the mean over both halves."""
    stream = Stream(limit=1000)
    control, context = run(stream)
    halves, theta = halve(stream.objective), far_away(stream, 0.2)
    everything = CalibrationBuffer(sum(SIZES.values()))
    for task, dataset in DATA.items():
        everything.add(task, dataset.tensors)
    _, truth = CalibrationObjective(stream.vector, everything, stream.objective.batch_loss).loss_and_grad(theta)
    for half, correction in zip(halves, control.corrections(halves, theta, context), strict=True):
        _, plain = half.loss_and_grad(theta)
        assert (plain + correction - truth).norm() < 0.5 * (plain - truth).norm()


def merge_stream(method, **options):
    """Three models merged: cost of each merge, and the states' names."""
    stream, costs = Stream(**options), []
    theta = None
    for seed, task in enumerate(SIZES):
        torch.manual_seed(seed)
        context, incoming = stream.arrive(task), torch.randn(18, dtype=torch.float64)
        if not method.task_samples:
            context = replace(context, at_base=None)  # as a merge makes it
        before = stream.objective.sample_gradients
        t = 1 / (seed + 1)
        theta = (method.merge(theta, incoming, t, context) if seed else method.start(incoming, context)).theta.clone()
        costs.append(stream.objective.sample_gradients - before)
    return theta, costs


def test_a_merge_costs_two_epochs_one_pass_at_the_base_model_and_the_tasks_samples():
    """And four gradients on 64 samples of a half each, or all it has, for the coefficient."""
    _, costs = merge_stream(ODEMerge(batch_size=8))
    assert costs == [100, *2 * [2 * 24 + 24 + 100 + 4 * 12]]
    _, costs = merge_stream(ODEMerge(batch_size=8), capacity=180, limit=150)
    assert costs == [180, *(2 * 180 + 180 + max(150, 180 // k) + 4 * k * math.ceil(64 / k) for k in (2, 3))]


def test_without_task_samples_it_costs_the_epochs():
    assert merge_stream(ODEMerge(batch_size=8, task_samples=0), limit=0)[1] == [0, 48, 48]


def test_a_method_that_goes_on_from_a_state_merges_as_if_it_had_never_stopped():
    whole, _ = merge_stream(ODEMerge(batch_size=8))
    stream, method, theta = Stream(), ODEMerge(batch_size=8), None
    for seed, task in enumerate(SIZES):
        torch.manual_seed(seed)
        context, incoming = stream.arrive(task), torch.randn(18, dtype=torch.float64)
        state, method = method.state_dict(), ODEMerge(batch_size=8)
        method.load_state_dict(state)
        result = method.merge(theta, incoming, 1 / (seed + 1), context) if seed else method.start(incoming, context)
        theta = result.theta.clone()
    assert torch.equal(theta, whole)


def test_the_papers_rule_looks_at_no_further_samples():
    assert PaperODEMerge().task_samples == 0
    assert math.isfinite(ODEMerge().task_samples)
