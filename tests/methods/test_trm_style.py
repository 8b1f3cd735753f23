"""The reference below is one graph from the coefficients to the loss, with double backward for the hinge."""

import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from toy import Classifier, Task, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.calibration.task_data import TaskData
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import AverageMerge, MergeContext
from lightning_odem.methods.needs import BaseModel, Snapshots, TrainingData
from lightning_odem.methods.trm_style import TRMStyleMerge, norm_gradient, trajectory_subspace
from lightning_odem.parameters.vector import ParameterVector

FP64 = torch.float64


class Smooth(L.LightningModule):
    """A network with derivatives of every order."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(FP64)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch):
        raise AssertionError("nothing is trained here")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_batches(number=3):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, 3, generator=generator, dtype=FP64), torch.randint(4, (6,), generator=generator))
        for _ in range(number)
    ]


def make_context(batches=None, module=None, on_step=None):
    """A base model, four points of a trajectory that began there, and the real access to module and data."""
    module = module or Smooth()
    make_trainer(max_epochs=0).fit(module, DataLoader(make_batches()))  # attaches the module, no more
    vector = ParameterVector(module)
    generator = torch.Generator().manual_seed(3)
    base, *moves = 0.5 * torch.randn(5, len(vector), generator=generator, dtype=FP64)
    snapshots = [base + 0.3 * step * moves[0] + 0.1 * step * moves[step] for step in (1, 2, 3)]
    data = TaskData(vector, module, "new", make_batches() if batches is None else batches)
    shapes = [tuple(shape) for shape in vector.shapes]
    return MergeContext(
        vector.names, shapes, needed={BaseModel: base, Snapshots: snapshots, TrainingData: data}, on_step=on_step
    )


def endpoints(context):
    generator = torch.Generator().manual_seed(4)
    return [
        context[BaseModel] + 0.6 * torch.randn(len(context[BaseModel]), generator=generator, dtype=FP64)
        for _ in range(2)
    ]


def merge(method, t=0.4, **settings):
    context = make_context(**settings)
    merged, incoming = endpoints(context)
    return method.merge(merged, incoming, t, context).theta


def sizes(context):
    return [math.prod(shape) for shape in context.shapes]


def pieces(vector, context):
    return dict(zip(context.names, vector.split(sizes(context)), strict=True))


def scores(theta, inputs, context):
    named = {
        name: piece.view(shape)
        for (name, piece), shape in zip(pieces(theta, context).items(), context.shapes, strict=True)
    }
    return functional_call(context[TrainingData].module, named, (inputs,))


def gradient_norm(theta, batch, context):
    theta = theta if theta.requires_grad else theta.clone().requires_grad_()
    alignment = cross_entropy(scores(theta, batch[0], context), batch[1])
    return torch.autograd.grad(alignment, theta, create_graph=True)[0].norm()


def reference_loss(theta, merged, batch, context, method):
    """The three losses as written in the docstring, in one graph."""
    before = scores(merged, batch[0], context).softmax(1)
    after = scores(theta, batch[0], context).softmax(1)
    alignment = cross_entropy(after.log(), batch[1])
    divergence = (before * (before / after).log()).sum(1).mean()
    hinge = (
        method.kappa * gradient_norm(merged, batch, context).detach() - gradient_norm(theta, batch, context)
    ).relu()
    return alignment + method.consistency * divergence + method.responsiveness * hinge


@pytest.mark.parametrize("kappa", [0.0, 0.3, 3.0])
def test_loss_and_gradient_are_those_of_one_graph_with_double_backward(kappa):
    context, method = make_context(), TRMStyleMerge(consistency=0.7, responsiveness=1.3, kappa=kappa)
    merged, incoming = endpoints(context)
    theta, batch = torch.lerp(merged, incoming, 0.4), make_batches()[1]
    point = theta.clone().requires_grad_()
    expected = reference_loss(point, merged, batch, context, method)
    (expected_gradient,) = torch.autograd.grad(expected, point)
    loss, gradient = method.loss_and_grad(theta, merged, batch, context[TrainingData], 1e-5)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)


def test_the_hinge_speaks_in_one_of_the_cases_above_only():
    context = make_context()
    merged, incoming = endpoints(context)
    batch = make_batches()[1]
    ratio = gradient_norm(torch.lerp(merged, incoming, 0.4), batch, context) / gradient_norm(merged, batch, context)
    assert 0.3 < ratio < 3.0


def test_the_gradient_of_a_gradients_norm_is_that_of_double_backward():
    context, batch = make_context(), make_batches()[0]
    theta = endpoints(context)[1].requires_grad_()
    (expected,) = torch.autograd.grad(gradient_norm(theta, batch, context), theta)

    def gradient(point):
        return context[TrainingData].value_and_grad(
            point, batch, lambda: cross_entropy(*context[TrainingData].predictions(batch))
        )[1]

    found = norm_gradient(gradient, theta.detach(), gradient(theta.detach()), 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_merge_is_adam_on_the_coefficients_of_that_graph():
    context, method = make_context(), TRMStyleMerge(steps=7, lr=0.05, consistency=0.7, responsiveness=1.3, kappa=2.0)
    merged, incoming = endpoints(context)
    subspace = trajectory_subspace(merged, incoming, 0.4, context[BaseModel], context[Snapshots], sizes(context))
    coefficients = torch.zeros(subspace.dimension, dtype=FP64, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=0.05)
    for step in range(7):
        optimizer.zero_grad()
        reference_loss(subspace.point(coefficients), merged, make_batches()[step % 3], context, method).backward()
        optimizer.step()
    expected = subspace.point(coefficients.detach())
    torch.testing.assert_close(merge(method), expected, rtol=1e-5, atol=1e-6)
    assert (expected - subspace.origin).norm() > 0.1


def test_the_subspace_holds_all_the_models_and_starts_from_the_average():
    context = make_context()
    merged, incoming = endpoints(context)
    subspace = trajectory_subspace(merged, incoming, 0.4, context[BaseModel], context[Snapshots], sizes(context))
    assert torch.equal(subspace.origin, torch.lerp(merged, incoming, 0.4))
    for model in (merged, incoming, context[BaseModel], *context[Snapshots]):
        assert_in_subspace(model, subspace, context)


def assert_in_subspace(theta, subspace, context):
    for offset, basis in zip((theta - subspace.origin).split(sizes(context)), subspace.bases, strict=True):
        unit = basis / basis.norm(dim=1, keepdim=True)
        torch.testing.assert_close(offset @ unit.T @ unit, offset, rtol=0, atol=1e-12)


def test_each_tensor_has_a_basis_of_its_own_in_units_of_its_way():
    context = make_context()
    merged, incoming = endpoints(context)
    subspace = trajectory_subspace(merged, incoming, 0.4, context[BaseModel], context[Snapshots], sizes(context))
    assert [basis.shape for basis in subspace.bases] == [(5, 15), (5, 5), (5, 20), (4, 4)]
    for basis, way in zip(subspace.bases, (incoming - merged).split(sizes(context)), strict=True):
        torch.testing.assert_close(basis @ basis.T, way.norm() ** 2 * torch.eye(len(basis), dtype=FP64))


def test_the_result_lies_in_the_span_of_the_directions():
    """By least squares on the directions themselves, tensor by tensor."""
    context = make_context()
    merged, incoming = endpoints(context)
    theta = merge(TRMStyleMerge(steps=10, lr=0.1))
    assert not torch.allclose(theta, torch.lerp(merged, incoming, 0.4), atol=0.01)
    models = [
        pieces(model, context) for model in (theta, incoming, *context[Snapshots], 2 * merged - context[BaseModel])
    ]
    for name, before in pieces(merged, context).items():
        found, *directions = (model[name] - before for model in models)
        columns = torch.stack(directions, 1)
        solution = torch.linalg.lstsq(columns, found, driver="gelsd").solution
        torch.testing.assert_close(columns @ solution, found, atol=1e-10, rtol=0)


def test_what_training_left_alone_stays():
    context = make_context()
    merged, incoming = endpoints(context)
    first = sizes(context)[0]
    incoming[:first] = merged[:first]
    theta = TRMStyleMerge(steps=3).merge(merged.clone(), incoming, 0.4, context).theta
    assert torch.equal(theta[:first], merged[:first])
    assert not torch.equal(theta[first:], merged[first:])


def test_without_steps_it_is_the_running_average():
    assert torch.equal(merge(TRMStyleMerge(steps=0)), merge(AverageMerge()))


def test_at_time_0_nothing_changes():
    assert torch.equal(merge(TRMStyleMerge(), t=0.0), endpoints(make_context())[0])


def test_an_incoming_model_that_has_not_moved_changes_nothing():
    context = make_context()
    merged, _ = endpoints(context)
    assert torch.equal(TRMStyleMerge().merge(merged.clone(), merged, 0.5, context).theta, merged)


def test_the_incoming_model_is_left_alone_and_merges_are_reproducible():
    context = make_context()
    merged, incoming = endpoints(context)
    first = TRMStyleMerge(steps=5).merge(merged, incoming, 0.5, context).theta
    assert torch.equal(incoming, endpoints(context)[1])
    assert torch.equal(merge(TRMStyleMerge(steps=5), t=0.5), first)


def whole_batch(function, theta, context):
    inputs, labels = (torch.cat(columns) for columns in zip(*make_batches(), strict=True))
    return function(theta, (inputs, labels), context).item()


def alignment(theta, batch, context):
    return cross_entropy(scores(theta, batch[0], context), batch[1])


def divergence(theta, batch, context):
    before, after = (scores(point, batch[0], context).softmax(1) for point in (endpoints(context)[0], theta))
    return (before * (before / after).log()).sum(1).mean()


def test_alignment_lowers_the_loss_on_the_tasks_own_data():
    context = make_context()
    found = [merge(TRMStyleMerge(steps=steps, consistency=0.0, responsiveness=0.0)) for steps in (0, 50)]
    before, after = (whole_batch(alignment, theta, context) for theta in found)
    assert after < 0.8 * before


@pytest.mark.parametrize(
    ("argument", "measure", "sign"), [("consistency", divergence, -1), ("responsiveness", gradient_norm, 1)]
)
def test_a_larger_weight_counts_more(argument, measure, sign):
    context, method = make_context(), partial(TRMStyleMerge, steps=50, kappa=1.0)
    weak, strong = (whole_batch(measure, merge(method(**{argument: weight})), context) for weight in (0.0, 10.0))
    assert sign * (strong - weak) > 0.1 * weak


def test_it_tells_how_far_it_is_and_counts_its_samples():
    steps, context = [], make_context(on_step=lambda *step: steps.append(step))
    merged, incoming = endpoints(context)
    TRMStyleMerge(steps=4, kappa=0.0).merge(merged, incoming, 0.5, context)
    assert steps == [(done, 4) for done in range(5)]
    assert context[TrainingData].sample_gradients == 4 * 3 * 6


def test_data_that_has_run_dry_is_an_error():
    with pytest.raises(ValueError, match="gave no batch"):
        merge(TRMStyleMerge(), batches=[])


def test_predictions_that_are_no_class_scores_are_an_error():
    module = Smooth()
    module.prediction_step = lambda batch, task: (module(batch[0]).argmax(1), batch[1])
    with pytest.raises(ValueError, match=r"class scores \[B, C\] as predictions on task 'new', got shape \(6,\)"):
        merge(TRMStyleMerge(), module=module)


def test_a_single_column_of_scores_is_an_error():
    module = Smooth()
    module.prediction_step = lambda batch, task: (module(batch[0])[:, :1], batch[1] * 0)
    with pytest.raises(ValueError, match=r"class scores \[B, C\] as predictions on task 'new', got shape \(6, 1\)"):
        merge(TRMStyleMerge(), module=module)


def test_a_loss_that_is_not_finite_is_an_error():
    batches = [(math.inf * inputs, labels) for inputs, labels in make_batches()]
    with pytest.raises(NonFiniteLossError, match=r"the loss on the task's data is nan at step 0 \(t = 0.4\)"):
        merge(TRMStyleMerge(), batches=batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, r"steps must lie in \[0, inf\), got steps=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"consistency": -1.0}, "consistency=-1.0"),
        ({"responsiveness": math.nan}, "responsiveness=nan"),
        ({"kappa": -0.1}, "kappa=-0.1"),
        ({"snapshots": 0}, "snapshots=0"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TRMStyleMerge(**settings)


def test_a_stream_is_merged_with_the_snapshots_and_data_of_its_trainer(small_stream):
    """The first task's model is taken as it is; after 50 steps the second task is learnt better than by averaging."""
    losses, firsts = {}, []
    for name, steps in {"average": 0, "trm": 50}.items():
        module, merge = Classifier(), ContinualMergeCallback(method=TRMStyleMerge(steps=steps, snapshots=4))
        fit(module, Task(0), merge)
        firsts.append(weights(module))
        task = Task(1, shuffle=True)
        fit(module, task, merge)
        inputs, labels = task.train_set.tensors
        losses[name] = cross_entropy(module(inputs), labels).item()
    assert same(*firsts)
    assert losses["trm"] < 0.9 * losses["average"]
    assert 50 * 3 * 8 <= merge.report.merges[1].sample_gradients <= 50 * 5 * 8
