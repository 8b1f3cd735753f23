"""What a step costs on a device besides its passes: operations to launch, and numbers to wait for."""

import warnings

import pytest
import torch
from reads import Reads
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_odem.flow import Descent, RectifiedField, Velocity, integrate
from lightning_odem.flow.blocks import Coordinates, WholeVector


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
def test_a_step_of_the_path_reads_the_loss_and_the_projection(blocks):
    theta0, theta1 = torch.ones(10), torch.arange(10.0)
    field, counts = RectifiedField(blocks), {}
    for steps in (3, 7):
        with Reads() as reads:
            path = integrate(theta0, theta1, loss_and_grad, 0.7, step_size=0.7 / steps, field=field)
        assert len(path.gamma) == steps
        counts[steps] = reads.number
    assert counts[7] - counts[3] == 2 * 4
    assert counts[3] == 2 * 3 + 2  # and the losses at both ends


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_the_gpu_twice():
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
    assert counts[7] - counts[3] == 2 * 4


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
