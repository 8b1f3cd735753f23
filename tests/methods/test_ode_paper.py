import inspect
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.flow import RectifiedField, ReusedGradient, StepControl, integrate
from lightning_odem.methods import (
    AverageMerge,
    MergeContext,
    MergeMethod,
    Minibatches,
    PaperODEMerge,
    SearchedTime,
    method_name,
)
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.needs import Calibration
from lightning_odem.methods.sampling import hold_out
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.report import StreamReport
from lightning_odem.report.figures import plot_path
from lightning_odem.stream.merging import merging

CURVATURE = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)


def loss(theta):
    return float(CURVATURE @ theta.square()) / 2


def loss_and_grad(theta):
    return loss(theta), CURVATURE * theta


def endpoints():
    return torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), torch.tensor([-0.5, 1.0, 1.0], dtype=torch.float64)


def context(on_step=None, **settings):
    objective = SimpleNamespace(**{"differentiate": loss_and_grad, "loss": loss} | settings)
    return MergeContext(["a"], [(3,)], needed={Calibration: objective}, on_step=on_step)


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
    flow = PaperODEMerge().merge(merged, incoming, 0.4, context(differentiate=downhill, loss=lambda x: downhill(x)[0]))
    assert set(flow.trajectory.gamma) == {1.0}
    torch.testing.assert_close(flow.theta, AverageMerge().merge(other, incoming, 0.4, context()).theta)


def test_it_costs_one_gradient_per_step_and_two_losses():
    calls = []

    def counted(name, function):
        return lambda theta: calls.append(name) or function(theta)

    counting = context(differentiate=counted("gradient", loss_and_grad), loss=counted("loss", loss))
    PaperODEMerge(0.2).merge(*endpoints(), 0.5, counting)
    assert (calls.count("gradient"), calls.count("loss")) == (3, 2)


def test_it_tells_how_far_it_is():
    steps = []
    PaperODEMerge(0.25).merge(*endpoints(), 0.5, context(on_step=lambda *step: steps.append(step)))
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_its_defaults_are_the_papers_and_its_arguments_describe_it():
    method = PaperODEMerge()
    assert method_name(method) == "ode_paper"
    described = {
        "name": "ode_paper", "step_size": 0.05, "solver": "euler", "granularity": "vector", "operating_time": "utility",
        "minibatches": None, "step_control": None,
    }  # fmt: skip
    parameters = inspect.signature(PaperODEMerge).parameters.values()
    settings = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert ["name", *settings] == list(described)
    assert describe_method(method) == described
    changed = {"step_size": 0.1, "solver": "heun", "granularity": "row"}
    assert describe_method(PaperODEMerge(0.1, "heun", "row")) == described | changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"\(0, 1\], got step_size=0.0"),
        ({"step_size": 1.5}, "step_size=1.5"),
        ({"operating_time": "best"}, "operating_time, unless a number, is one of utility, search, became, got 'best'"),
        ({"operating_time": 1.1}, "operating_time=1.1"),
        ({"granularity": "layer"}, "one of vector, tensor, row, coordinate, got 'layer'"),
        ({"solver": "rk4"}, "Unknown solver 'rk4'; the solvers are euler, heun"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PaperODEMerge(**settings)


def test_the_settings_of_parts_are_checked_by_them():
    refused = [
        (lambda: SearchedTime(factor=0.9), "factor=0.9"),
        (lambda: SearchedTime(holdout=0.0), "holdout=0.0"),
        (lambda: SearchedTime(holdout=1.0), "holdout=1.0"),
        (lambda: Minibatches(0), "size=0"),
        (lambda: ReusedGradient(times=0), "times=0"),
        (lambda: ReusedGradient("rk4"), "Unknown solver 'rk4'"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_parts_are_made_from_a_configuration():
    parser = ArgumentParser()
    parser.add_argument("--method", type=MergeMethod)
    path = "lightning_odem.methods"
    settings = {
        "solver": {"class_path": "lightning_odem.flow.ReusedGradient", "init_args": {"rule": "heun", "times": 4}},
        "operating_time": {"class_path": f"{path}.SearchedTime", "init_args": {"factor": 3.0}},
        "minibatches": {"size": 8},
        "step_control": {"tolerance": 0.1},
    }
    config = {"method": {"class_path": f"{path}.PaperODEMerge", "init_args": settings}}
    method = parser.instantiate_classes(parser.parse_object(config)).method
    parts = (SearchedTime(3.0), Minibatches(8), StepControl(0.1))
    expected = PaperODEMerge(0.05, ReusedGradient("heun", 4), "vector", *parts)
    assert describe_method(method) == describe_method(expected)


def test_calibration_is_what_it_needs():
    assert set(PaperODEMerge.needs) == {Calibration()}


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
    objective = SimpleNamespace(differentiate=hill, loss=lambda theta: hill(theta)[0])
    expected = integrate(merged, incoming, hill, 0.5, field=RectifiedField(blocks))
    context = MergeContext([f"p{i}" for i in range(len(shapes))], shapes, needed={Calibration: objective})
    result = PaperODEMerge(granularity=granularity).merge(merged.clone(), incoming, 0.5, context)
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
    calibration = CalibrationSet(buffer, lambda batch: mse_loss(net(batch.samples[0]), batch.samples[1]), batch_size=5)
    method = PaperODEMerge(step_size=0.5, granularity="row")
    with merging(net, method, task="new", t=0.5, merged=start, base={}, calibration=calibration) as made:
        assert made.record.path["gamma"] == pytest.approx([gamma])
        assert made.record.path["damped_share"][0] > 0.0
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


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
    context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], needed={Calibration: objective})
    return method.merge(merged.clone(), incoming, t, context), merged, incoming, objective


BY_8, CONTROL = Minibatches(8), StepControl()
OPTIONS = [
    {"operating_time": 0.3},
    {"operating_time": "search"},
    {"operating_time": "became"},
    {},
    {"minibatches": BY_8},
    {"solver": ReusedGradient(times=3)},
    {"granularity": "row"},
    {"step_control": CONTROL},
    {"operating_time": "search", "minibatches": BY_8, "solver": ReusedGradient("heun", 2)},
    {
        "operating_time": "search",
        "minibatches": BY_8,
        "solver": ReusedGradient("heun", 2),
        "step_control": CONTROL,
    },
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_task_without_weight_leaves_the_merged_model_untouched(options):
    result, merged, *_ = merge(PaperODEMerge(**options), t=0.0)
    assert torch.equal(result.theta, merged)
    assert result.t in (None, 0.0)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_task_that_alone_has_a_weight_overwrites_the_merged_model(options):
    result, _, incoming, _ = merge(PaperODEMerge(**options), t=1.0)
    assert torch.equal(result.theta, incoming)
    assert result.t in (None, 1.0)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_settings_give_the_same_model(options):
    first, second = (merge(PaperODEMerge(**options))[0] for _ in range(2))
    assert torch.equal(first.theta, second.theta)
    assert first.trajectory.as_dict() == second.trajectory.as_dict()


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_a_fixed_time_is_the_time_of_every_merge(t):
    result, *_ = merge(PaperODEMerge(operating_time=0.35), t)
    assert torch.equal(result.theta, merge(PaperODEMerge(), 0.35)[0].theta)
    assert result.t == 0.35
    assert torch.equal(merge(PaperODEMerge(operating_time=1.0), t)[0].theta, merge(PaperODEMerge(), 1.0)[0].theta)


@pytest.mark.parametrize("t", [0.1, 0.25, 0.4, 0.8])
@pytest.mark.parametrize(
    "options",
    [{}, {"minibatches": BY_8}, {"step_control": CONTROL}, {"solver": ReusedGradient(times=2)}],
)
def test_no_candidate_of_the_search_has_a_lower_loss_on_held_out_samples(t, options):
    result, merged, incoming, objective = merge(PaperODEMerge(operating_time="search", **options), t)
    path = result.trajectory
    assert path.held_out_t[0] >= t / (2 - t) - 1e-9
    assert path.held_out_t[-1] == 2 * t / (1 + t)
    _, held_out = hold_out(objective, 0.25)
    assert held_out.loss(result.theta) == min(path.held_out_loss)
    assert result.t == path.t[-1] == path.held_out_t[path.held_out_loss.index(min(path.held_out_loss))]
    assert len(path.loss) == len(path.gamma) + 1


def test_the_search_follows_the_gradient_of_the_other_samples():
    result, merged, incoming, objective = merge(PaperODEMerge(operating_time=SearchedTime(holdout=0.4)))
    kept, _ = hold_out(objective, 0.4)
    expected = integrate(merged, incoming, kept.loss_and_grad, 0.8 / 1.4, loss=kept.loss)
    steps = len(result.trajectory.gamma)
    assert result.trajectory.gamma == expected.gamma[:steps]
    assert result.trajectory.loss[:steps] == expected.loss[:steps]
    assert kept.loss(result.theta) == pytest.approx(result.trajectory.loss[-1])


def test_the_losses_at_both_ends_of_a_search_are_those_of_the_samples_learnt_from():
    result, merged, _, objective = merge(PaperODEMerge(operating_time="search", minibatches=Minibatches(8)))
    learnt, _ = hold_out(objective, 0.25)
    assert result.trajectory.loss[0] == pytest.approx(learnt.loss(merged))
    assert result.trajectory.loss[-1] == pytest.approx(learnt.loss(result.theta))


@pytest.mark.parametrize("size", [1, 8, 16, 40, 100])
@pytest.mark.parametrize("t", [0.05, 1 / 3, 0.4])
def test_minibatches_differentiate_as_many_samples_as_algorithm_1(size, t):
    *_, whole = merge(PaperODEMerge(), t)
    result, _, _, objective = merge(PaperODEMerge(minibatches=size and Minibatches(size)), t)
    assert objective.sample_gradients == whole.sample_gradients
    assert (objective.loss_evaluations, whole.loss_evaluations) == (3, 2)
    assert len(result.trajectory.gamma) == objective.gradient_evaluations
    assert objective.gradient_evaluations == whole.gradient_evaluations * -(-40 // size)
    assert result.trajectory.t[-1] == t


def test_a_minibatch_of_everything_is_the_whole_buffer():
    first, second = (merge(PaperODEMerge(minibatches=size and Minibatches(size)))[0] for size in (40, None))
    torch.testing.assert_close(first.theta, second.theta)


def test_minibatches_measure_the_ends_of_the_path_on_the_whole_buffer():
    result, merged, incoming, objective = merge(PaperODEMerge(minibatches=Minibatches(8)))
    path = result.trajectory
    assert path.loss[0] == objective.loss(merged)
    assert (path.loss[-1], path.loss1) == (objective.loss(result.theta), objective.loss(incoming))


def test_the_seed_decides_on_the_path_of_minibatches():
    first, second = (merge(PaperODEMerge(minibatches=Minibatches(8, seed)))[0] for seed in (0, 1))
    assert not torch.equal(first.theta, second.theta)


@pytest.mark.parametrize(("options", "gradients"), [({}, 3), ({"minibatches": BY_8}, 14), ({"rule": "heun"}, 3)])
def test_reused_gradients_are_taken_once(options, gradients):
    solver = ReusedGradient(options.pop("rule", "euler"), 3)
    result, _, _, objective = merge(PaperODEMerge(solver=solver, **options))  # 8 steps, or 40 with minibatches
    assert objective.gradient_evaluations == result.trajectory.gradient_evaluations == gradients
    assert result.trajectory.t[-1] == 0.4


def test_step_control_takes_the_steps_that_the_rule_says():
    result, merged, incoming, objective = merge(PaperODEMerge(step_size=0.2, step_control=StepControl()))
    path = integrate(
        merged, incoming, objective.loss_and_grad, 0.4, step_size=0.2, loss=objective.loss, control=StepControl()
    )
    assert torch.equal(result.theta, path.theta)
    assert result.trajectory.as_dict() == path.as_dict()


@pytest.mark.parametrize(("options", "t"), [({"operating_time": 0.1}, 0.1), ({"operating_time": 0.0}, 0.0), ({}, 0.5)])
def test_record_and_batch_norm_statistics_are_those_of_the_time_reached(options, t):
    net, before = make_net(1), make_net(2)
    for number, module in enumerate((net, before)):
        module[1].running_mean.fill_(number)  # 1 in the merged model
    start = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    objective = make_objective(net)
    calibration = CalibrationSet(objective.buffer, objective.batch_loss)
    settings = {"task": "c", "t": 0.5, "merged": start, "base": {}, "calibration": calibration}
    with merging(net, PaperODEMerge(**options), **settings) as made:
        assert (made.record.t, made.record.path["t"][-1]) == (t, t)
    torch.testing.assert_close(net[1].running_mean, torch.full((6,), 1 - t, dtype=torch.float64))
    if t == 0.0:
        assert all(torch.equal(tensor, start[name]) for name, tensor in net.state_dict().items())


def test_the_record_of_a_search_can_be_saved_and_drawn(tmp_path):
    net, before = make_net(1), make_net(2)
    objective = make_objective(net)
    calibration = CalibrationSet(objective.buffer, objective.batch_loss)
    settings = {"task": "c", "t": 0.5, "merged": before.state_dict(), "base": {}, "calibration": calibration}
    with merging(net, PaperODEMerge(0.2, operating_time="search", step_control=StepControl()), **settings) as made:
        record = made.record
    assert record.t == record.path["t"][-1]
    assert len(record.path["held_out_t"]) == len(record.path["held_out_loss"]) > 1
    report = StreamReport(["c"], [1.0], [[0.5]], [0.1], [0.6], [0.1], [record])
    assert StreamReport.load(report.save(tmp_path / "report.json")).merges[0].path == record.path
    assert len(plot_path(record).axes) == 2


def test_nothing_is_kept():
    _, incoming, _, objective = merge(method := PaperODEMerge())
    method.start(incoming, MergeContext([], []))
    assert method.state_dict() == {}


def test_an_average_that_the_flow_would_leave_behind_is_dropped():
    method = PaperODEMerge()
    method.load_state_dict({"average": {"weight": torch.ones(2)}, "samples": 8})
    assert method.state_dict() == {}


def test_a_stream_of_the_default_goes_on_with_the_papers_flow():
    method = PaperODEMerge()
    state = {"mean": {"weight": torch.ones(2)}, "sums": {}, "concentration": 1.0, "scale": 0.5}
    method.load_state_dict(state)
    assert method.state_dict() == {}
    with pytest.raises(ValueError, match="keeps no state"):
        method.load_state_dict({"average": {}, "shares": [1.0], "factors": []})


def test_the_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match="PaperODEMerge keeps no state, but the stream has one: scale, norms"):
        PaperODEMerge().load_state_dict({"scale": 1.0, "norms": []})
