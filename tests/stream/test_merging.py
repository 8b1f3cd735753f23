import gc
import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from toy import Classifier

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.calibration.prediction_loss import EntropyLoss, LogitsLoss
from lightning_odem.flow import NonFiniteLossError, integrate
from lightning_odem.methods import (
    AverageMerge,
    ClosedFormMerge,
    IsotropicMerge,
    MergeMethod,
    MergeResult,
    ODEMerge,
    PaperODEMerge,
    TaskSingularVectorsMerge,
)
from lightning_odem.methods.needs import BaseModel, Calibration, InputMoments
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.attach import attached
from lightning_odem.stream.merging import merging

BF16, FP64 = torch.bfloat16, torch.float64
SIZES = {"old": 20, "new": 8}


def make_net(seed, dtype=torch.float32):
    """A module with batch norm in some state of training, its head excluded from merges."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({"body": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 1)})
    net["norm"].running_mean.normal_()
    net["norm"].running_var.uniform_(0.5, 2)
    net["norm"].num_batches_tracked.fill_(seed)
    net.predict = lambda x: net["head"](net["norm"](net["body"](x)).tanh())
    return net.to(dtype)


def make_calibration(predict, dtype=torch.float32, batch_size=5, columns=3):
    """Squared loss on two tasks with different targets."""
    generator = torch.Generator().manual_seed(9)
    buffer = CalibrationBuffer(100)
    for scale, (task, size) in enumerate(SIZES.items(), start=1):
        inputs = torch.randn(size, columns, generator=generator).to(dtype)
        buffer.add(task, (inputs, scale * inputs.sum(1, keepdim=True)))
    return CalibrationSet(buffer, lambda batch: mse_loss(predict(batch.samples[0]), batch.samples[1]), batch_size)


def make_base(net):
    """A base model of the same architecture, near the module's weights."""
    base = deepcopy(net)
    generator = torch.Generator().manual_seed(7)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return base


def merge(net, method, t=0.5, merged=None, base=None, calibration=None, **settings):
    base = take_snapshot(make_base(net)) if base is None else base
    with merging(net, method, task="new", t=t, merged=merged, base=base, calibration=calibration, **settings) as made:
        return made.record


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def training_flags(module):
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    return trainable | {name: child.training for name, child in module.named_modules()}


class Breaking(MergeMethod):
    needs = (Calibration(),)
    merges = 0

    def merge(self, merged, incoming, t, context):
        self.merges += 1
        context[Calibration].loss_and_grad(torch.full_like(incoming, 7.0))
        raise RuntimeError("in the method")

    def state_dict(self):
        return {"merges": self.merges}

    def load_state_dict(self, state):
        self.merges = state["merges"]


@pytest.mark.parametrize("method", [AverageMerge(), ODEMerge()])
@pytest.mark.parametrize("batch_norm", ["average", "keep", "recalibrate"])
def test_the_first_task_is_taken_as_it_is(method, batch_norm):
    net = make_net(1)
    before = bits(net)
    calibration = make_calibration(net.predict)
    record = merge(net, method, t=1.0, calibration=calibration, batch_norm=batch_norm)
    assert same(bits(net), before)
    assert (record.task, record.t, record.path, record.gradient_evaluations) == ("new", 1.0, {}, 0)
    assert math.isnan(record.loss_before)


@pytest.mark.parametrize("method", [AverageMerge(), ODEMerge(), PaperODEMerge(0.3, "heun")])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_time_0_leaves_the_merged_model_and_time_1_gives_the_incoming_one_bit_by_bit(method, dtype, t):
    net, before = make_net(1, dtype), make_net(0, dtype)
    expected = bits(net if t else before)
    merge(net, method, t=t, merged=take_snapshot(before), calibration=make_calibration(net.predict, dtype))
    assert same(bits(net), expected)


def test_a_snapshot_is_the_model_as_it_was_before_it_was_rounded():
    net, before = make_net(1, BF16), make_net(0, BF16)
    merged = {name: value + 2**-12 if value.is_floating_point() else value for name, value in bits(before).items()}
    merged = {name: value.float() if "head" not in name else value for name, value in merged.items()}
    incoming, settings = bits(net), {"base": {}, "calibration": None, "exclude": ("head",)}
    with merging(net, AverageMerge(), task="new", t=0.25, merged=merged, **settings) as made:
        found = made.snapshot()
    assert found.keys() == {name for name in incoming if "head" not in name}
    for name in ("body.weight", "body.bias", "norm.weight", "norm.bias"):
        assert torch.equal(found[name], merged[name].lerp(incoming[name].float(), 0.25)), name
        assert torch.equal(found[name].bfloat16(), bits(net)[name]), name


def test_a_snapshot_at_time_0_is_the_merged_model_whatever_the_method_returns():
    class Elsewhere(MergeMethod):
        def merge(self, merged, incoming, t, context):
            return MergeResult(incoming.clone(), t=0.0)

    net, before = make_net(1, BF16), take_snapshot(make_net(0, BF16))
    merged = {name: value.float() + 2**-12 if "body" in name else value for name, value in before.items()}
    with merging(net, Elsewhere(), task="new", t=0.5, merged=merged, base={}, calibration=None) as made:
        found = made.snapshot()
    assert all(torch.equal(found[name], merged[name]) for name in ("body.weight", "body.bias"))


def test_the_average_of_two_models_is_their_mean():
    net, before = make_net(1), make_net(0)
    incoming, merged = bits(net), bits(before)
    merge(net, AverageMerge(), t=0.25, merged=take_snapshot(before), exclude=("head",))
    result = bits(net)
    for name in ("body.weight", "body.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(result[name], 0.75 * merged[name] + 0.25 * incoming[name])
    for name in ("head.weight", "head.bias", "norm.num_batches_tracked"):
        assert torch.equal(result[name], incoming[name])


@pytest.mark.parametrize("policy", ["keep", "recalibrate"])
def test_batch_norm_follows_the_policy_after_the_weights(policy):
    net, before = make_net(1), make_net(0)
    calibration = make_calibration(net.predict)
    merge(net, AverageMerge(), merged=take_snapshot(before), calibration=calibration, batch_norm=policy)
    expected = before["norm"].running_mean
    if policy == "recalibrate":
        means = [net["body"](batch.samples[0]).mean(0) for batch in calibration.buffer.micro_batches(100)]
        expected = sum(means) / 2
    torch.testing.assert_close(net["norm"].running_mean, expected)


@pytest.mark.parametrize("step_size", [0.05, 0.125, 1.0])
@pytest.mark.parametrize("t", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("ends", [(1.5, 0.6), (0.9, 1.8)])
def test_ode_of_a_linear_model_is_the_flow_written_out(step_size, t, ends):
    """Squared loss of y = <theta, x>: L = theta' A theta - 2 b' theta + c, integrated by the formulas of the paper."""
    net = nn.Linear(4, 1, bias=False).double()
    calibration = make_calibration(net, FP64, columns=4)
    tasks = [batch.samples for batch in calibration.buffer.micro_batches(100)]
    a = sum(x.T @ x / len(x) for x, _ in tasks) / 2
    b = sum(x.T @ y / len(x) for x, y in tasks).flatten() / 2
    c = sum((y.T @ y / len(y)).item() for _, y in tasks) / 2
    # Across the valley of the loss, or up its side.
    merged, incoming = (end * torch.linalg.solve(a, b) + 0.01 * torch.arange(4) for end in ends)
    net.weight.data.copy_(incoming)

    def loss(theta):
        return float(theta @ a @ theta - 2 * b @ theta + c)

    theta, gammas, losses = merged, [], [loss(merged)]
    times = [*(step_size * step for step in range(math.ceil(t / step_size))), t]
    for time, end in zip(times[:-1], times[1:], strict=True):
        u, g = (incoming - theta) / (1 - time), 2 * (a @ theta - b)
        parallel = (g @ u) / (g @ g) * g
        gammas.append(1.0 if g @ u <= 0 else min(max((loss(incoming) - losses[0]) / float(g @ u), 0.0), 1.0))
        theta = incoming if end == 1 else theta + (end - time) * (u - parallel + gammas[-1] * parallel)
        losses.append(loss(theta))
    record = merge(net, PaperODEMerge(step_size), t, merged={"weight": merged.view(1, 4)}, calibration=calibration)
    torch.testing.assert_close(net.weight.detach().flatten(), theta, rtol=1e-12, atol=0)
    assert record.path["t"] == pytest.approx(times)
    assert record.path["gamma"] == pytest.approx(gammas, rel=1e-9)
    assert record.path["loss"] == pytest.approx(losses, rel=1e-9)
    assert record.loss_incoming == pytest.approx(loss(incoming), rel=1e-9)
    # The damping is at work, but for short paths.
    assert min(gammas) < 1.0 or t < 0.5 or step_size == 1.0


@pytest.mark.parametrize("method", [AverageMerge(), PaperODEMerge(step_size=0.005)])
def test_a_bf16_model_moves_along_an_fp32_path_and_is_rounded_once(method):
    torch.manual_seed(3)
    net = nn.Linear(4, 1, bias=False).to(BF16)
    incoming = net.weight.detach().float().flatten()
    # So near that one step is far below the spacing of bf16 numbers.
    merged = (incoming * 1.02).to(BF16).view(1, 4)
    calibration = make_calibration(net, BF16, columns=4)
    replica = nn.Linear(4, 1, bias=False).to(BF16)

    def loss_and_grad(theta):
        replica.weight.data = theta.to(BF16).view(1, 4)
        value, gradient = 0.0, torch.zeros(4)
        for batch in calibration.buffer.micro_batches(calibration.batch_size):
            loss = mse_loss(replica(batch.samples[0]), batch.samples[1])
            gradient += torch.autograd.grad(loss * batch.share, replica.weight)[0].flatten()
            value += loss.item() * batch.share
        return value, gradient

    if isinstance(method, PaperODEMerge):
        expected = integrate(merged.float().flatten(), incoming, loss_and_grad, 0.4, step_size=method.step_size).theta
    else:
        expected = merged.float().flatten().lerp(incoming, 0.4)
    merge(net, method, t=0.4, merged={"weight": merged}, calibration=calibration)
    assert torch.equal(net.weight.flatten(), expected.to(BF16))
    assert not torch.equal(net.weight, merged)


def test_the_record_says_whether_the_losses_of_its_path_are_estimates():
    records = []
    for method in (ODEMerge(batch_size=2), PaperODEMerge()):
        net = make_net(1)
        records.append(merge(net, method, merged=take_snapshot(make_net(0)), calibration=make_calibration(net.predict)))
    assert [record.estimated for record in records] == [True, False]


@pytest.mark.parametrize("batch_norm", ["average", "recalibrate"])
@pytest.mark.parametrize("failure", ["method", "block", "interrupt", "loss", "names", "statistics"])
def test_a_merge_that_fails_leaves_the_incoming_model_bit_by_bit(failure, batch_norm):
    net = make_net(1)
    net["head"].requires_grad_(False)
    merged = take_snapshot(make_net(0))
    calibration, method = make_calibration(net.predict), ODEMerge()
    if failure == "method":
        method, error, message = Breaking(), RuntimeError, "in the method"
    elif failure == "loss":
        whole = calibration.batch_loss
        calibration = CalibrationSet(calibration.buffer, lambda batch: whole(batch) * float("nan"))
        error, message = NonFiniteLossError, r"^Merging task 'new': the loss .* is nan at step 0"
    elif failure in ("names", "statistics"):
        name = "body.weight" if failure == "names" else "norm.running_var"
        del merged[name]
        error, message = ValueError, f"{name}: in the"
    else:
        error, message = KeyError if failure == "block" else KeyboardInterrupt, "in the block"
    before, flags = bits(net), training_flags(net)
    settings = {
        "merged": merged,
        "base": take_snapshot(make_base(net)),
        "calibration": calibration,
        "batch_norm": batch_norm,
    }

    def fail():
        with merging(net, method, task="new", t=0.5, **settings):
            assert not same(bits(net), before)
            raise error("in the block")

    with pytest.raises(error, match=message):
        fail()
    assert same(bits(net), before)
    assert training_flags(net) == flags
    assert method.state_dict() in ({}, {"merges": 0})


def test_a_gradient_that_is_not_finite_stops_the_merge():
    net = make_net(1)
    before, calibration = bits(net), make_calibration(net.predict)

    def batch_loss(batch):
        return calibration.batch_loss(batch) + (0 * net["body"].bias).sqrt().sum()

    steep = CalibrationSet(calibration.buffer, batch_loss)
    with pytest.raises(NonFiniteLossError, match="gradient"):
        merge(net, ODEMerge(), merged=take_snapshot(make_net(0)), calibration=steep)
    assert same(bits(net), before)


def test_only_weights_and_statistics_change():
    net = make_net(1)
    net["norm"].eval()
    net.predict(torch.randn(4, 3)).sum().backward()
    flags = training_flags(net)
    grads = [parameter.grad for parameter in net.parameters()]
    merged, state = take_snapshot(make_net(0)), torch.get_rng_state()
    merge(net, ODEMerge(), merged=merged, calibration=make_calibration(net.predict))
    assert training_flags(net) == flags
    assert all(parameter.grad is grad for parameter, grad in zip(net.parameters(), grads, strict=True))
    assert net["norm"].num_batches_tracked == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("exclude", [(), ("head",)])
def test_frozen_parameters_are_merged_where_earlier_tasks_moved_them(exclude):
    net, merged = make_net(1), take_snapshot(make_net(0))
    merged["body.weight"] = net["body"].weight.detach().clone()
    net["body"].requires_grad_(False)
    net["head"].requires_grad_(False)
    before, flags = bits(net), training_flags(net)
    merge(net, AverageMerge(), merged=merged, exclude=exclude)
    result = bits(net)
    torch.testing.assert_close(result["body.bias"], (before["body.bias"] + merged["body.bias"]) / 2)
    assert torch.equal(result["body.weight"], before["body.weight"])
    assert torch.equal(result["head.weight"], before["head.weight"]) is bool(exclude)
    assert training_flags(net) == flags


def test_the_merged_snapshot_is_not_written_to():
    net, snapshot = make_net(1), take_snapshot(make_net(0))
    before = {name: tensor.clone() for name, tensor in snapshot.items()}
    merge(net, AverageMerge(), merged=snapshot)
    assert same(snapshot, before)


def test_the_loss_sees_batch_norm_statistics_between_the_models_and_no_dropout():
    net, before = make_net(1).train(), make_net(0)
    seen, calibration = [], make_calibration(net.predict)

    def batch_loss(batch):
        seen.append((net["norm"].training, net["norm"].running_mean.clone()))
        return calibration.batch_loss(batch)

    expected = before["norm"].running_mean.lerp(net["norm"].running_mean, 0.5)
    merge(net, ODEMerge(), merged=take_snapshot(before), calibration=CalibrationSet(calibration.buffer, batch_loss))
    assert not any(training for training, _ in seen)
    assert all(torch.equal(mean, expected) for _, mean in seen)


def test_the_base_model_is_there_for_methods_that_need_it():
    class Task(MergeMethod):
        needs = (BaseModel(),)

        def merge(self, merged, incoming, t, context):
            assert Calibration not in context
            assert context.names == ["body.weight", "body.bias"]
            assert context.shapes == [(4, 3), (4,)]
            return MergeResult(merged + t * (incoming - context[BaseModel]))

    net, before, base = make_net(1), make_net(0), make_net(5)
    incoming = net["body"].weight.clone()
    settings = {"merged": take_snapshot(before), "base": take_snapshot(base), "exclude": ("head", "norm")}
    merge(net, Task(), **settings)
    expected = before["body"].weight + 0.5 * (incoming - base["body"].weight)
    torch.testing.assert_close(net["body"].weight, expected)
    with pytest.raises(ValueError, match="body.weight"):
        merge(net, Task(), **settings | {"base": {"head.weight": torch.zeros(2)}})
    with pytest.raises(ValueError, match="needs the base model"):
        merge(net, Task(), **settings | {"base": {}})


@pytest.mark.parametrize(("solver", "per_step"), [("euler", 1), ("heun", 2)])
def test_the_record_tells_what_was_done(solver, per_step):
    net, merged = make_net(1), take_snapshot(make_net(0))
    calibration, steps = make_calibration(net.predict), []
    method = PaperODEMerge(0.1, solver)
    record = merge(
        net, method, t=0.25, merged=merged, calibration=calibration, on_step=lambda *step: steps.append(step)
    )
    after = calibration.objective(ParameterVector(net))
    assert (record.task, record.t, record.method) == ("new", 0.25, "ode_paper")
    assert record.calibration == SIZES
    assert record.gradient_evaluations == 3 * per_step
    assert record.loss_evaluations == 2
    assert record.sample_gradients == record.gradient_evaluations * 28
    assert 0 < record.gradient_seconds < record.merge_seconds
    assert record.steps == 3
    assert record.path["t"] == pytest.approx([0.0, 0.1, 0.2, 0.25])
    assert {name: len(values) for name, values in record.path.items()} == {
        "t": 4, "loss": 4, "alignment": 3, "gamma": 3, "alignment_ratio": 3, "step_norm": 3, "damped_share": 3
    }  # fmt: skip
    assert (record.loss_before, record.loss_after) == (record.path["loss"][0], record.path["loss"][-1])
    net.eval()
    assert record.loss_after == pytest.approx(after.loss(after.vector.read()), rel=1e-6)
    chord = [record.loss_before + t * (record.loss_incoming - record.loss_before) for t in record.path["t"]]
    assert record.barrier == pytest.approx(max(a - b for a, b in zip(record.path["loss"], chord, strict=True)))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert record.checkpoint is None


def test_a_method_without_path_leaves_losses_unmeasured():
    net = make_net(1)
    record = merge(net, AverageMerge(), merged=take_snapshot(make_net(0)))
    assert (record.method, record.path, record.calibration, record.gradient_evaluations) == ("average", {}, {}, 0)
    assert math.isnan(record.loss_after)
    assert record.merge_seconds > 0


def test_unregistered_methods_are_recorded_under_their_class():
    class Overwrite(AverageMerge):
        pass

    assert merge(make_net(1), Overwrite(), merged=take_snapshot(make_net(0))).method == "Overwrite"


def float_storages(d):
    """Addresses of all memory that holds at least ``d`` floats."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {big.untyped_storage().data_ptr() for big in tensors if big.is_floating_point() and big.numel() >= d}


@pytest.mark.parametrize(
    ("method", "vectors"), [(PaperODEMerge(0.25), [5, 5, 5, 5]), (ODEMerge(batch_size=2), [8, 10, 10, 10])]
)
def test_a_gradient_takes_two_vectors_besides_the_models_and_with_descent_adams_moments(method, vectors):
    """Alive during a gradient: merged, base and incoming model, the point and the gradient, and the module itself.

    With descent also the mean task vector in main memory, the vectors of the base model and of the point before the
    piece, and from the second micro-batch on Adam's moments.
    """
    d = 5000
    net = nn.Linear(d, 1, bias=False)
    gc.collect()
    others = float_storages(d)
    merged, base = {"weight": torch.zeros(1, d)}, {"weight": torch.zeros(1, d)}
    buffer, counts = CalibrationBuffer(4), []
    buffer.add("new", (torch.ones(4, 1), torch.ones(4)))

    def batch_loss(batch):
        loss = (net.weight * batch.samples[0].mean()).mean()
        if loss.requires_grad:
            counts.append(len(float_storages(d) - others))
        return loss

    merge(net, method, merged=merged, base=base, calibration=CalibrationSet(buffer, batch_loss, 2))
    assert counts == vectors  # two steps of two micro-batches each


def test_nothing_left_to_merge_is_an_error():
    with pytest.raises(ValueError, match="No trainable parameter"):
        merge(make_net(1), AverageMerge(), exclude=("*",))


def make_classifier(seed):
    """A user's module in training mode, with what eval mode changes."""
    torch.manual_seed(seed)
    module = Classifier(dropout=0.5, batch_norm=True).train()
    for tensor in (*module.parameters(), module.body[1].running_mean):
        tensor.data.normal_()
    return module


def make_samples(*tasks):
    buffer, generator = CalibrationBuffer(16, balanced=False), torch.Generator().manual_seed(5)
    for task in tasks:
        buffer.add(task, (torch.randn(7, 4, generator=generator), torch.zeros(7, dtype=torch.long)))
    return buffer


def held_logits(buffer, task):
    """Inputs and logits of a task's samples."""
    batches = list(buffer.micro_batches_of(task, 100))
    return batches[0].samples[0], batches[0].logits


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("batch_norm", ["average", "recalibrate"])
def test_the_incoming_models_logits_are_those_of_a_direct_pass_before_anything_moves(first, batch_norm):
    module, buffer = make_classifier(1), make_samples("new")
    with attached(module), torch.no_grad():
        expected = module.eval()(held_logits(buffer, "new")[0])
        module.train()
        calibration = CalibrationSet(buffer, LogitsLoss(module), batch_size=3)
        merged = None if first else take_snapshot(make_classifier(0))
        t = 1.0 if first else 0.5
        merge(module, ODEMerge(), t=t, merged=merged, calibration=calibration, batch_norm=batch_norm)
        assert module.training
    logits = held_logits(buffer, "new")[1]
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert not logits.requires_grad


def test_along_the_path_the_loss_is_the_divergence_from_every_tasks_own_model():
    old, module, buffer = make_classifier(0), make_classifier(1), make_samples("old", "new")
    with attached(old), torch.no_grad():
        buffer.store_logits("old", old(held_logits(buffer, "old")[0]))
    with attached(module):
        calibration = CalibrationSet(buffer, LogitsLoss(module))
        record = merge(module, ODEMerge(), merged=take_snapshot(old), calibration=calibration)
        assert record.gradient_evaluations in (1, 2)  # a second piece only if the first helps
        (inputs, own), (others, kept) = (held_logits(buffer, task) for task in ("new", "old"))
        p, q = (z.double().softmax(1) for z in (own, kept))
        with torch.no_grad():
            divergences = [
                (a * (a / module(x).double().softmax(1)).log()).sum(1).mean() for x, a in ((inputs, p), (others, q))
            ]
    assert record.loss_after == pytest.approx(sum(divergences).item() / 2, rel=1e-5)


def test_other_losses_store_no_logits():
    module, buffer = make_classifier(1), make_samples("new")
    with attached(module):
        merge(module, ODEMerge(), t=1.0, calibration=CalibrationSet(buffer, EntropyLoss(module)))
    assert held_logits(buffer, "new")[1] is None


def test_a_task_without_samples_has_no_logits_to_store():
    module, buffer = make_classifier(1), make_samples("other")
    with attached(module):
        merge(module, ODEMerge(), t=1.0, calibration=CalibrationSet(buffer, LogitsLoss(module)))
    assert buffer.without_logits() == ["other"]


@pytest.mark.parametrize(("failure", "error"), [("scores", TypeError), ("nan", NonFiniteLossError), ("late", OSError)])
def test_logits_that_cannot_be_had_leave_module_and_samples_as_they_were(failure, error):
    module, buffer = make_classifier(1), make_samples("new")
    passes = []

    def prediction_step(batch, task):
        passes.append(len(batch[0]))
        if failure == "late" and len(passes) == 2:
            raise OSError("the second micro-batch")
        scores = module(batch[0])
        return (scores.argmax(1) if failure == "scores" else scores * float("nan")), batch[1]

    module.prediction_step = prediction_step
    before, flags = bits(module), training_flags(module)
    with attached(module):
        module.train()
        calibration = CalibrationSet(buffer, LogitsLoss(module), batch_size=4)
        with pytest.raises(error, match="floating point|Merging task 'new': a logit .* not finite|second micro-batch"):
            merge(module, ODEMerge(), merged=take_snapshot(make_classifier(0)), calibration=calibration)
    assert same(bits(module), before)
    assert training_flags(module) == flags
    assert buffer.without_logits() == ["new"]


class Looking(MergeMethod):
    """Keeps the contexts it is given."""

    def __init__(self, *needs):
        self.needs, self.contexts = needs, []

    def start(self, incoming, context):
        return self.merge(incoming, incoming, 1.0, context)

    def merge(self, merged, incoming, t, context):
        self.contexts.append(context)
        return MergeResult(merged)


def test_input_moments_are_those_of_the_incoming_model_on_its_own_samples():
    method = Looking(InputMoments())
    for merged in (None, take_snapshot(make_net(0))):
        net = make_net(1).train()
        calibration = make_calibration(net.predict)
        merge(net, method, merged=merged, calibration=calibration, exclude=("head",))
        net = make_net(1).eval()
        [samples] = calibration.buffer.micro_batches_of("new", 100)
        found = method.contexts[-1][InputMoments]
        assert found.keys() == {"body.weight"}
        inputs = samples.samples[0]
        torch.testing.assert_close(found["body.weight"][0], inputs.T @ inputs / len(inputs))
        assert Calibration not in method.contexts[-1]


def test_input_moments_see_the_incoming_models_statistics():
    method, net, before = Looking(InputMoments()), make_net(1), make_net(0)
    calibration = make_calibration(net.predict)
    merge(net, method, merged=take_snapshot(before), calibration=calibration)
    net = make_net(1).eval()
    [samples] = calibration.buffer.micro_batches_of("new", 100)
    hidden = net["norm"](net["body"](samples.samples[0])).tanh().detach()
    torch.testing.assert_close(method.contexts[-1][InputMoments]["head.weight"][0], hidden.T @ hidden / len(hidden))


def test_input_moments_are_collected_only_for_methods_that_need_them():
    net, method = make_net(1), Looking(Calibration())
    merge(net, method, merged=take_snapshot(make_net(0)), calibration=make_calibration(net.predict))
    assert InputMoments not in method.contexts[-1]


def test_a_task_without_samples_has_no_input_moments():
    net, method = make_net(1), Looking(InputMoments())
    calibration = make_calibration(net.predict)
    buffer = CalibrationBuffer(10)
    buffer.add("old", (torch.ones(3, 3), torch.ones(3, 1)))
    calibration = CalibrationSet(buffer, calibration.batch_loss)
    merge(net, method, merged=take_snapshot(make_net(0)), calibration=calibration)
    assert method.contexts[-1][InputMoments] == {}


def test_moments_cannot_be_measured_without_samples():
    with pytest.raises(ValueError, match="'closed_form' needs calibration samples and a module with a loss, which"):
        merge(make_net(1), ClosedFormMerge(measured=0.5), merged=take_snapshot(make_net(0)))
    with pytest.raises(ValueError, match="needs calibration samples and a module with a loss, which"):
        merge(make_net(1), Looking(InputMoments(), Calibration()), merged=take_snapshot(make_net(0)))


def test_a_pass_that_fails_while_moments_are_measured_leaves_the_incoming_model():
    net, calibration = make_net(1), make_calibration(None)
    before = bits(net)
    with pytest.raises(TypeError, match="not callable"):
        merge(net, ClosedFormMerge(measured=0.5), merged=take_snapshot(make_net(0)), calibration=calibration)
    assert same(bits(net), before)
    assert not net["body"]._forward_pre_hooks


def test_methods_learn_of_groups_and_of_weights_stored_by_inputs():
    method = Looking()
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), torch.compile(nn.Conv1d(4, 4, 1)))
    merge(net, method)
    assert method.contexts[-1].groups == {"0.weight": 2}
    assert method.contexts[-1].transposed == {"1.weight"}


@pytest.mark.parametrize(
    "make", [lambda: ClosedFormMerge(measured=0.5), lambda: IsotropicMerge(1.0), TaskSingularVectorsMerge]
)
def test_transformers_conv1d_merges_as_the_linear_layer_of_its_transpose(make):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

    def twins(seed):
        torch.manual_seed(seed)
        ours = nn.Sequential()
        ours.add_module("c_attn", pytorch_utils.Conv1D(12, 4))
        ours.add_module("c_proj", pytorch_utils.Conv1D(2, 12))
        for parameter in ours.parameters():
            parameter.data.normal_()
        theirs = nn.Sequential()
        theirs.add_module("c_attn", nn.Linear(4, 12))
        theirs.add_module("c_proj", nn.Linear(12, 2))
        for name, parameter in theirs.named_parameters():
            parameter.data.copy_(ours.get_parameter(name).T if name.endswith("weight") else ours.get_parameter(name))
        return ours.double(), theirs.double()

    merged = []
    for side in range(2):
        method, snapshot, base = make(), None, take_snapshot(twins(9)[side])
        for number in range(3):
            net = twins(number)[side]
            calibration = make_calibration(lambda x, net=net: net(x).sum(1, keepdim=True), FP64, columns=4)
            settings = {"task": "new", "t": 1 / (number + 1), "merged": snapshot, "base": base}
            with merging(net, method, calibration=calibration, **settings) as made:
                snapshot = made.snapshot()
        merged.append(snapshot)
    assert merged[0].keys() == merged[1].keys()
    for name, found in merged[0].items():
        expected = merged[1][name]
        torch.testing.assert_close(found, expected.T if name.endswith("weight") else expected)
