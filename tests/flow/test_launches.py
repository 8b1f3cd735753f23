"""What a step costs on a device besides its passes: operations to launch, and numbers to wait for."""

import warnings

import pytest
import torch
from reads import Reads
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_odem import PaperODEMerge
from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.flow import Descent, RectifiedField, TransportField, Velocity, integrate
from lightning_odem.flow.blocks import Coordinates, WholeVector
from lightning_odem.methods import MergeContext, Minibatches
from lightning_odem.methods.needs import Calibration
from lightning_odem.parameters.vector import ParameterVector


class Operations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def loss_and_grad(theta):
    return theta.dot(theta), 2.0 * theta  # a loss that is read where it is used


@pytest.mark.parametrize(
    "blocks", ["vector", "coordinate", torch.tensor([3, 5, 2])], ids=["vector", "coordinate", "row"]
)
def test_a_step_of_the_path_reads_the_loss_and_the_projection_at_once(blocks):
    for steps in (3, 7):
        assert reads_of_path(steps, RectifiedField(blocks)) == steps + 2  # and the losses at both ends


def test_a_field_of_ones_own_gets_numbers_and_may_read_others():
    class Own(TransportField):
        def __call__(self, t, theta, theta1, grad, delta_loss):
            assert type(delta_loss) is float
            return super().__call__(t, theta, theta1, grad, delta_loss)

    assert reads_of_path(3, Own()) == reads_of_path(3, lambda *args: TransportField()(*args)) == 2 * 3 + 2


def reads_of_path(steps, field):
    theta0, theta1 = torch.ones(10), torch.arange(10.0)
    with Reads() as reads:
        path = integrate(theta0, theta1, loss_and_grad, 0.7, step_size=0.7 / steps, field=field)
    assert len(path.gamma) == steps
    return reads.number


@pytest.mark.parametrize("minibatches", [None, Minibatches(4)], ids=["whole buffer", "minibatches"])
@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["fp32", "fp16"])
def test_a_step_of_the_papers_rule_reads_once_in_all(scale, minibatches):
    torch.manual_seed(0)
    net, counts = nn.Linear(3, 2), {}
    buffer = CalibrationBuffer(12)
    for task in "ab":
        buffer.add(task, (torch.randn(6, 3), torch.arange(6) % 2))

    def batch_loss(batch):
        return cross_entropy(net(batch.samples[0]), batch.samples[1])

    objective = CalibrationObjective(ParameterVector(net), buffer, batch_loss, batch_size=2, loss_scale=scale)
    context = MergeContext(["weight", "bias"], [(2, 3), (2,)], needed={Calibration: objective})
    for steps in (3, 6):
        method = PaperODEMerge(step_size=0.5 / steps, minibatches=minibatches)
        with Reads() as reads:
            path = method.merge(torch.ones(8), torch.arange(8.0), 0.5, context).trajectory
        counts[len(path.gamma)] = reads.number
    (few, reads_of_few), (many, reads_of_many) = counts.items()
    assert reads_of_many - reads_of_few == many - few > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_the_gpu_once():
    theta0, theta1 = torch.ones(10, device="cuda"), torch.arange(10.0, device="cuda")
    counts = {}
    for steps in (3, 7):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                integrate(theta0, theta1, loss_and_grad, 0.7, step_size=0.7 / steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts[steps] = sum("synchronizing" in str(each.message) for each in found)
    assert counts[7] - counts[3] == 4


def test_a_step_of_the_descent_reads_the_loss():
    with Reads() as reads:
        Descent(torch.ones(10), 0.1, 5).follow(loss_and_grad, 5)
    assert reads.number == 5 + 1  # and whether the end is finite


def velocity(blocks, size, device):
    theta, theta1, grad = (torch.empty(size, device=device) for _ in range(3))
    return Velocity(theta, theta1, grad, 1.0, 0.5, 1.0, 0.5, 1.0, 1.0, blocks=blocks)


@pytest.mark.parametrize("blocks", [WholeVector(), Coordinates()], ids=["vector", "coordinate"])
def test_a_device_other_than_the_cpu_moves_a_large_model_in_few_launches(blocks):
    size = 87_000_000
    moved = velocity(blocks, size, "meta")
    with Operations() as operations:
        moved.add_to(moved.theta, 0.05)
    assert operations.number < 21 * 8
