import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.flow import NonFiniteLossError, RectifiedField, StepControl, integrate
from lightning_odem.merging import Calibration, merging
from lightning_odem.methods import AverageMerge, MergeContext, ODEMerge, PaperODEMerge
from lightning_odem.methods.cross_fit import best_share
from lightning_odem.methods.linalg import cosine
from lightning_odem.methods.sampling import halve, hold_out, minibatch_gradients
from lightning_odem.parameters import ParameterVector
from lightning_odem.report import StreamReport
from lightning_odem.report.figures import plot_path


def paper(**options):
    """An option by itself, on the paper's flow."""
    return ODEMerge(**{"batch_size": None, "descent": 0.0} | options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"\(0, 1\], got step_size=0.0"),
        ({"step_size": 1.5}, "step_size=1.5"),
        ({"operating_time": "best"}, "operating_time, unless a number, is one of utility, search, became, got 'best'"),
        ({"operating_time": 1.1}, "operating_time=1.1"),
        ({"search_to": 0.9}, "search_to=0.9"),
        ({"holdout": 0.0}, "holdout=0.0"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"descent": -0.1}, "descent=-0.1"),
        ({"step_control": True}, r"step_control takes steps back, .*\(descent=0.018\); set descent=0"),
        ({"reuse": 0}, "reuse=0"),
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
    calibration = Calibration(buffer, lambda batch: mse_loss(net(batch.samples[0]), batch.samples[1]), batch_size=5)
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
    context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], calibration=objective)
    return method.merge(merged.clone(), incoming, t, context), merged, incoming, objective


OPTIONS = [
    {"operating_time": 0.3},
    {"operating_time": "search"},
    {"operating_time": "became"},
    {},
    {"batch_size": 8},
    {"batch_size": None},
    {"reuse": 3},
    {"granularity": "row"},
    {"step_control": True, "descent": 0.0},
    {"operating_time": "search", "batch_size": 8, "reuse": 2, "solver": "heun"},
    {"operating_time": "search", "batch_size": 8, "reuse": 2, "step_control": True, "solver": "heun", "descent": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_task_without_weight_leaves_the_merged_model_untouched(options):
    result, merged, *_ = merge(ODEMerge(**options), t=0.0)
    assert torch.equal(result.theta, merged)
    assert result.t in (None, 0.0)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_task_that_alone_has_a_weight_overwrites_the_merged_model(options):
    result, _, incoming, _ = merge(ODEMerge(**options), t=1.0)
    assert torch.equal(result.theta, incoming)
    assert result.t in (None, 1.0)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_settings_give_the_same_model(options):
    first, second = (merge(ODEMerge(**options))[0] for _ in range(2))
    assert torch.equal(first.theta, second.theta)
    assert first.trajectory.as_dict() == second.trajectory.as_dict()


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_a_fixed_time_is_the_time_of_every_merge(t):
    result, *_ = merge(ODEMerge(operating_time=0.35), t)
    assert torch.equal(result.theta, merge(ODEMerge(), 0.35)[0].theta)
    assert result.t == 0.35
    assert torch.equal(merge(ODEMerge(operating_time=1.0), t)[0].theta, merge(ODEMerge(), 1.0)[0].theta)


@pytest.mark.parametrize("t", [0.1, 0.25, 0.4, 0.8])
@pytest.mark.parametrize("options", [{}, {"batch_size": 8}, {"step_control": True}, {"reuse": 2}])
def test_no_candidate_of_the_search_has_a_lower_loss_on_held_out_samples(t, options):
    result, merged, incoming, objective = merge(ODEMerge(operating_time="search", descent=0.0, **options), t)
    path = result.trajectory
    assert path.held_out_t[0] >= t / (2 - t) - 1e-9
    assert path.held_out_t[-1] == 2 * t / (1 + t)
    _, held_out = hold_out(objective, 0.25)
    assert held_out.loss(result.theta) == min(path.held_out_loss)
    assert result.t == path.t[-1] == path.held_out_t[path.held_out_loss.index(min(path.held_out_loss))]
    assert len(path.loss) == len(path.gamma) + 1


def test_the_search_follows_the_gradient_of_the_other_samples():
    result, merged, incoming, objective = merge(paper(operating_time="search", holdout=0.4))
    kept, _ = hold_out(objective, 0.4)
    expected = integrate(merged, incoming, kept.loss_and_grad, 0.8 / 1.4, loss=kept.loss)
    steps = len(result.trajectory.gamma)
    assert result.trajectory.gamma == expected.gamma[:steps]
    assert result.trajectory.loss[:steps] == expected.loss[:steps]
    assert kept.loss(result.theta) == pytest.approx(result.trajectory.loss[-1])


@pytest.mark.parametrize("size", [1, 8, 16, 40, 100])
@pytest.mark.parametrize("t", [0.05, 1 / 3, 0.4])
def test_minibatches_differentiate_as_many_samples_as_algorithm_1(size, t):
    *_, whole = merge(PaperODEMerge(), t)
    result, _, _, objective = merge(ODEMerge(batch_size=size, descent=0.0), t)
    assert objective.sample_gradients == whole.sample_gradients
    assert (objective.loss_evaluations, whole.loss_evaluations) == (3, 2)
    assert len(result.trajectory.gamma) == objective.gradient_evaluations
    assert objective.gradient_evaluations == whole.gradient_evaluations * -(-40 // size)
    assert result.trajectory.t[-1] == t


@pytest.mark.parametrize("descent", [0.0, 0.018])
def test_a_minibatch_of_everything_is_the_whole_buffer(descent):
    first, second = (merge(ODEMerge(batch_size=size, descent=descent))[0] for size in (40, None))
    torch.testing.assert_close(first.theta, second.theta)


def test_minibatches_measure_the_ends_of_the_path_on_the_whole_buffer():
    result, merged, incoming, objective = merge(ODEMerge(batch_size=8, descent=0.0))
    path = result.trajectory
    assert path.loss[0] == objective.loss(merged)
    assert (path.loss[-1], path.loss1) == (objective.loss(result.theta), objective.loss(incoming))


def test_the_seed_decides_on_the_path_of_minibatches():
    first, second = (merge(ODEMerge(batch_size=8, seed=seed))[0] for seed in (0, 1))
    assert not torch.equal(first.theta, second.theta)


@pytest.mark.parametrize(("options", "gradients"), [({}, 3), ({"batch_size": 8}, 14), ({"solver": "heun"}, 3)])
def test_reused_gradients_are_taken_once(options, gradients):
    result, _, _, objective = merge(ODEMerge(reuse=3, descent=0.0, **options))  # 8 steps, or 40 with minibatches
    assert objective.gradient_evaluations == result.trajectory.gradient_evaluations == gradients
    assert result.trajectory.t[-1] == 0.4


def test_step_control_takes_the_steps_that_the_rule_says():
    result, merged, incoming, objective = merge(paper(step_size=0.2, step_control=True))
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
    calibration = Calibration(objective.buffer, objective.batch_loss)
    settings = {"task": "c", "t": 0.5, "merged": start, "base": {}, "calibration": calibration}
    with merging(net, ODEMerge(**options), **settings) as made:
        assert (made.record.t, made.record.path["t"][-1]) == (t, t)
    torch.testing.assert_close(net[1].running_mean, torch.full((6,), 1 - t, dtype=torch.float64))
    if t == 0.0:
        assert all(torch.equal(tensor, start[name]) for name, tensor in net.state_dict().items())


def test_the_record_of_a_search_can_be_saved_and_drawn(tmp_path):
    net, before = make_net(1), make_net(2)
    objective = make_objective(net)
    calibration = Calibration(objective.buffer, objective.batch_loss)
    settings = {"task": "c", "t": 0.5, "merged": before.state_dict(), "base": {}, "calibration": calibration}
    with merging(net, ODEMerge(0.2, operating_time="search", step_control=True, descent=0.0), **settings) as made:
        record = made.record
    assert record.t == record.path["t"][-1]
    assert len(record.path["held_out_t"]) == len(record.path["held_out_loss"]) > 1
    report = StreamReport(["c"], [1.0], [[0.5]], [0.1], [0.6], [0.1], [record])
    assert StreamReport.load(report.save(tmp_path / "report.json")).merges[0].path == record.path
    assert len(plot_path(record).axes) == 2


# ---------------------------------------------------------------------------------------------------- the descent


@pytest.mark.parametrize(
    ("t", "step_size", "size"),
    [(0.4, 0.05, 8), (0.4, 0.05, None), (1 / 3, 0.1, 16), (0.02, 0.05, 8), (0.02, 0.05, None), (0.4, 0.05, 64)],
)
@pytest.mark.parametrize("most", [2, 100])
def test_a_path_is_transport_rectification_and_adam_written_out(t, step_size, size, most):
    """Both halves' paths, judged and averaged as the docstrings say."""
    result, merged, incoming, objective = merge(
        ODEMerge(step_size, batch_size=size, descent=0.02, epochs=most, seed=5), t
    )
    epochs = min(math.ceil(t / step_size - 1e-9), most)
    distance = float((incoming - merged).square().mean().sqrt())
    length = 0.02 * distance * epochs**0.5 * (40 / size if size else 1)
    halves, ends = halve(objective), []
    for half in halves:
        samples = len(half.buffer)
        assert samples == 20
        steps = epochs * (math.ceil(samples / size) if size else 1)
        gradient = minibatch_gradients(objective, half.buffer, size or samples, seed=5)
        # Whole-buffer steps have length h and a shorter last one, those of minibatches are all alike.
        times = [min(k * (t / steps if size or epochs == most else step_size), t) for k in range(steps)] + [t]
        budget = max(half.loss(incoming) - half.loss(merged), 0.0)
        theta, mean, square = merged.clone(), torch.zeros_like(merged), torch.zeros_like(merged)
        for k, (now, later) in enumerate(zip(times, times[1:], strict=False), start=1):
            g = gradient(theta)[1]
            u = (incoming - theta) / (1 - now)
            rise = float(g @ u)
            v = u - (1 - min(budget / rise, 1.0)) * rise / float(g @ g) * g if rise > 0 else u
            mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
            direction = mean / (1 - 0.9**k) / (square / (1 - 0.99**k)).sqrt()
            covered = length * ((1 - now / t) ** 2 - (1 - later / t) ** 2)
            theta = theta + (later - now) * v - covered * direction.nan_to_num()
        ends.append(theta)
    straight = torch.lerp(merged, incoming, t)
    unseen = [
        sum(other.loss(straight + s * (end - straight)) for other, end in zip(halves[::-1], ends, strict=True)) / 2
        for s in (0.0, 0.5, 1.0)
    ]
    share = best_share(unseen, cosine(*(end - straight for end in ends)))
    assert share > 0.0
    expected = straight + share * ((ends[0] + ends[1]) / 2 - straight)
    torch.testing.assert_close(result.theta, expected, rtol=1e-7, atol=1e-8)
    assert result.trajectory.departure_loss == pytest.approx(unseen)
    assert result.trajectory.departure_taken == [pytest.approx(share)]


@pytest.mark.parametrize("t", [1e-2, 1e-5, 1e-8])
def test_a_task_of_hardly_any_weight_leaves_one_epoch_of_descent_from_the_average(t):
    result, merged, incoming, _ = merge(ODEMerge(batch_size=8), t)
    distance = float((incoming - merged).square().mean().sqrt())
    furthest = float((result.theta - merged).abs().max())
    assert 1e-3 * distance < furthest <= t * float((incoming - merged).abs().max()) + 2.35 * 0.018 * distance * 5


def merge_linear(method, seed, t, scale=1.0):
    """Two linear classifiers, whose loss is convex; the incoming one is ``scale`` times a random one."""
    torch.manual_seed(seed)
    net = nn.Linear(3, 4).double()
    vector, objective = ParameterVector(net), make_objective(net)
    merged, incoming = torch.randn(2, len(vector), dtype=torch.float64)
    context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], calibration=objective)
    incoming *= scale
    return method.merge(merged.clone(), incoming, t, context), merged, incoming, objective


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_loss_of_a_convex_problem_is_lower_than_the_averages(t, seed):
    (descended, _, _, objective), (averaged, *_) = (
        merge_linear(method, seed, t) for method in (ODEMerge(batch_size=8), AverageMerge())
    )
    assert objective.loss(descended.theta) < objective.loss(averaged.theta) - 0.01


@pytest.mark.parametrize("t", [0.1, 0.25, 0.4])
def test_no_weight_is_further_from_the_path_without_descent_than_the_length_allows(t):
    """Where nothing is damped, the transport draws both paths to the same model, and so to each other."""
    (first, merged, incoming, _), (second, *_) = (
        merge_linear(ODEMerge(batch_size=None, descent=d), 0, t, scale=0.1) for d in (0.02, 0.0)
    )
    assert {*first.trajectory.gamma, *second.trajectory.gamma} == {1.0}
    length = 0.02 * float((incoming - merged).square().mean().sqrt()) * math.ceil(t / 0.05 - 1e-9) ** 0.5
    (share,) = first.trajectory.departure_taken
    assert 0.0 < float((first.theta - second.theta).abs().max()) <= share * 2.35 * length


def test_samples_that_do_not_count_do_not_lengthen_the_descent():
    def merged_with(*tasks):
        net = make_net()
        full, buffer = make_objective(net), CalibrationBuffer(100, shares="utility")
        held = {batch.task: batch.samples for batch in full.micro_batches()}
        for task in tasks:
            buffer.add(task, held[task], weight=float(task != "b"))
        vector = full.vector
        objective = CalibrationObjective(vector, buffer, full.batch_loss)
        context = MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], calibration=objective)
        merged, incoming = (ParameterVector(make_net(seed)).read() for seed in (1, 2))
        return ODEMerge(batch_size=8).merge(merged, incoming, 0.4, context).theta

    torch.testing.assert_close(merged_with("a", "c", "b"), merged_with("a", "c"), rtol=1e-12, atol=1e-12)


def test_weights_that_are_not_finite_are_reported_as_such():
    net, before = make_net(1), make_net(2)
    net[0].weight.data[0, 0] = math.nan
    objective = make_objective(net)
    calibration = Calibration(objective.buffer, objective.batch_loss)
    settings = {"task": "c", "t": 0.5, "merged": before.state_dict(), "base": {}, "calibration": calibration}
    message = "Merging task 'c': the loss of the incoming model is nan"
    with pytest.raises(NonFiniteLossError, match=message), merging(net, ODEMerge(), **settings):
        pass


def test_calibration_is_what_it_needs():
    assert ODEMerge.needs == {"calibration"}


def test_the_losses_at_both_ends_of_a_search_are_those_of_the_samples_learnt_from():
    result, merged, _, objective = merge(ODEMerge(operating_time="search", batch_size=8, descent=0.0))
    learnt, _ = hold_out(objective, 0.25)
    assert result.trajectory.loss[0] == pytest.approx(learnt.loss(merged))
    assert result.trajectory.loss[-1] == pytest.approx(learnt.loss(result.theta))


@pytest.mark.parametrize("method", [paper(), PaperODEMerge()])
def test_without_descent_nothing_is_kept(method):
    _, incoming, _, objective = merge(method)
    method.start(incoming, MergeContext([], []))
    assert method.state_dict() == {}


def test_the_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match="keeps an average, but the stream's state has: scale, norms"):
        ODEMerge().load_state_dict({"scale": 1.0, "norms": []})
