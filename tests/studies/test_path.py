import re

import pytest
import torch
from toy import Classifier, Task, close, everything, make_trainer, same

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.flow import NonFiniteLossError, ReusedGradient, StepControl
from lightning_odem.methods import AverageMerge, FixedTime, ODEMerge, PaperODEMerge
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.stream.stream import Stream
from lightning_odem.studies.path import StraightLine, check_points, follow_path


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "batch_norm"])
def pair(request):
    """Two fine-tuned models, and samples of their tasks."""
    models, samples = [], []
    for number in range(2):
        task, module = Task(number), Classifier(batch_norm=request.param)
        make_trainer().fit(module, datamodule=task)
        models.append(take_snapshot(module))
        samples.append(task.train_set.tensors)
    return request.param, models, samples


def follow(pair, flow, visit=None, points=11, **options):
    """The module at every stop, and the record."""
    batch_norm, (merged, incoming), samples = pair
    module, buffer, stops = Classifier(batch_norm=batch_norm), CalibrationBuffer(16), {}

    def keep(t, take):
        stops[t] = everything(module)
        if visit is not None:
            visit(module, t)

    with attached(module):
        for task, held in zip("ab", samples, strict=True):
            buffer.add(task, held)
        record = follow_path(
            module,
            flow,
            merged,
            incoming,
            task="b",
            calibration=CalibrationSet(buffer, ModuleLoss(module)),
            points=points,
            visit=keep,
            division=Division(()),
            **options,
        )
        after = everything(module)
    return stops, record, after


def merged_separately(pair, t, **options):
    batch_norm, models, samples = pair
    module = Classifier(batch_norm=batch_norm)
    with attached(module):
        stream = Stream(PaperODEMerge(), calibration_size=16, **options)
        for task, model, weight, held in zip("ab", models, (1 - t, t), samples, strict=True):
            stream.merge(module, model, task, weight, held)
    return stream.state.merged


def test_a_stop_is_what_a_merge_with_that_operating_time_gives(pair):
    stops, _, _ = follow(pair, PaperODEMerge())
    assert list(stops) == pytest.approx([0.1 * index for index in range(11)])
    for t, stop in stops.items():
        separate = merged_separately(pair, t)
        # With batch norm the losses on the way are measured with other statistics.
        tolerance = 5e-3 if pair[0] else 1e-6
        for name in separate:
            torch.testing.assert_close(stop[name], separate[name], atol=tolerance, rtol=1e-6)
            if "running" in name:
                torch.testing.assert_close(stop[name], separate[name], atol=1e-7, rtol=1e-6)


def test_the_path_is_no_straight_line(pair):
    stops, _, _ = follow(pair, PaperODEMerge())
    line, _, _ = follow(pair, StraightLine(0.05))
    assert (stops[0.9]["head.weight"] - line[0.9]["head.weight"]).abs().max() > 0.01


def test_the_ends_are_the_two_models_bit_by_bit(pair):
    _, (merged, incoming), _ = pair
    for flow in (PaperODEMerge(), StraightLine(0.05)):
        stops, _, after = follow(pair, flow)
        assert same(stops[0.0], merged)
        assert same(stops[1.0], incoming)
        assert same(after, incoming)


def test_the_straight_line_interpolates_weights_and_statistics(pair):
    _, (merged, incoming), _ = pair
    stops, _, _ = follow(pair, StraightLine(0.1))
    for t, stop in stops.items():
        for name, value in stop.items():
            if value.is_floating_point():
                assert torch.equal(value, merged[name].lerp(incoming[name], t)), name


def test_all_stops_together_cost_one_integration(pair):
    _, record, _ = follow(pair, PaperODEMerge(), points=21)
    assert record.gradient_evaluations == 20
    assert record.sample_gradients == 20 * 16


def test_the_losses_of_the_path_are_those_of_the_models_at_its_stops(pair):
    _, _, samples = pair
    for flow in (PaperODEMerge(0.1), StraightLine(0.1)):
        losses = []

        def measure(module, t, losses=losses):
            with torch.no_grad():
                parts = [torch.nn.functional.cross_entropy(module(x), y) for x, y in balanced(samples)]
            losses.append(torch.stack(parts).mean().item())

        _, record, _ = follow(pair, flow, measure)
        assert record.path["loss"] == pytest.approx(losses, rel=1e-5)
        assert record.path["t"] == pytest.approx([0.1 * index for index in range(11)])


def balanced(samples):
    """What a buffer of 16 holds of each."""
    buffer = CalibrationBuffer(16)
    for task, held in zip("ab", samples, strict=True):
        buffer.add(task, held)
    return [batch.samples for batch in buffer.micro_batches(16)]


def test_looking_at_the_models_leaves_the_path_alone(pair):
    def disturb(module, t):
        module.train()
        module(torch.randn(4, 4))
        module.eval()
        for parameter in module.parameters():
            parameter.data.add_(1.0)

    quiet, record, _ = follow(pair, PaperODEMerge())
    disturbed, other, _ = follow(pair, PaperODEMerge(), disturb)
    for t in quiet:
        moved = [name for name, value in quiet[t].items() if not torch.equal(value, disturbed[t][name])]
        assert set(moved) <= {"body.1.num_batches_tracked"}
    assert record.path["loss"] == other.path["loss"]


@pytest.mark.parametrize("policy", ["keep", "recalibrate"])
def test_statistics_at_a_stop_follow_the_policy_of_the_merge(policy):
    models, samples = [], []
    for number in range(2):
        task, module = Task(number), Classifier(batch_norm=True)
        make_trainer().fit(module, datamodule=task)
        models.append(take_snapshot(module))
        samples.append(task.train_set.tensors)
    pair = (True, models, samples)
    stops, _, _ = follow(pair, PaperODEMerge(), batch_norm=policy)
    separate = merged_separately(pair, 0.3, batch_norm=policy)
    for name in ("body.1.running_mean", "body.1.running_var"):
        assert torch.allclose(stops[0.3][name], separate[name], rtol=0.05)


def test_snapshots_at_stops_are_not_rounded_to_half_precision():
    models = [take_snapshot(Classifier(lr=lr)) for lr in (0.1, 0.2)]
    models[1] = {name: value + 1.0 for name, value in models[1].items()}
    merged = {name: value + 2**-12 for name, value in models[0].items()}  # as merges before have left it
    module, buffer, stops = Classifier().bfloat16(), CalibrationBuffer(16), {}
    with attached(module):
        buffer.add("b", (Task(0).train_set.tensors[0].bfloat16(), Task(0).train_set.tensors[1]))
        follow_path(
            module,
            StraightLine(0.5),
            merged,
            {name: value.bfloat16() for name, value in models[1].items()},
            task="b",
            calibration=CalibrationSet(buffer, ModuleLoss(module)),
            points=3,
            visit=lambda t, take: stops.update({t: (take(), take_snapshot(module))}),
            division=Division(()),
        )
    assert list(stops) == [0.0, 0.5, 1.0]
    for t, (found, rounded) in stops.items():
        exact = {name: value.lerp(models[1][name].bfloat16().float(), t) for name, value in merged.items()}
        assert close(found, exact, rtol=1e-6, atol=1e-7)
        assert same({name: value.bfloat16() for name, value in found.items()}, rounded)


def test_a_failing_visit_ends_the_path(pair):
    def fail(module, t):
        if t == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(pair, PaperODEMerge(), fail)


def test_a_loss_that_is_not_finite_names_the_task(pair):
    batch_norm, models, ((inputs, targets), other) = pair
    broken = (batch_norm, models, [(inputs.clone().fill_(torch.nan), targets), other])
    with pytest.raises(NonFiniteLossError, match="Merging task 'b': the loss of the incoming model is nan"):
        follow(broken, PaperODEMerge())


@pytest.mark.parametrize(
    ("step_size", "points", "message"),
    [
        (0.05, 10, "10 points .* lie 0.1111 apart, which is no multiple of the step size 0.05"),
        (0.3, 2, "2 points .* no multiple of the step size 0.3"),
        (0.1, 21, "21 points .* lie 0.05 apart, which is no multiple of the step size 0.1"),
        (0.05, 1, "two points at least"),
    ],
)
def test_points_that_the_steps_do_not_hit_are_refused(step_size, points, message):
    with pytest.raises(ValueError, match=message):
        check_points(PaperODEMerge(step_size), points)


@pytest.mark.parametrize(
    "options",
    [{"solver": ReusedGradient(times=2)}, {"step_control": StepControl()}, {"operating_time": FixedTime(0.5)}],
)
def test_a_flow_whose_steps_are_not_those_of_the_stops_is_refused(options):
    with pytest.raises(ValueError, match=re.escape("{}={!r}".format(*next(iter(options.items()))))):
        check_points(PaperODEMerge(**options), 11)


@pytest.mark.parametrize("method", [AverageMerge(), ODEMerge()])
def test_another_method_is_refused(method):
    with pytest.raises(TypeError, match=f"path of PaperODEMerge can be followed, not that of {type(method).__name__}"):
        check_points(method, 11)
