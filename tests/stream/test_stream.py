import weakref

import pytest
import torch
from torch.utils.data import TensorDataset
from toy import Classifier, Incoming, Task, close, fit, same, weights

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.methods import METHODS, AverageMerge, resolve_method
from lightning_odem.methods.needs import BaseModel, Calibration, SecondMoments
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import TrainingTrace

WEIGHTS = [1.0, 2.0, 0.5]


class Breaking(AverageMerge):
    def merge(self, merged, incoming, t, context):
        raise RuntimeError("in the method")


@pytest.fixture
def fitted(small_stream):
    """Three models and what the callback made of them."""

    def fit_with(method, **options):
        module, incoming = Classifier(batch_norm=True), Incoming()
        merge = ContinualMergeCallback(method=method, weights=WEIGHTS, calibration_size=12)
        for number in range(3):
            fit(module, Task(number), incoming, merge, **options)
        return merge, incoming.models

    return fit_with


DATA_FREE = [name for name in sorted(METHODS) if set(resolve_method(name).needs) <= {BaseModel()}]


@pytest.mark.parametrize("method", [*DATA_FREE, "ode", "ode_paper", "average_replay"])
def test_a_stream_makes_of_the_models_what_the_callback_made(fitted, method):
    merge, models = fitted(method)
    module = Classifier(batch_norm=True)
    with attached(module):
        stream = Stream(method, base=merge._state.base, calibration_size=12)
        for number, (model, weight) in enumerate(zip(models, WEIGHTS, strict=True)):
            samples = stream.draw(Task(number).train_set, weight) if Calibration() in stream.method.needs else None
            record = stream.merge(module, model, f"task_{number + 1}", weight, samples)
    assert close(stream.state.merged, merge._state.merged, rtol=1e-5, atol=1e-6)
    assert record.t == merge.report.merges[-1].t
    assert record.gradient_evaluations == merge.report.merges[-1].gradient_evaluations


def test_in_half_precision_it_is_what_the_callback_made_to_the_bit(fitted):
    merge, models = fitted("average", precision="bf16-true")
    module, stream = Classifier(batch_norm=True).bfloat16(), Stream("average")
    for number, (model, weight) in enumerate(zip(models, WEIGHTS, strict=True)):
        stream.merge(module, model, str(number), weight)
    assert same(stream.state.merged, merge._state.merged)


def test_the_roundings_of_many_merges_in_bf16_do_not_add_up():
    module, generator = Classifier().bfloat16(), torch.Generator().manual_seed(0)
    models = [
        {name: (value + torch.randn(value.shape, generator=generator)).bfloat16() for name, value in like.items()}
        for like in [take_snapshot(Classifier())] * 40
    ]
    stream = Stream("average")
    for number, model in enumerate(models):
        stream.merge(module, model, str(number))
    mean = {name: sum(model[name].double() for model in models) / len(models) for name in models[0]}
    assert close(stream.state.merged, {name: value.float() for name, value in mean.items()}, rtol=1e-5, atol=1e-6)
    assert close(weights(module), {name: value.bfloat16() for name, value in mean.items()}, rtol=2**-7, atol=1e-6)


def merge_three(options, scramble=False):
    """Three models folded with eight samples, whose labels may be anything."""
    module, generator = Classifier(), torch.Generator().manual_seed(0)
    with attached(module):
        stream = Stream("ode", base=take_snapshot(module), calibration_size=8, calibration=options)
        for number in range(3):
            model = take_snapshot(Classifier())
            model = {name: value + torch.randn(value.shape, generator=generator) for name, value in model.items()}
            inputs, labels = Task(number).train_set.tensors
            labels = labels.flip(0) * 0 + number if scramble else labels
            samples = stream.draw(TensorDataset(inputs, labels), weight=number + 1.0)
            record = stream.merge(module, model, str(number), number + 1.0, samples)
    return stream, record


@pytest.mark.parametrize("loss", ["logits", "entropy"])
def test_labels_change_nothing_where_the_loss_does_not_read_them(loss):
    options = CalibrationOptions(loss=loss)
    (first, record), (second, _) = merge_three(options), merge_three(options, scramble=True)
    assert same(first.state.merged, second.state.merged)
    assert record.loss_after > 0.0
    assert not same(first.state.merged, merge_three(CalibrationOptions())[0].state.merged)


def test_every_task_keeps_the_logits_of_its_own_model():
    stream, _ = merge_three(CalibrationOptions(loss="logits"))
    assert stream.state.buffer.counts == {"0": 3, "1": 3, "2": 2}
    assert stream.state.buffer.without_logits() == []


def test_shares_by_utility_change_the_path_but_not_the_places():
    results = []
    for shares in ("quota", "equal", "utility"):
        stream, record = merge_three(CalibrationOptions(loss="logits", shares=shares))
        results.append((stream.state.merged, record.calibration, record.loss_after))
    (quota, places, loss), (equal, _, _), (utility, others, other_loss) = results
    assert same(quota, equal)
    assert places == others
    assert loss != other_loss


def test_an_incoming_model_is_not_kept():
    module, stream = Classifier(), Stream("average")
    for number in range(3):
        model = take_snapshot(Classifier())
        gone = weakref.ref(model["head.weight"])
        stream.merge(module, model, str(number))
        del model
        assert gone() is None


def test_a_merge_that_fails_leaves_the_stream_as_it_was():
    module = Classifier()
    stream = Stream(Breaking())
    stream.merge(module, take_snapshot(module), "a")
    before = {name: tensor.clone() for name, tensor in stream.state.merged.items()}
    with pytest.raises(RuntimeError, match="in the method"):
        stream.merge(module, take_snapshot(Classifier(lr=0.2)), "b")
    assert same(stream.state.merged, before)
    assert stream.state.report.weights == [1.0]


def test_models_of_another_shape_are_refused():
    module, stream = Classifier(), Stream("average")
    with pytest.raises(ValueError, match=r"head\.weight"):
        stream.merge(module, take_snapshot(Classifier(classes=5)), "a")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("opcm", "needs the base model"),
        ("ode", "needs the base model and calibration samples"),
        ("second_moment", "needs the optimizer's second moments"),
        ("trm_style", "weights from the training run .* and the task's training data"),
    ],
)
def test_methods_are_refused_what_was_not_given(method, message):
    with pytest.raises(ValueError, match=message):
        Stream(method).merge(Classifier(), take_snapshot(Classifier()), "a")


def test_a_trace_serves_methods_that_need_the_training():
    module = Classifier()
    first, second = (take_snapshot(Classifier()) for _ in range(2))
    second["head.bias"] += 4.0
    moments = [{name: torch.full_like(value, size) for name, value in first.items()} for size in (1.0, 3.0)]
    stream = Stream("second_moment")
    for model, moment in zip((first, second), moments, strict=True):
        stream.merge(module, model, str(id(model)), trace=TrainingTrace(collected={SecondMoments: moment}))
    torch.testing.assert_close(stream.state.merged["head.bias"], first["head.bias"] + 3.0)  # 4 x 3 / (1 + 3)


def test_a_method_used_before_starts_anew():
    method = resolve_method("magmax")
    results = []
    for _ in range(2):
        module, stream = Classifier(), Stream(method, base=take_snapshot(Classifier()))
        for shift in (1.0, -2.0):
            model = take_snapshot(Classifier())
            model["head.bias"] += shift
            stream.merge(module, model, str(shift))
        results.append(stream.state.merged)
    assert same(*results)
