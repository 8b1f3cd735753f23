from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.flow import RectifiedField, integrate
from lightning_odem.merging import Calibration, merging
from lightning_odem.methods import AverageMerge, MergeContext, ODEMerge

CURVATURE = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)


def loss(theta):
    return float(CURVATURE @ theta.square()) / 2


def loss_and_grad(theta):
    return loss(theta), CURVATURE * theta


def endpoints():
    return torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), torch.tensor([-0.5, 1.0, 1.0], dtype=torch.float64)


def context(on_step=None, **settings):
    objective = SimpleNamespace(**{"loss_and_grad": loss_and_grad, "loss": loss} | settings)
    return MergeContext(["a"], [(3,)], calibration=objective, on_step=on_step)


@pytest.mark.parametrize(("step_size", "solver"), [(0.05, "euler"), (0.3, "euler"), (0.1, "heun")])
def test_the_merge_is_the_flow_stopped_at_the_operating_time(step_size, solver):
    expected = integrate(*endpoints(), loss_and_grad, 0.7, step_size=step_size, solver=solver)
    merged, incoming = endpoints()
    result = ODEMerge(step_size, solver).merge(merged, incoming, 0.7, context())
    assert torch.equal(result.theta, expected.theta)
    assert result.trajectory.as_dict() == expected.as_dict()
    assert result.theta is merged
    assert torch.equal(incoming, endpoints()[1])


def test_without_damping_it_is_the_running_average():
    def downhill(theta):
        return -float(theta[0]), torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)

    (merged, incoming), (other, _) = endpoints(), endpoints()
    merged[0] = other[0] = -2.0  # towards the incoming model the loss falls
    flow = ODEMerge().merge(merged, incoming, 0.4, context(loss_and_grad=downhill, loss=lambda x: downhill(x)[0]))
    assert set(flow.trajectory.gamma) == {1.0}
    torch.testing.assert_close(flow.theta, AverageMerge().merge(other, incoming, 0.4, context()).theta)


def test_it_costs_one_gradient_per_step_and_two_losses():
    calls = []

    def counted(name, function):
        return lambda theta: calls.append(name) or function(theta)

    counting = context(loss_and_grad=counted("gradient", loss_and_grad), loss=counted("loss", loss))
    ODEMerge(0.2).merge(*endpoints(), 0.5, counting)
    assert (calls.count("gradient"), calls.count("loss")) == (3, 2)


def test_it_tells_how_far_it_is():
    steps = []
    ODEMerge(0.25).merge(*endpoints(), 0.5, context(on_step=lambda *step: steps.append(step)))
    assert steps == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"\(0, 1\], got step_size=0.0"),
        ({"step_size": 1.5}, "step_size=1.5"),
        ({"granularity": "layer"}, "one of vector, tensor, row, coordinate, got 'layer'"),
        ({"solver": "rk4"}, "Unknown solver 'rk4'; the solvers are euler, heun"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ODEMerge(**settings)


@pytest.mark.parametrize(
    ("granularity", "blocks"),
    [
        ("vector", "vector"),
        ("tensor", torch.tensor([12, 3, 16, 2, 1])),
        ("row", torch.tensor([4, 4, 4, 3, 8, 8, 2, 1])),
        ("coordinate", "coordinate"),
    ],
)
def test_the_granularity_cuts_parameters_into_blocks(granularity, blocks):
    shapes = [(3, 4), (3,), (2, 2, 2, 2), (0, 5), (2,), ()]
    generator = torch.Generator().manual_seed(0)
    merged, incoming = torch.randn(2, 34, generator=generator, dtype=torch.float64)

    def hill(theta):
        return -float((theta - top).square().sum()) / 2, top - theta

    top = incoming + torch.randn(34, generator=generator, dtype=torch.float64)
    objective = SimpleNamespace(loss_and_grad=hill, loss=lambda theta: hill(theta)[0])
    expected = integrate(merged, incoming, hill, 0.5, field=RectifiedField(blocks))
    context = MergeContext([f"p{i}" for i in range(len(shapes))], shapes, calibration=objective)
    result = ODEMerge(granularity=granularity).merge(merged.clone(), incoming, 0.5, context)
    assert torch.equal(result.theta, expected.theta)
    assert result.trajectory.as_dict() == expected.as_dict()
    assert max(expected.damped_share) > 0.1


def test_a_module_is_rectified_row_by_row():
    """One step of a module's merge against the rule written out on its parameters."""
    torch.manual_seed(0)
    net, before = (nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4)).double() for _ in range(2))
    inputs, targets = torch.randn(16, 2, 4, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
    start = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    incoming = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    losses = [mse_loss(module(inputs), targets) for module in (before, net)]
    losses[0].backward()
    blocks = []
    for name, parameter in before.named_parameters():
        transport = incoming[name] - start[name]
        for row in range(len(parameter)) if parameter.dim() > 1 else [...]:
            blocks.append((name, row, parameter.grad[row], transport[row]))
    rise = sum(max(float((g * u).sum()), 0.0) for *_, g, u in blocks)
    gamma = min(max((losses[1] - losses[0]).item(), 0.0) / rise, 1.0)
    expected = {name: tensor.clone() for name, tensor in start.items()}
    for name, row, g, u in blocks:
        along = (g * u).sum()
        v = u - (1 - gamma) * along / (g * g).sum() * g if along > 0 else u
        expected[name][row] += 0.5 * v

    buffer = CalibrationBuffer(16)
    buffer.add("new", (inputs, targets))
    calibration = Calibration(buffer, lambda batch: mse_loss(net(batch.samples[0]), batch.samples[1]), batch_size=5)
    method = ODEMerge(step_size=0.5, granularity="row")
    with merging(net, method, task="new", t=0.5, merged=start, base={}, calibration=calibration) as record:
        assert record.path["gamma"] == pytest.approx([gamma])
        assert record.path["damped_share"][0] > 0.0
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_calibration_is_what_it_needs():
    assert ODEMerge.needs == {"calibration"}
