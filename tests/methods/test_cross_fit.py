import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.methods import AverageMerge, MergeContext, MergeResult, ODEMerge, PaperODEMerge
from lightning_odem.methods.cross_fit import CrossFit, best_share
from lightning_odem.parameters import ParameterVector

SIZES = {"a": 30, "b": 9, "c": 21}


def make_vector(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return ParameterVector(nn.Linear(6, 4).to(dtype)).read()


def make_stream(sizes=SIZES, noise=0.0, dtype=torch.float64):
    """A linear classifier and samples whose classes follow from the inputs, but for a share of noise."""
    torch.manual_seed(0)
    net, teacher = nn.Linear(6, 4).to(dtype), torch.randn(6, 4, dtype=dtype)
    buffer = CalibrationBuffer(sum(sizes.values()))
    for task, size in sizes.items():
        inputs = torch.randn(size, 6, dtype=dtype)
        classes = (inputs @ teacher).argmax(1)
        buffer.add(task, (inputs, torch.where(torch.rand(size) < noise, torch.randint(4, (size,)), classes)))
    vector = ParameterVector(net)
    objective = CalibrationObjective(
        vector, buffer, lambda batch: cross_entropy(net(batch.samples[0]), batch.samples[1])
    )
    shapes = [tuple(shape) for shape in vector.shapes]
    return objective, MergeContext(vector.names, shapes, calibration=objective)


def merge_all(method, context, times=(0.5, 0.25)):
    """Three random classifiers merged in sequence: the models and every result."""
    models = [make_vector(seed) for seed in (1, 2, 3)]
    results = [method.start(models[0].clone(), context)]
    for incoming, t in zip(models[1:], times, strict=True):
        results.append(method.merge(results[-1].theta.clone(), incoming, t, context))
    return models, results


METHOD = {"batch_size": 8, "descent": 0.03}


@pytest.mark.parametrize(
    ("losses", "cosine", "share"),
    [
        ([3.0, 2.0, 3.0], 1.0, 0.5),
        ([3.0, 2.0, 3.0], 0.0, 1.0),
        ([3.0, 2.75, 3.5], 1.0, 0.375),
        ([3.0, 2.75, 3.5], 0.0, 0.75),
        ([3.0, 2.75, 3.5], -0.5, 1.0),
        ([3.0, 3.25, 4.0], 0.0, 0.0),  # the parabola's vertex is at 0
        ([5.0, 3.0, 2.0], 1.0, 1.0),  # beyond 1
        ([1.0, 1.0, 1.0], 0.0, 0.0),
        ([3.0, 2.0, 1.0], 0.0, 1.0),
        ([1.0, 2.0, 1.0], 0.0, 0.0),  # no minimum
        ([1.0, 0.5, math.inf], 0.0, 0.0),
        ([1.0, math.nan, math.inf], 0.0, 0.0),
        ([1.0, 1.0 - 6e-8, 1.0 - 1.2e-7], 0.5, 0.0),  # rounding confirms nothing
        ([1.0, 1.0 + 6e-8, 1.0 - 6e-8], 0.5, 0.0),
        ([3.0, 2.75, 3.5], -1.0, 1.0),  # departures that cancel, as a little before
        ([3.0, 2.75, 3.5], -1.0 - 1e-15, 1.0),
    ],
)
def test_the_share_is_where_the_parabola_of_the_mean_is_lowest(losses, cosine, share):
    assert best_share(losses, cosine) == pytest.approx(share)


def test_the_share_minimises_the_mean_loss_of_a_quadratic_with_noisy_departures():
    """Departures of one signal and noise of their own: the share is found from each, and is right for their mean."""
    generator = torch.Generator().manual_seed(0)
    d, signal = 20000, torch.randn(20000, generator=generator, dtype=torch.float64)
    loss = lambda theta: float((theta - 0.6 * signal).square().sum()) / d  # noqa: E731
    first, second = (signal + 1.5 * torch.randn(d, generator=generator, dtype=torch.float64) for _ in range(2))
    unseen = [(loss(s * first) + loss(s * second)) / 2 for s in (0.0, 0.5, 1.0)]
    c = float(first @ second / first.norm() / second.norm())
    mean = (first + second) / 2
    best = 0.6 * float(mean @ signal / (mean @ mean))  # in closed form
    assert best_share(unseen, c) == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_only_fit_their_own_samples_leave_the_running_average_bit_by_bit(dtype):
    """Classes unrelated to the inputs, and a long descent: what one half says is wrong for the other."""
    objective, context = make_stream({"a": 24, "b": 24}, noise=1.0, dtype=dtype)
    fallen_back = 0
    models = [make_vector(seed, dtype) for seed in (1, 2, 3)]
    for seed in range(4):
        ode, average = ODEMerge(batch_size=8, descent=1.0, seed=seed), AverageMerge()
        theta, mean = (method.start(models[0].clone(), context).theta.clone() for method in (ode, average))
        for incoming, t in zip(models[1:], (0.5, 0.25), strict=True):
            result = ode.merge(theta, incoming, t, context)
            theta, mean = result.theta, average.merge(mean, incoming, t, context).theta
            path = result.trajectory
            if path.departure_taken == [0.0]:
                assert torch.equal(theta, mean)
                assert path.departure_loss[0] < path.departure_loss[-1]
                fallen_back += 1
            else:
                assert not torch.equal(theta, mean)
    assert fallen_back


def test_what_generalises_is_taken_and_lowers_the_loss_on_new_samples():
    objective, context = make_stream()
    fresh, _ = make_stream({"a": 2000})
    models, results = merge_all(ODEMerge(**METHOD), context)
    average = torch.lerp(torch.lerp(models[0], models[1], 0.5), models[2], 0.25)
    assert results[-1].trajectory.departure_taken[0] > 0.5
    assert fresh.loss(results[-1].theta) < fresh.loss(average) - 0.1


@pytest.mark.parametrize("descent", [0.5, 1.0])
def test_a_descent_that_is_far_too_long_is_shortened(descent):
    objective, context = make_stream(noise=0.3)
    fresh, _ = make_stream({"a": 2000}, noise=0.3)
    models, results = merge_all(ODEMerge(batch_size=8, descent=descent), context)
    average = torch.lerp(models[0], models[1], 0.5)
    assert 0.0 < results[1].trajectory.departure_taken[0] < 1.0
    assert fresh.loss(results[1].theta) < fresh.loss(average)


@pytest.mark.parametrize("t", [0.02, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [8, 64, None])
def test_with_as_many_epochs_both_paths_together_cost_the_gradients_of_algorithm_1(t, size):
    cost = []
    for method in (ODEMerge(batch_size=size, epochs=20), PaperODEMerge()):
        objective, context = make_stream()
        result = method.merge(make_vector(1), make_vector(2), t, context)
        cost.append(objective.sample_gradients)
        assert result.trajectory.gradient_evaluations == objective.gradient_evaluations
    assert cost[0] == cost[1] > 0


def test_losses_of_the_record_are_means_of_the_halves_and_of_the_merged_model():
    objective, context = make_stream({"a": 30, "b": 10})
    models, results = merge_all(ODEMerge(**METHOD), context)
    path = results[1].trajectory  # its paths begin at the first model
    assert path.loss[0] == pytest.approx(objective.loss(models[0]), rel=1e-12)
    path = results[2].trajectory
    assert path.loss1 == pytest.approx(objective.loss(models[2]), rel=1e-12)
    assert path.loss[-1] == objective.loss(results[-1].theta)
    assert (path.t[-1], path.estimated, path.theta is results[-1].theta) == (0.25, True, True)


def test_paths_go_on_where_their_halfs_departure_ended():
    """From any model: the merged one given is the average with the mean of both departures."""
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD), context)
    state = method.state_dict()
    average, *ends = (
        torch.cat([state[key][name].flatten() for name in context.names])
        for key in ("average", "departure_a", "departure_b")
    )
    torch.testing.assert_close(average + (ends[0] + ends[1]) / 2, results[-1].theta, rtol=1e-12, atol=1e-12)
    further = method.merge(torch.zeros_like(average), models[0], 0.2, context).theta
    again = ODEMerge(**METHOD)
    again.load_state_dict(state)
    assert torch.equal(again.merge(torch.zeros_like(average), models[0], 0.2, context).theta, further)
    begun = ODEMerge(**METHOD)
    begun.load_state_dict({"average": state["average"]})
    assert not torch.equal(begun.merge(torch.zeros_like(average), models[0], 0.2, context).theta, further)


def test_a_path_knows_nothing_of_the_other_halfs_samples_in_any_merge():
    ends = []
    for change in (0, 1):
        objective, context = make_stream({"a": 20, "b": 20})
        state = objective.buffer.state_dict()
        for number, held in enumerate(state["tasks"].values()):
            held["samples"][1][number % 2 :: 2][:change] += 1  # the label of a sample of the second half
            held["samples"][1].remainder_(4)
        objective.buffer.load_state_dict(state)
        method = ODEMerge(**METHOD)
        _, results = merge_all(method, context)
        assert [result.trajectory.departure_taken for result in results[1:]] == [[1.0], [1.0]]  # alike in both
        ends.append([method.state_dict()[key]["weight"] for key in ("departure_a", "departure_b")])
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_after_a_merge_that_fell_back_paths_begin_at_the_running_average():
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD), context)
    state = method.state_dict()
    for key in ("departure_a", "departure_b"):
        state[key] = {name: torch.zeros_like(piece) for name, piece in state[key].items()}
    method.load_state_dict(state)
    begun = ODEMerge(**METHOD)
    begun.load_state_dict({"average": state["average"]})
    ends = [rule.merge(results[-1].theta.clone(), models[0], 0.2, context).theta for rule in (method, begun)]
    assert torch.equal(*ends)


def test_a_path_that_ends_nowhere_leaves_the_average_and_a_finite_state():
    _, context = make_stream()
    cross_fit, average, incoming = CrossFit(), make_vector(1), make_vector(2)
    cross_fit.start(average, context)

    def follow(start, incoming, t, context, unseen, correction):
        return MergeResult(torch.full_like(start, math.inf))

    result = cross_fit.merge(follow, average.clone(), incoming, 0.25, context)
    assert torch.equal(result.theta, torch.lerp(average, incoming, 0.25))
    assert not any(
        piece.any() for key in ("departure_a", "departure_b") for piece in cross_fit.state_dict()[key].values()
    )


def named(flat, context):
    pieces = flat.split([math.prod(shape) for shape in context.shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(context.names, pieces, context.shapes, strict=True)}


def test_the_average_kept_is_that_of_the_incoming_models_by_operating_time():
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD), context)
    expected = named(torch.lerp(torch.lerp(models[0], models[1], 0.5), models[2], 0.25), context)
    found = method.state_dict()["average"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_search_keeps_the_average_at_the_mean_of_the_times_that_the_halves_chose():
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD, operating_time="search"), context)
    first, second = (result.t for result in results[1:])
    assert 1 / 3 - 1e-9 <= first <= 2 / 3 + 1e-9
    expected = named(torch.lerp(torch.lerp(models[0], models[1], first), models[2], second), context)
    for name, piece in expected.items():
        torch.testing.assert_close(method.state_dict()["average"][name], piece, rtol=1e-13, atol=1e-13)


def test_a_task_without_weight_leaves_the_average_and_the_merged_model():
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD), context, times=(0.5, 0.0))
    assert torch.equal(results[2].theta, results[1].theta)
    for name, piece in named(torch.lerp(models[0], models[1], 0.5), context).items():
        assert torch.equal(method.state_dict()["average"][name], piece)


def test_a_task_that_alone_has_a_weight_leaves_its_own_model():
    _, context = make_stream()
    models, results = merge_all(ODEMerge(**METHOD), context, times=(0.5, 1.0))
    assert torch.equal(results[2].theta, models[2])


def test_a_merge_leaves_the_state_that_was_returned_before_it():
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD), context)
    state = method.state_dict()
    before = {name: tensor.clone() for name, tensor in state["average"].items()}
    method.merge(results[-1].theta.clone(), models[0], 0.5, context)
    assert all(torch.equal(state["average"][name], before[name]) for name in before)
    assert not torch.equal(method.state_dict()["average"]["weight"], before["weight"])


def test_a_stream_of_another_method_is_taken_over_at_its_merged_model():
    _, context = make_stream()
    merged, incoming = make_vector(1), make_vector(2)
    method = ODEMerge(**METHOD)
    method.load_state_dict({})
    taken_over = method.merge(merged.clone(), incoming, 0.5, context).theta
    begun = ODEMerge(**METHOD)
    begun.start(merged, context)
    assert torch.equal(taken_over, begun.merge(torch.zeros_like(merged), incoming, 0.5, context).theta)


def test_an_average_that_merges_without_descent_would_leave_behind_is_dropped():
    _, context = make_stream()
    models, results = merge_all(method := ODEMerge(**METHOD), context)
    paper = PaperODEMerge()
    paper.load_state_dict(method.state_dict())
    assert paper.state_dict() == {}


def test_progress_is_that_of_both_paths():
    _, context = make_stream()
    steps = []
    context = replace(context, on_step=lambda done, total: steps.append((done, total)))
    ODEMerge(batch_size=8).merge(make_vector(1), make_vector(2), 0.1, context)
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_a_single_sample_cannot_be_halved():
    _, context = make_stream({"a": 1})
    with pytest.raises(ValueError, match=r"needs two calibration samples that count, the buffer has \{'a': 1\}"):
        ODEMerge().merge(make_vector(1), make_vector(2), 0.5, context)


def test_tasks_of_a_single_sample_are_divided_between_the_halves():
    _, context = make_stream({"a": 1, "b": 1, "c": 1})
    result = ODEMerge(batch_size=1).merge(make_vector(1), make_vector(2), 0.5, context)
    assert result.theta.isfinite().all()
