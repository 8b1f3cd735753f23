import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.methods.sampling import (
    CalibrationPart,
    Minibatches,
    hold_out,
)
from lightning_odem.parameters.vector import ParameterVector

SIZES = {"a": 12, "b": 5, "c": 1}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def make_objective(sizes=SIZES):
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    buffer, number = CalibrationBuffer(100, "utility"), 0
    for task, size in sizes.items():
        inputs = torch.randn(size, 3, dtype=torch.float64)
        targets = torch.arange(number, number + size, dtype=torch.float64)  # tell the samples apart
        buffer.add(task, (inputs, targets), weight=WEIGHTS[task])
        number += size
    loss = lambda batch: mse_loss(net(batch.samples[0])[:, 0], batch.samples[1])  # noqa: E731
    return CalibrationObjective(ParameterVector(net), buffer, loss, batch_size=4)


def samples_of(part):
    return {
        task: [number for batch in part.buffer.micro_batches_of(task, 4) for number in batch.samples[1].tolist()]
        for task, count in part.buffer.counts.items()
        if count
    }


@pytest.mark.parametrize(
    ("fraction", "held"), [(0.25, {"a": 3, "b": 1}), (0.01, {"a": 1, "b": 1}), (0.99, {"a": 11, "b": 4})]
)
def test_every_sample_is_on_one_side_and_both_have_one_where_there_are_two(fraction, held):
    objective = make_objective()
    kept, held_out = (samples_of(part) for part in hold_out(objective, fraction))
    assert {task: len(numbers) for task, numbers in held_out.items()} == held
    assert kept["c"] == [17.0]
    whole = samples_of(CalibrationPart(objective, objective.buffer))
    assert {task: kept[task] + held_out.get(task, []) for task in SIZES} == whole


def test_the_parts_keep_the_shares_of_the_loss_and_the_buffer_stays():
    objective = make_objective({"a": 12, "b": 5})
    before = objective.buffer.counts
    for part in hold_out(objective, 0.4):
        assert part.buffer.shares() == objective.buffer.shares()
        assert sum(batch.share for batch in part.buffer.micro_batches(4)) == pytest.approx(1.0)
    assert objective.buffer.counts == before


def test_a_part_measures_its_own_samples_and_the_objective_counts_them():
    objective = make_objective({"a": 12, "b": 5})
    kept, held_out = hold_out(objective, 0.25)
    theta = objective.vector.read()
    by_hand = 0.0
    for task, share in objective.buffer.shares().items():
        (batch,) = held_out.buffer.micro_batches_of(task, 100)
        by_hand += share * objective.batch_loss(batch).item()
    assert held_out.loss(theta) == pytest.approx(by_hand)
    value, grad = kept.loss_and_grad(theta)
    assert objective.sample_gradients == 13
    step = 1e-6 * grad / grad.norm()
    assert kept.loss(theta + step) - value == pytest.approx(float(grad @ step), rel=1e-3)


def test_without_a_task_of_two_samples_nothing_can_be_held_out():
    with pytest.raises(ValueError, match="at least two of them"):
        hold_out(make_objective({"c": 1}), 0.25)


def test_minibatches_of_an_epoch_have_the_gradient_of_the_whole_in_the_mean():
    objective = make_objective()
    theta = objective.vector.read()
    count = Minibatches(6).per_epoch(objective.buffer)
    assert count == 3  # of 6 samples each
    gradient = Minibatches(6, seed=1).gradients(objective)
    for _ in range(2):
        mean = sum(gradient(theta)[1] for _ in range(count)) / count
        torch.testing.assert_close(mean, objective.loss_and_grad(theta)[1])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_no_more_goes_through_the_module_at_once_than_the_objective_allows(size):
    objective = make_objective()
    theta, passed, batch_loss = objective.vector.read(), [], objective.batch_loss
    expected = Minibatches(12, seed=1).gradients(objective)(theta)
    objective.batch_size = size
    objective.batch_loss = lambda batch: passed.append(len(batch.samples[0])) or batch_loss(batch)
    found = Minibatches(12, seed=1).gradients(objective)(theta)
    assert (max(passed) <= size, sum(passed)) == (True, 12)
    torch.testing.assert_close(found, expected)


def test_the_seed_decides_on_the_minibatches():
    objective = make_objective()
    theta = objective.vector.read()
    first, again, other = (Minibatches(4, seed).gradients(objective) for seed in (0, 0, 1))
    values = [[gradient(theta)[0] for _ in range(8)] for gradient in (first, again, other)]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 8
