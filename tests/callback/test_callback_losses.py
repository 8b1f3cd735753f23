"""Calibration losses other than the module's own on labels."""

import pytest
import torch
from torch.utils.data import TensorDataset
from toy import Classifier, Failing, Incoming, Streamed, Task, everything, fit, same, weights

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.methods import MergeMethod, ReleasedODEMerge
from lightning_odem.methods.needs import Calibration

pytestmark = pytest.mark.usefixtures("small_stream")


def make_merge(loss="logits", size=12, **settings):
    return ContinualMergeCallback(calibration_size=size, calibration=CalibrationOptions(loss=loss), **settings)


def stream(merge, tasks=2, module=None, kind=Task, **options):
    module, incoming = module or Classifier(dropout=0.2, batch_norm=True), Incoming()
    for number in range(tasks):
        fit(module, kind(number), incoming, merge, **options)
    return module, incoming.models


def held(merge):
    return {
        task: (samples["samples"], samples["logits"])
        for task, samples in merge._state.buffer.state_dict()["tasks"].items()
    }


def outputs(state, inputs, **options):
    """Of a model in eval mode, by hand."""
    module = Classifier(dropout=0.2, batch_norm=True, **options).eval()
    module.load_state_dict(state)
    with torch.no_grad():
        return module(inputs)


@pytest.mark.parametrize("kind", [Task, Streamed])
@pytest.mark.parametrize("batch_norm", ["average", "recalibrate"])
def test_samples_keep_the_logits_of_their_own_tasks_model_as_the_stream_goes_on(kind, batch_norm):
    merge = make_merge(batch_norm=batch_norm)
    _, models = stream(merge, tasks=3, kind=kind)
    assert [len(logits) for _, logits in held(merge).values()] == [4, 4, 4]
    for model, ((inputs, _), logits) in zip(models, held(merge).values(), strict=True):
        torch.testing.assert_close(logits, outputs(model, inputs), rtol=1e-5, atol=1e-6)


def test_the_divergence_at_the_end_of_the_path_is_that_of_the_merged_model():
    merge = make_merge()
    module, models = stream(merge)
    record, losses = merge.report.merges[1], []
    for (inputs, _), logits in held(merge).values():
        p, q = logits.double().softmax(1), outputs(everything(module), inputs).double().softmax(1)
        losses.append((p * (p / q).log()).sum(1).mean().item())
    assert record.loss_after == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert record.gradient_evaluations in (1, 2)  # a second piece only if the first helps
    # At the merged model before, which is task 1's own, its part was zero but for the batch-norm statistics.
    assert 0 < record.loss_after < record.loss_before


def test_the_entropy_at_the_end_of_the_path_is_that_of_the_merged_model():
    merge = make_merge("entropy")
    module, _ = stream(merge)
    losses = []
    for (inputs, _), logits in held(merge).values():
        assert logits is None
        p = outputs(everything(module), inputs).double().softmax(1)
        losses.append(-(p * p.log()).sum(1).mean().item())
    assert merge.report.merges[1].loss_after == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert merge.report.merges[1].gradient_evaluations in (1, 2)  # a second piece only if the first helps


@pytest.mark.parametrize("loss", ["logits", "entropy"])
def test_labels_of_the_calibration_samples_are_never_read(loss):
    merged = []
    for label in (None, -7, 0):
        module, merge = Classifier(), make_merge(loss, size=10)
        for number, name in enumerate("ab"):
            inputs, targets = Task(number).train_set.tensors
            targets = targets if label is None else torch.full_like(targets, label)
            merge.calibration_data[name] = TensorDataset(inputs, targets)
            fit(module, Task(number, name), merge)
        merged.append(weights(module))
    assert same(merged[0], merged[1])
    assert same(merged[0], merged[2])


def test_a_module_that_optimises_manually_needs_no_loss_of_its_own():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    merge = make_merge()
    stream(merge, module=Manual(), max_steps=3)
    assert merge.report.merges[1].gradient_evaluations in (1, 2)  # a second piece only if the first helps


class Classes(Classifier):
    def prediction_step(self, batch, task):
        return self(batch[0]).argmax(1), batch[1]


@pytest.mark.parametrize("loss", ["logits", "entropy"])
def test_a_module_without_class_scores_is_refused_before_training(loss):
    module = Classes()
    before = weights(module)
    with pytest.raises(TypeError, match=r"needs class scores of Classes.* on task 'task_1' it gave torch.int64 \[2\]"):
        fit(module, Task(0), make_merge(loss))
    assert same(weights(module), before)
    fit(module, Task(0), make_merge("labels"))


def test_predictions_without_a_gradient_are_refused_before_training():
    class Detached(Classifier):
        @torch.no_grad()
        def prediction_step(self, batch, task):
            return self(batch[0]), batch[1]

    module = Detached()
    before = weights(module)
    with pytest.raises(ValueError, match="calibration loss has no gradient"):
        fit(module, Task(0), make_merge())
    assert same(weights(module), before)


@pytest.mark.parametrize("before", ["labels", "entropy"])
def test_a_stream_of_another_loss_is_not_continued_with_logits(before):
    merge = make_merge(before)
    module, _ = stream(merge)
    merged, other = weights(module), make_merge("logits")
    other.load_state_dict(merge.state_dict())
    with pytest.raises(ValueError, match=r"samples of task_1, task_2 have no logits.*Continue this stream with"):
        fit(module, Task(2), other)
    assert same(weights(module), merged)


@pytest.mark.parametrize("after", ["logits", "labels", "entropy"])
def test_a_stream_of_logits_is_continued_with_any_loss(after):
    merge, other = make_merge("logits"), make_merge(after)
    module, _ = stream(merge)
    other.load_state_dict(merge.state_dict())
    fit(module, Task(2), other)
    assert other._state.buffer.without_logits() == ([] if after == "logits" else ["task_3"])
    assert other.report.merges[2].gradient_evaluations in (1, 2)  # a second piece only if the first helps


@pytest.mark.parametrize("method", [ReleasedODEMerge(step_size=0.25, refine=True), "average_replay"])
def test_methods_that_draw_from_the_samples_get_the_logits_along(method):
    merge = make_merge(method=method)
    module, models = stream(merge)
    assert merge.report.merges[1].sample_gradients > 0
    assert not same(everything(module), models[0])


class Breaking(MergeMethod):
    needs = (Calibration(),)

    def merge(self, merged, incoming, t, context):
        context[Calibration].loss_and_grad(merged)
        raise RuntimeError("in the method")

    def load_state_dict(self, state):
        """It takes the place of a method that keeps one."""


@pytest.mark.parametrize("where", ["method", "block"])
def test_a_merge_that_fails_leaves_the_samples_of_the_stream_as_they_were(where, monkeypatch):
    merge = make_merge()
    module, _ = stream(merge, tasks=1)
    before = {task: (samples[0].clone(), logits.clone()) for task, (samples, logits) in held(merge).items()}
    if where == "method":
        merge._stream.method = Breaking()
    else:
        monkeypatch.setattr(
            merge._measurement, "every_task", Failing("on_fit_start", RuntimeError("in the method"))._fail
        )
    with pytest.raises(RuntimeError, match="in the method"):
        fit(module, Task(1), merge)
    after = held(merge)
    assert list(after) == ["task_1"]
    assert torch.equal(after["task_1"][0][0], before["task_1"][0])
    assert torch.equal(after["task_1"][1], before["task_1"][1])
    assert len(before["task_1"][1]) == 12


def test_logits_are_of_the_trainers_precision():
    merge = make_merge()
    stream(merge, precision="bf16-mixed")
    assert {logits.dtype for _, logits in held(merge).values()} == {torch.bfloat16}


def test_logits_cost_a_method_without_calibration_nothing():
    merge = make_merge(method="average")
    stream(merge)
    assert held(merge) == {}
