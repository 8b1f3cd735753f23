from types import SimpleNamespace

import pytest
import torch

from lightning_odem.flow import integrate
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
        ({"solver": "rk4"}, "Unknown solver 'rk4'; the solvers are euler, heun"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ODEMerge(**settings)


def test_calibration_is_what_it_needs():
    assert ODEMerge.needs == {"calibration"}
