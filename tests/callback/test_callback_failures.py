"""Fits and merges that fail leave the stream as it was, and the next fit works."""

import math

import lightning as L
import pytest
import torch
from identical import identical
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from toy import Classifier, Failing, Incoming, Task, everything, fit, make_trainer, same, weights

from lightning_odem import AverageMerge, ContinualMergeCallback
from lightning_odem.methods.function import FunctionMerge

pytestmark = pytest.mark.usefixtures("small_stream")


class Fragile(Classifier):
    """Its calibration loss does what ``accident`` says, and is cross-entropy otherwise."""

    accident = None

    def calibration_step(self, batch, task):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if self.accident is None else self.accident(loss, task)


def crash(loss, task):
    raise RuntimeError(f"out of memory on {task}")


def not_a_number(loss, task):
    return loss * math.nan


class Accident(L.Callback):
    """Lets it happen in the merge at the end of the training."""

    def __init__(self, accident):
        self.accident = accident

    def on_train_end(self, trainer, pl_module):
        pl_module.accident = self.accident


def stored(merge):
    """The state of the stream but for the task that has begun."""
    state = merge.state_dict()
    del state["started"]
    state.pop("random_now", None)
    return state


@pytest.mark.parametrize("batch_norm", ["average", "recalibrate"])
@pytest.mark.parametrize(
    ("accident", "error", "message"),
    [
        (crash, RuntimeError, "out of memory on task_1"),
        (not_a_number, FloatingPointError, "Merging task 'task_2': the loss of the incoming model.*step 0"),
        (lambda loss, task: KeyboardInterrupt, TypeError, "must be a scalar tensor"),
    ],
    ids=["exception", "nan", "no_loss"],
)
def test_a_merge_that_fails_leaves_the_fine_tuned_model_and_the_stream_as_it_was(accident, error, message, batch_norm):
    module, merge, incoming = Fragile(batch_norm=True), ContinualMergeCallback(batch_norm=batch_norm), Incoming()
    fit(module, Task(0), incoming, merge)
    before, files = stored(merge), sorted(merge.dirpath.iterdir())
    with pytest.raises(error, match=message), pytest.warns(match="fine-tuned weights are saved in") as warned:
        fit(module, Task(1), incoming, Accident(accident), merge)
    assert same(everything(module), incoming.models[1])
    assert identical(stored(merge), before)
    saved = merge.dirpath / "fine-tuned-02-task_2.ckpt"
    assert any(str(saved) in str(warning.message) for warning in warned)
    assert same(torch.load(saved)["state_dict"], incoming.models[1])
    assert sorted(merge.dirpath.iterdir()) == sorted([*files, saved])
    # Once the cause is gone, the stream goes on as if nothing had been.
    module.accident = None
    fit(module, Task(1), incoming, merge)
    other, reference = Fragile(batch_norm=True), ContinualMergeCallback(batch_norm=batch_norm, dirpath="other")
    for number in range(2):
        fit(other, Task(number), reference)
    assert same(everything(module), everything(other))
    assert merge.report.tasks == ["task_1", "task_2"]


def test_a_non_finite_loss_half_way_names_the_step():
    calls = []

    def later(loss, task):
        calls.append(task)
        return loss * (math.nan if len(calls) > 7 else 1.0)

    module, merge, incoming = Fragile(), ContinualMergeCallback("ode_paper"), Incoming()
    fit(module, Task(0), incoming, merge)
    # Two tasks make two micro-batches a pass: one pass at the incoming model, then one a step.
    with pytest.raises(FloatingPointError, match="Merging task 'task_2': the loss.* at step 2"):
        fit(module, Task(1), incoming, Accident(later), merge)
    assert same(everything(module), incoming.models[1])


def test_a_keyboard_interrupt_in_a_merge_saves_the_fine_tuned_model_and_leaves_it_in_the_module():
    def interrupt(loss, task):
        raise KeyboardInterrupt

    module, merge, incoming = Fragile(), ContinualMergeCallback(), Incoming()
    fit(module, Task(0), incoming, merge)
    with pytest.raises(SystemExit), pytest.warns(match="KeyboardInterrupt. The fine-tuned weights are saved in"):
        fit(module, Task(1), incoming, Accident(interrupt), merge)
    assert same(everything(module), incoming.models[1])
    assert same(torch.load(merge.dirpath / "fine-tuned-02-task_2.ckpt")["state_dict"], incoming.models[1])
    assert merge.report.tasks == ["task_1"]


def test_an_interrupted_merge_can_be_made_up_for_after_the_fit():
    module, merge, calls = Fragile(), ContinualMergeCallback("ode_paper", dirpath="stream"), []

    def interrupt_once(loss, task):
        calls.append(task)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return loss

    fit(module, Task(0), merge)
    trainer = make_trainer(Accident(interrupt_once), merge)
    with pytest.raises(SystemExit):
        trainer.fit(module, datamodule=Task(1))
    record = merge.merge(trainer, module)
    other, reference = Fragile(), ContinualMergeCallback("ode_paper", dirpath="reference")
    for number in range(2):
        fit(other, Task(number), reference)
    assert same(weights(module), weights(other))
    assert merge.report.accuracy == reference.report.accuracy
    assert ContinualMergeCallback(dirpath="stream").report.tasks == ["task_1", record.task]
    with pytest.raises(RuntimeError, match="There is no training to merge"):
        merge.merge(trainer, module)


def test_a_merge_method_with_a_memory_forgets_a_merge_that_failed():
    class Listing(AverageMerge):
        """Makes its list of merges longer in place."""

        merges = []

        def merge(self, merged, incoming, t, context):
            self.merges.append(t)
            return super().merge(merged, incoming, t, context)

        def state_dict(self):
            return {"merges": self.merges}

        def load_state_dict(self, state):
            self.merges = state.get("merges", [])

    module, merge = Classifier(), ContinualMergeCallback(Listing())
    first = Task(0)
    fit(module, first, merge)
    fit(module, Task(1), merge)
    targets = first.test_set.tensors[1]
    first.test_set.tensors = (first.test_set.tensors[0].resize_(12, 2), targets)  # its evaluation fails
    with pytest.raises(RuntimeError):
        fit(module, Task(2), merge)
    assert merge.method.merges == merge.state_dict()["method"]["merges"] == [0.5]


def test_retrying_a_failed_merge_from_the_last_checkpoint_merges_without_training(tmp_path):
    module, merge, incoming = Fragile(), ContinualMergeCallback(), Incoming()
    fit(module, Task(0), incoming, merge)
    last = ModelCheckpoint(tmp_path / "task", save_last=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, Task(1), incoming, Accident(crash), merge, last, enable_checkpointing=True)
    module.accident = None
    fit(module, Task(1), incoming, merge, ckpt_path=tmp_path / "task" / "last.ckpt")
    assert incoming.steps == [6, 6]
    assert merge.report.tasks == ["task_1", "task_2"]
    assert not same(everything(module), incoming.models[1])


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("on_train_batch_end", KeyboardInterrupt()),
        ("on_train_epoch_end", RuntimeError("power cut")),
        ("on_validation_end", RuntimeError("power cut")),
    ],
    ids=["interrupt", "epoch_end", "validation"],
)
def test_a_training_that_breaks_off_merges_nothing_and_the_next_fit_works(hook, error, one_trainer):
    module, merge, incoming, failing = Classifier(), ContinualMergeCallback(), Incoming(), Failing(hook, error)
    trainer = make_trainer(incoming, merge)
    trainer.fit(module, datamodule=Task(0))
    before = stored(merge)
    if not one_trainer:
        trainer = make_trainer(incoming, merge)
    trainer.callbacks.append(failing)
    with pytest.raises((SystemExit, RuntimeError)):
        trainer.fit(module, datamodule=Task(1))
    assert identical(stored(merge), before)
    trainer.callbacks.remove(failing)
    if not one_trainer:
        trainer = make_trainer(incoming, merge)
    trainer.fit(module, datamodule=Task(1))
    other, reference = Classifier(), ContinualMergeCallback(dirpath="other")
    for number in range(2):
        fit(other, Task(number), reference)
    assert incoming.steps == [6, 6]
    assert same(weights(module), weights(other))


def test_a_failing_hook_behind_the_merge_leaves_the_merge_done():
    module, merge, incoming = Classifier(), ContinualMergeCallback(), Incoming()
    with pytest.raises(RuntimeError, match="late"):
        fit(module, Task(0), incoming, merge, Failing("on_fit_end", RuntimeError("late")))
    assert merge.report.tasks == ["task_1"]
    assert same(everything(module), incoming.models[0])


class Spoils(L.Callback):
    """Puts a value into the module at the end of the training."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.state_dict()[self.name].view(-1)[0] = self.value


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("method", ["average", "opcm", "magmax", "ode"])
@pytest.mark.parametrize(
    ("name", "value"), [("head.weight", math.nan), ("head.bias", math.inf), ("body.1.running_var", math.nan)]
)
def test_a_training_that_diverged_is_not_merged(method, number, name, value):
    module, merge = Classifier(batch_norm=True), ContinualMergeCallback(method)
    for before in range(number):
        fit(module, Task(before), merge)
    with (
        pytest.raises(ValueError, match=rf"the incoming model holds infinite or NaN values in {name} \(its training"),
        pytest.warns(match="fine-tuned weights are saved in"),
    ):
        fit(module, Task(number), Spoils(name, value), merge)
    assert len(merge.report.tasks) == number
    module = Classifier(batch_norm=True)
    if number:
        merge.load_base(module)
    fit(module, Task(number), merge)
    assert len(merge.report.tasks) == number + 1
    assert all(tensor.isfinite().all() for tensor in merge.state_dict()["merged"].values())


def test_a_method_that_makes_a_weight_infinite_is_refused():
    def overflow(merged, incoming, t, context):
        return merged / 0.0

    module, merge = Classifier(), ContinualMergeCallback(FunctionMerge(overflow))
    fit(module, Task(0), merge)
    with pytest.raises(ValueError, match=r"the merged model holds infinite or NaN values in .*the merge method made"):
        fit(module, Task(1), merge)
    assert merge.report.tasks == ["task_1"]
