import pytest
import torch
from vectors import make_context, make_models

from lightning_odem.flow import operating_time
from lightning_odem.methods import AverageMerge
from lightning_odem.methods.needs import SecondMoments
from lightning_odem.methods.second_moment import SecondMomentMerge

NAN = float("nan")


def make_moments(number, size, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator, dtype=torch.float64) ** 4 for _ in range(number)]


def merge_stream(method, models, moments, weights=None):
    """The merged model after each task."""
    weights = weights or [1.0] * len(models)
    merged = [method.start(models[0].clone(), make_context(None, needed={SecondMoments: moments[0]})).theta.clone()]
    for k in range(1, len(models)):
        context, t = make_context(None, needed={SecondMoments: moments[k]}), operating_time(weights[: k + 1])
        merged.append(method.merge(merged[-1].clone(), models[k], t, context).theta.clone())
    return merged


def entry_by_entry(models, moments, coefficients):
    """The rule as the paper writes it, one parameter after the other in Python's numbers."""
    results = []
    for entry in range(len(models[0])):
        theta, mean = float(models[0][entry]), float(moments[0][entry])
        for model, moment, a in zip(models[1:], moments[1:], coefficients, strict=True):
            new, old = float(moment[entry]), mean
            if new == new and old == old and (1 - a) * old + a * new > 0:
                theta = ((1 - a) * old * theta + a * new * float(model[entry])) / ((1 - a) * old + a * new)
            else:
                theta = (1 - a) * theta + a * float(model[entry])
            if new == new:
                mean = (1 - a) * old + a * new if old == old else new
        results.append(theta)
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 2.0]])
@pytest.mark.parametrize("coefficient", [None, 0.4])
def test_the_stream_is_that_of_an_independent_loop(weights, coefficient):
    _, models = make_models(4)
    moments = make_moments(4, len(models[0]))
    for moment, start in zip(moments, (0, 2, 3, 2), strict=True):
        moment[start : start + 3] = NAN
    for moment in moments[:3]:
        moment[6:9] = 0.0
    merged = merge_stream(SecondMomentMerge(coefficient), models, moments, weights)[-1]
    times = [operating_time((weights or [1.0] * 4)[: k + 1]) for k in range(1, 4)]
    coefficients = times if coefficient is None else [coefficient] * 3
    torch.testing.assert_close(merged, entry_by_entry(models, moments, coefficients))


def test_with_the_operating_time_the_result_is_the_mean_weighted_by_utility_and_moment():
    """Closed form: sum w_k F_k psi_k / sum w_k F_k, whatever the order."""
    _, models = make_models(4)
    moments, weights = make_moments(4, len(models[0])), [1.0, 3.0, 0.5, 2.0]
    merged = merge_stream(SecondMomentMerge(), models, moments, weights)[-1]
    factors = [weight * moment for weight, moment in zip(weights, moments, strict=True)]
    expected = sum(f * model for f, model in zip(factors, models, strict=True)) / sum(factors)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 2.0]])
def test_with_equal_moments_it_is_the_running_average(weights):
    _, models = make_models(4)
    average, times = models[0].clone(), [operating_time((weights or [1.0] * 4)[: k + 1]) for k in range(1, 4)]
    for model, t in zip(models[1:], times, strict=True):
        average = AverageMerge().merge(average, model, t, make_context(None)).theta
    merged = merge_stream(SecondMomentMerge(), models, make_moments(1, len(models[0])) * 4, weights)[-1]
    torch.testing.assert_close(merged, average)


@pytest.mark.parametrize(("old", "new"), [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (0.0, 0.0)])
def test_entries_without_a_moment_or_with_two_zeros_are_interpolated(old, new):
    method, context = SecondMomentMerge(), make_context(None, needed={SecondMoments: torch.tensor([new])})
    method.start(torch.zeros(1), make_context(None, needed={SecondMoments: torch.tensor([old])}))
    assert float(method.merge(torch.tensor([1.0]), torch.tensor([5.0]), 0.25, context).theta) == 2.0


def test_an_entry_that_only_one_task_moved_is_taken_from_that_task():
    _, models = make_models(2)
    size = len(models[0])
    moments = [torch.ones(size), torch.zeros(size)]
    moments[0][:5], moments[1][:5] = 0.0, 1.0
    merged = merge_stream(SecondMomentMerge(0.3), models, moments)[-1]
    assert torch.equal(merged, torch.cat([models[1][:5], models[0][5:]]))


def test_smallest_moments_of_fp32_do_not_break_the_fraction():
    smallest = torch.tensor([1e-45, 1e-38, 1e38])
    method = SecondMomentMerge(0.5)
    method.start(torch.zeros(3), make_context(None, needed={SecondMoments: smallest}))
    merged = method.merge(
        torch.zeros(3), torch.ones(3), 0.5, make_context(None, needed={SecondMoments: smallest})
    ).theta
    assert torch.isfinite(merged).all()
    torch.testing.assert_close(merged[1:], torch.full((2,), 0.5))


def test_time_0_leaves_merged_model_and_moments_and_time_1_gives_the_incoming_model():
    _, (first, second) = make_models(2, dtype=torch.float32)
    moments = [moment.float() for moment in make_moments(2, len(first))]
    method = SecondMomentMerge()
    method.start(first, make_context(None, needed={SecondMoments: moments[0]}))
    context = make_context(None, needed={SecondMoments: moments[1]})
    assert torch.equal(method.merge(first.clone(), second, 0.0, context).theta, first)
    assert torch.equal(method.state_dict()["moments"], moments[0])
    moments[1][:3] = 0.0
    assert torch.equal(method.merge(first.clone(), second, 1.0, context).theta, second)


def test_a_saved_stream_goes_on_as_if_it_had_not_stopped():
    _, models = make_models(3)
    moments = make_moments(3, len(models[0]))
    method, resumed = SecondMomentMerge(), SecondMomentMerge()
    merged = merge_stream(method, models[:2], moments[:2])[-1]
    state = method.state_dict()
    before = state["moments"].clone()
    context = make_context(None, needed={SecondMoments: moments[2]})
    expected = method.merge(merged.clone(), models[2], 0.3, context).theta
    assert torch.equal(state["moments"], before)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.merge(merged.clone(), models[2], 0.3, context).theta, expected)
    assert torch.equal(resumed.state_dict()["moments"], method.state_dict()["moments"])


def test_a_stream_begun_by_another_method_is_interpolated_first_and_then_weighted():
    _, models = make_models(3)
    moments = make_moments(3, len(models[0]))
    method = SecondMomentMerge()
    context = make_context(None, needed={SecondMoments: moments[1]})
    merged = method.merge(models[0].clone(), models[1], 0.5, context).theta
    torch.testing.assert_close(merged, (models[0] + models[1]) / 2)
    assert torch.equal(method.state_dict()["moments"], moments[1])


def test_an_empty_state_begins_a_new_stream():
    method = SecondMomentMerge()
    method.start(torch.zeros(2), make_context(None, needed={SecondMoments: torch.ones(2)}))
    method.load_state_dict({})
    assert method.state_dict() == {}


def test_a_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match="keeps moments, but the stream's state has: norms"):
        SecondMomentMerge().load_state_dict({"norms": []})


def test_moments_of_another_number_of_parameters_are_refused():
    method = SecondMomentMerge()
    method.start(torch.zeros(2), make_context(None, needed={SecondMoments: torch.ones(2)}))
    with pytest.raises(ValueError, match="those of 2 parameters, but 3 are merged"):
        method.merge(torch.zeros(3), torch.ones(3), 0.5, make_context(None, needed={SecondMoments: torch.ones(3)}))


@pytest.mark.parametrize("coefficient", [-0.1, 1.1, NAN])
def test_a_coefficient_outside_0_and_1_is_refused(coefficient):
    with pytest.raises(ValueError, match=r"coefficient must lie in \[0, 1\]"):
        SecondMomentMerge(coefficient)
