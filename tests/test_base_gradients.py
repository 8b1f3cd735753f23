import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from toy import Classifier

from lightning_odem.attach import attached
from lightning_odem.base_gradients import BaseGradients
from lightning_odem.batch_norm import BatchNormStatistics
from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.further import FurtherSamples
from lightning_odem.calibration.prediction_loss import LogitsLoss
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.parameters import ParameterVector
from lightning_odem.snapshot import take_snapshot, undisturbed

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(11, 4, generator=GENERATOR), torch.randint(2, (11,), generator=GENERATOR)


def make_net(seed):
    """A network in eval mode whose batch-norm statistics are no one else's."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double().eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def make(net, base, held=4, scale=1.0, batch_size=3):
    """Of one task ``held`` samples in the buffer and the rest beyond it, and one sample of an earlier task."""
    buffer = CalibrationBuffer(held + 1, balanced=False)
    buffer.add("old", (INPUTS[:1].double(), LABELS[:1]))
    buffer.add("new", (INPUTS[:held].double(), LABELS[:held]))
    vector = ParameterVector(net)
    loss = lambda batch: scale * cross_entropy(net(batch.samples[0]), batch.samples[1])  # noqa: E731
    objective = CalibrationObjective(vector, buffer, loss, batch_size)
    further = FurtherSamples(TensorDataset(INPUTS.double(), LABELS), torch.arange(held, 11))
    statistics = BatchNormStatistics(net, (), "average")
    return BaseGradients(objective, take_snapshot(base), vector.read(), statistics, "new", further), objective


def by_autograd(net, inputs, labels):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(cross_entropy(net(inputs), labels), list(net.parameters()))]
    )


@pytest.mark.parametrize("held", [1, 4, 11])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_tasks_gradient_is_that_of_all_its_samples_in_the_base_model_with_its_statistics(held, batch_size):
    base = make_net(1)
    at_base, objective = make(make_net(2), base, held, batch_size=batch_size)
    found, count = at_base.of_task()
    torch.testing.assert_close(found, by_autograd(base, INPUTS.double(), LABELS), rtol=1e-12, atol=1e-14)
    assert (count, objective.sample_gradients) == (11, 11)


def test_a_gradient_of_given_samples_is_taken_there_too():
    base = make_net(1)
    at_base, objective = make(make_net(2), base)
    found = at_base.of(list(objective.buffer.micro_batches_of("new", 3)))
    torch.testing.assert_close(found, by_autograd(base, INPUTS[:4].double(), LABELS[:4]), rtol=1e-12, atol=1e-14)


def test_statistics_are_afterwards_those_before():
    net = make_net(2)
    at_base, objective = make(net, make_net(1))
    before = [buffer.clone() for buffer in net.buffers()]
    at_base.of_task()
    at_base.of(objective.micro_batches())
    assert all(torch.equal(kept, now) for kept, now in zip(before, net.buffers(), strict=True))


def test_progress_is_told_by_micro_batches():
    at_base, _ = make(make_net(2), make_net(1))
    steps = []
    at_base.of_task(lambda done, total: steps.append((done, total)))
    assert steps == [(done, 5) for done in range(5)]


def test_a_loss_that_is_not_finite_at_the_base_model_is_an_error_and_leaves_the_statistics():
    net = make_net(2)
    at_base, _ = make(net, make_net(1), scale=float("inf"))
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(NonFiniteLossError, match="the loss at the base model is inf"):
        at_base.of_task()
    assert all(torch.equal(kept, now) for kept, now in zip(before, net.buffers(), strict=True))


def test_further_samples_are_measured_against_the_logits_of_the_incoming_model():
    """Whose gradient is zero where base and incoming model are the same, statistics included, and not otherwise."""
    norms = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = Classifier(batch_norm=True)
        module.body[1].running_mean.normal_()
        if seed == 1:
            base = take_snapshot(module)
        with attached(module), undisturbed(module):
            loss, vector = LogitsLoss(module), ParameterVector(module)
            buffer = CalibrationBuffer(2, balanced=False)
            buffer.add("new", (INPUTS[:2], LABELS[:2]))
            with torch.no_grad():
                buffer.store_logits("new", loss.scores(next(buffer.micro_batches(2))))
            statistics = BatchNormStatistics(module, (), "average")
            further = FurtherSamples(TensorDataset(INPUTS, LABELS), torch.arange(2, 11))
            objective = CalibrationObjective(vector, buffer, loss, 4)
            at_base = BaseGradients(objective, base, vector.read(), statistics, "new", further)
            norms.append(float(at_base.of_task()[0].norm()))
    assert norms[0] < 1e-6 < 1e-2 < norms[1]
