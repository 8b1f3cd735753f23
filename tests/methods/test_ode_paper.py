import inspect
from types import SimpleNamespace

import pytest
import torch

from lightning_odem.flow import RectifiedField, integrate
from lightning_odem.methods import AverageMerge, MergeContext, ODEMerge, PaperODEMerge, method_name
from lightning_odem.methods.describe import describe_method

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


@pytest.mark.parametrize(
    "settings",
    [{}, {"step_size": 0.3}, {"step_size": 0.1, "solver": "heun"}, {"granularity": "coordinate"}],
)
def test_the_merge_is_the_flow_on_the_whole_buffer_stopped_at_the_operating_time(settings):
    field = RectifiedField(settings.get("granularity", "vector"))
    numbers = {name: value for name, value in settings.items() if name != "granularity"}
    expected = integrate(*endpoints(), loss_and_grad, 0.7, field=field, **numbers)
    merged, incoming = endpoints()
    result = PaperODEMerge(**settings).merge(merged, incoming, 0.7, context())
    assert torch.equal(result.theta, expected.theta)
    assert result.trajectory.as_dict() == expected.as_dict()
    assert result.theta is merged
    assert torch.equal(incoming, endpoints()[1])
    assert min(expected.gamma) < 1.0


def test_without_damping_it_is_the_running_average():
    def downhill(theta):
        return -float(theta[0]), torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)

    (merged, incoming), (other, _) = endpoints(), endpoints()
    merged[0] = other[0] = -2.0  # towards the incoming model the loss falls
    flow = PaperODEMerge().merge(merged, incoming, 0.4, context(loss_and_grad=downhill, loss=lambda x: downhill(x)[0]))
    assert set(flow.trajectory.gamma) == {1.0}
    torch.testing.assert_close(flow.theta, AverageMerge().merge(other, incoming, 0.4, context()).theta)


def test_it_costs_one_gradient_per_step_and_two_losses():
    calls = []

    def counted(name, function):
        return lambda theta: calls.append(name) or function(theta)

    counting = context(loss_and_grad=counted("gradient", loss_and_grad), loss=counted("loss", loss))
    PaperODEMerge(0.2).merge(*endpoints(), 0.5, counting)
    assert (calls.count("gradient"), calls.count("loss")) == (3, 2)


def test_it_tells_how_far_it_is():
    steps = []
    PaperODEMerge(0.25).merge(*endpoints(), 0.5, context(on_step=lambda *step: steps.append(step)))
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_it_is_ode_without_minibatches_and_descent():
    first, second = (
        method.merge(*endpoints(), 0.6, context())
        for method in (PaperODEMerge(0.1), ODEMerge(0.1, batch_size=None, descent=0.0))
    )
    assert torch.equal(first.theta, second.theta)
    assert first.trajectory.as_dict() == second.trajectory.as_dict()


def test_its_arguments_are_those_of_the_paper_and_describe_it():
    assert list(inspect.signature(PaperODEMerge).parameters) == ["step_size", "solver", "granularity"]
    method = PaperODEMerge()
    assert method_name(method) == "ode_paper"
    assert (method.operating_time, method.reuse, method.step_control) == ("utility", 1, False)
    described = {"name": "ode_paper", "step_size": 0.05, "solver": "euler", "granularity": "vector"}
    assert describe_method(method) == described
    assert describe_method(PaperODEMerge(0.1, "heun", "row")) == {
        "name": "ode_paper", "step_size": 0.1, "solver": "heun", "granularity": "row"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"solver": "rk4"}, "Unknown solver 'rk4'"),
        ({"granularity": "layer"}, "got 'layer'"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PaperODEMerge(**settings)


def test_calibration_is_what_it_needs():
    assert PaperODEMerge.needs == {"calibration"}
