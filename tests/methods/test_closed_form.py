"""The closed form with measured moments, and the shapes of layers; what it shares with others: test_exact_stream.py."""

import itertools

import pytest
import torch
from torch.nn.functional import relu
from toy import Classifier, Incoming, Task, fit, weights
from vectors import make_context, make_models

from lightning_odem import ContinualMergeCallback
from lightning_odem.flow import operating_time
from lightning_odem.methods import ClosedFormMerge
from lightning_odem.methods.needs import BaseModel, InputMoments

SHAPES = {"linear.weight": (5, 4), "conv.weight": (6, 2, 3), "attn.qkv.weight": (6, 3), "used by itself": (3, 4)}
INPUTS = {"linear.weight": (1, 4), "conv.weight": (2, 6), "attn.qkv.weight": (1, 3)}
GROUPS = {"conv.weight": 2}
WEIGHTS = [1.0, 3.0, 0.5, 2.0]


def make_inputs(number, seed=3):
    """Inputs [groups, n, in] of each layer, for each task; fewer than would determine the larger layers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(groups, 5, size, generator=generator, dtype=torch.float64) * (1 + task)
            for name, (groups, size) in INPUTS.items()
        }
        for task in range(number)
    ]


def moments_of(inputs):
    return {name: rows.mT @ rows / rows.shape[1] for name, rows in inputs.items()}


def stream(method, base, models, shares, inputs):
    """The merged model after each task, which comes with its own moments."""
    merged = None
    for k, (model, found) in enumerate(zip(models, inputs, strict=True)):
        context = make_context(base, SHAPES, groups=GROUPS, needed={InputMoments: moments_of(found)})
        if merged is None:
            merged = [method.start(model.clone(), context).theta.clone()]
        else:
            t = operating_time(shares[: k + 1])
            merged.append(method.merge(merged[-1].clone(), model, t, context).theta.clone())
    return merged


def at_once(base, models, shares, inputs, measured, ridge):
    """Every layer's outputs on all inputs of all tasks, fitted by one least-squares solver."""
    shares = [share / sum(shares) for share in shares]
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    pieces = []
    for (name, shape), *updates in zip(SHAPES.items(), *((model - base).split(sizes) for model in models), strict=True):
        count = GROUPS.get(name, 3 if "qkv" in name else 1)
        updates = [update.view(count, shape[0] // count, -1) for update in updates]
        merged = []
        for index in range(count):
            rows, targets = [], []
            for share, update, given in zip(shares, updates, inputs, strict=True):
                tau, found = update[index], given.get(name)
                kinds = [(1.0 if found is None else 1 - measured, tau)]
                kinds += [] if found is None else [(measured, found[index % len(found)])]
                for part, x in kinds:
                    root = (share * part) ** 0.5 * x / x.norm()
                    rows.append(root)
                    targets.append(root @ tau.T)
            average = sum(share * update[index] for share, update in zip(shares, updates, strict=True))
            rows.append(ridge**0.5 * torch.eye(average.shape[1], dtype=torch.float64))
            targets.append(ridge**0.5 * average.T)
            merged.append(torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gels").solution.T)
        pieces.append(torch.stack(merged).flatten())
    return base + torch.cat(pieces)


@pytest.mark.parametrize("measured", [0.25, 1.0])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_with_measured_moments_the_stream_is_least_squares_on_the_inputs_of_all_tasks(measured, ridge):
    base, models = make_models(4, shapes=SHAPES)
    inputs = make_inputs(4)
    method = ClosedFormMerge(ridge, measured=measured)
    for number, merged in enumerate(stream(method, base, models, WEIGHTS, inputs), start=1):
        if number > 1:
            expected = at_once(base, models[:number], WEIGHTS[:number], inputs[:number], measured, ridge)
            torch.testing.assert_close(merged, expected)


def test_with_measured_moments_outputs_on_the_inputs_stay():
    base, models = make_models(2, shapes=SHAPES)
    inputs = [{name: rows[:, :1] for name, rows in given.items()} for given in make_inputs(2)]
    merged = stream(ClosedFormMerge(1e-6, measured=1.0), base, models, [1.0, 1.0], inputs)[-1]
    for model, given in zip(models, inputs, strict=True):
        x = given["linear.weight"][0]
        torch.testing.assert_close(x @ merged[:20].view(5, 4).T, x @ model[:20].view(5, 4).T, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_tasks_does_not_matter_to_measured_moments():
    base, models = make_models(3, shapes=SHAPES)
    inputs = make_inputs(3)
    ends = [
        stream(ClosedFormMerge(measured=0.5), base, *([given[i] for i in order] for given in (models, WEIGHTS, inputs)))
        for order in itertools.permutations(range(3))
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end[-1], ends[0][-1])


def test_with_measured_moments_a_task_alone_and_one_of_weight_0_change_nothing():
    base, models = make_models(3, shapes=SHAPES)
    inputs = make_inputs(3)
    merged = stream(ClosedFormMerge(measured=0.5), base, models, [1.0, 0.0, 2.0], inputs)
    assert torch.equal(merged[0], models[0])
    assert torch.equal(merged[1], models[0])
    without = stream(ClosedFormMerge(measured=0.5), base, models[::2], [1.0, 2.0], inputs[::2])
    assert torch.equal(merged[2], without[-1])
    assert torch.equal(stream(ClosedFormMerge(measured=0.5), base, models[:2], [0.0, 1.0], inputs[:2])[-1], models[1])


def test_the_scale_of_the_inputs_does_not_matter():
    base, models = make_models(2, shapes=SHAPES)
    inputs = make_inputs(2)
    larger = [inputs[0], {name: 100 * rows for name, rows in inputs[1].items()}]
    ends = [stream(ClosedFormMerge(measured=0.5), base, models, [1.0, 1.0], given)[-1] for given in (inputs, larger)]
    torch.testing.assert_close(*ends)


def test_a_layer_of_nothing_but_zeros_as_inputs_has_no_say():
    base, models = make_models(2, shapes=SHAPES)
    inputs = make_inputs(2)
    inputs[1]["linear.weight"].zero_()
    merged = stream(ClosedFormMerge(1e-9, measured=1.0), base, models, [1.0, 1.0], inputs)[-1]
    x = inputs[0]["linear.weight"][0]
    torch.testing.assert_close(x @ merged[:20].view(5, 4).T, x @ models[0][:20].view(5, 4).T)


def test_a_merged_model_taken_over_has_guessed_moments():
    base, models = make_models(2, shapes=SHAPES)
    inputs = make_inputs(2)
    context = make_context(base, SHAPES, groups=GROUPS, needed={InputMoments: moments_of(inputs[1])})
    merged = ClosedFormMerge(measured=0.5).merge(models[0].clone(), models[1], 0.5, context).theta
    torch.testing.assert_close(merged, stream(ClosedFormMerge(measured=0.5), base, models, [1, 1], [{}, inputs[1]])[-1])


def test_a_task_whose_moments_were_measured_cannot_be_taken_out():
    base, models = make_models(2, shapes=SHAPES)
    method = ClosedFormMerge(measured=0.5)
    merged = stream(method, base, models, [1.0, 1.0], make_inputs(2))[-1]
    with pytest.raises(ValueError, match=r"with measured=0.5 cannot take a task out"):
        method.remove(merged, models[0], 0.5, make_context(base, SHAPES, groups=GROUPS))


def test_samples_are_needed_where_moments_are_measured():
    assert set(ClosedFormMerge().needs) == {BaseModel()}
    assert set(ClosedFormMerge(measured=0.1).needs) == {BaseModel(), InputMoments()}


@pytest.mark.parametrize("measured", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(measured):
    with pytest.raises(ValueError, match=r"measured must lie in \[0, 1\]"):
        ClosedFormMerge(measured=measured)


def second_moments(rows):
    rows = rows.double()
    return rows.T @ rows / rows.square().sum()


@pytest.mark.usefixtures("small_stream")
def test_a_stream_of_the_callback_measures_each_tasks_own_model_on_its_samples():
    module, incoming, ridge = Classifier(), Incoming(), 0.1
    merge = ContinualMergeCallback(ClosedFormMerge(ridge, measured=0.5), calibration_size=72)  # all samples of 3 tasks
    base = {name: value.double() for name, value in weights(module).items()}
    for number in range(3):
        fit(module, Task(number), incoming, merge)
    assert merge.report.merges[-1].calibration == {"task_1": 24, "task_2": 24, "task_3": 24}
    assert merge.report.merges[-1].method == "closed_form"
    left, right = dict.fromkeys(base, 0.0), dict.fromkeys(base, 0.0)
    models = [{name: value.double() for name, value in model.items()} for model in incoming.models]
    updates = [{name: model[name] - base[name] for name in base} for model in models]
    means = {name: sum(update[name] for update in updates) / 3 for name in base}
    for number, (model, update) in enumerate(zip(models, updates, strict=True)):
        inputs = Task(number).train_set.tensors[0].double()
        hidden = relu(inputs @ model["body.0.weight"].T + model["body.0.bias"])
        for name, rows in {"body.0.weight": inputs, "head.weight": hidden}.items():
            moments = (second_moments(update[name]) + second_moments(rows)) / 2
            left[name] += moments / 3
            right[name] += update[name] @ moments / 3
    found = weights(module)
    for name in base:
        expected = base[name] + means[name]
        if name.endswith("weight"):
            system = left[name] + ridge * torch.eye(len(left[name]))
            expected = base[name] + torch.linalg.solve(system, (right[name] + ridge * means[name]).T).T
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)
