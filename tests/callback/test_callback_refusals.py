"""What a task and a module have to bring along; what does not fit is refused before any training."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from toy import Classifier, Incoming, Task, close, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


def test_a_task_name_used_before_is_refused_before_training():
    module, merge = Classifier(), ContinualMergeCallback()
    fit(module, Task(0, "digits"), merge)
    merged = weights(module)
    with pytest.raises(ValueError, match="'digits' has been merged already, as task 1 of 1"):
        fit(module, Task(1, "digits"), merge)
    assert same(weights(module), merged)


def test_a_task_name_may_be_a_number():
    module, merge = Classifier(), ContinualMergeCallback()
    for number in range(2):
        fit(module, Task(number, name=number), merge)
    assert merge.report.tasks == ["0", "1"]


def test_a_missing_weight_is_refused_before_training():
    module, merge = Classifier(), ContinualMergeCallback(weights=[1.0])
    fit(module, Task(0), merge)
    merged = weights(module)
    with pytest.raises(ValueError, match="No weight for task 2"):
        fit(module, Task(1), merge)
    with pytest.raises(ValueError, match="No weight for task 'b'; weights are given for a"):
        fit(Classifier(), Task(1, "b"), ContinualMergeCallback(weights={"a": 1.0}))
    assert same(weights(module), merged)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_task_weight_that_is_no_utility_is_refused_before_training(weight):
    module = Classifier()
    before = weights(module)
    with pytest.raises(ValueError, match="finite and non-negative"):
        fit(module, Task(0, weight=weight), ContinualMergeCallback())
    assert same(weights(module), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "Unknown merge method 'magic'; the methods are average, .*ode"),
        ({"finetune_from": "last"}, "finetune_from is one of base, merged"),
        ({"batch_norm": "reset"}, "batch_norm is one of average, keep, recalibrate"),
        ({"exclude": "head"}, r"exclude is a list of patterns.*write \['head'\]"),
        ({"weights": [1.0, -1.0]}, "-1.0 at index 1"),
        ({"weights": {"a": float("nan")}}, "nan at index 0"),
        ({"weights": [0.0, 0.0]}, "At least one"),
        ({"calibration_size": 0}, "calibration_size=0"),
        ({"calibration_size": 12.5}, "calibration_size must be an integer"),
        ({"calibration_size": float("nan")}, "calibration_size must be an integer"),
        ({"weights": "equal"}, "weights must be a list"),
        ({"dirpath": 3}, "dirpath must be the path"),
        ({"calibration": {"seed": 1}}, "calibration must be CalibrationOptions"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContinualMergeCallback(**arguments)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"exclude=\['haed'\] matches no parameter of Classifier.*head.weight"):
        fit(Classifier(), Task(0), ContinualMergeCallback(exclude=["head", "haed"]))


def test_another_architecture_lists_everything_that_differs_before_training():
    class Wider(Classifier):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 5)
            self.extra = torch.nn.Linear(2, 2)

    merge = ContinualMergeCallback()
    fit(Classifier(), Task(0), merge)
    module = Wider()
    before = weights(module)
    with pytest.raises(ValueError, match="only models of one architecture can be merged") as caught:
        fit(module, Task(1), merge)
    for name in ("extra.weight", "extra.bias", "head.weight: (5, 8)", "head.bias: (5,)"):
        assert name in str(caught.value)
    assert same(weights(module), before)
    assert merge.report.tasks == ["task_1"]


def test_parameters_moved_by_one_task_and_frozen_in_the_next_are_merged_too():
    module, merge, incoming = Classifier(), ContinualMergeCallback("average"), Incoming()
    fit(module, Task(0), incoming, merge)
    module.body.requires_grad_(False)
    fit(module, Task(1), incoming, merge)
    mean = {name: (incoming.models[0][name] + incoming.models[1][name]) / 2 for name in incoming.models[0]}
    assert close(weights(module), mean, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in module.body.parameters())


def test_a_backbone_frozen_in_all_tasks_stays_at_the_base():
    module, merge = Classifier(), ContinualMergeCallback()
    module.body.requires_grad_(False)
    base = weights(module.body)
    for number in range(3):
        fit(module, Task(number), merge)
    assert same(weights(module.body), base)


def test_a_module_whose_loss_has_no_gradient_is_refused_before_training():
    class Detached(Classifier):
        def calibration_step(self, batch, task):
            return F.cross_entropy(self(batch[0]), batch[1]).detach().requires_grad_()

    module = Detached()
    before = weights(module)
    with pytest.raises(ValueError, match="calibration loss has no gradient"):
        fit(module, Task(0), ContinualMergeCallback())
    assert same(weights(module), before)


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimisation_without_a_calibration_step_is_refused_before_training():
    module = Manual()
    before = weights(module)
    with pytest.raises(TypeError, match=r"Manual optimises manually.*calibration_step\(batch, task\)"):
        fit(module, Task(0), ContinualMergeCallback())
    assert same(weights(module), before)


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
def test_manual_optimisation_with_a_calibration_step_is_merged(one_trainer):
    class Prepared(Manual):
        tasks = ()

        def calibration_step(self, batch, task):
            Prepared.tasks = sorted({*self.tasks, task})  # on the module it would be put back
            return F.cross_entropy(self(batch[0]), batch[1])

    module, merge, incoming = Prepared(), ContinualMergeCallback(), Incoming()
    trainer = make_trainer(incoming, merge, max_steps=4)
    for number in range(2):
        trainer.fit(module, datamodule=Task(number))
        if not one_trainer:
            trainer = make_trainer(incoming, merge, max_steps=4)
    assert module.tasks == merge.report.tasks == ["task_1", "task_2"]
    assert incoming.steps == [4, 4]


def test_the_average_asks_nothing_of_the_module():
    module, merge = Manual(), ContinualMergeCallback("average")
    for number in range(2):
        fit(module, Task(number), merge)
    assert merge.report.merges[1].calibration == {}


class _Signatures:
    class WithIndex(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    class WithoutIndex(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Underscore(Classifier):
        def training_step(self, batch, _):
            return super().training_step(batch, 0)

    class Variable(Classifier):
        def training_step(self, *arguments):
            return super().training_step(*arguments)

    class Dictionary(Classifier):
        def training_step(self, batch, i):
            return {"loss": super().training_step(batch, i), "note": "x"}


@pytest.mark.parametrize("kind", [kind for name, kind in vars(_Signatures).items() if name[0] != "_"])
def test_training_steps_that_lightning_takes_are_taken_for_calibration(kind):
    module, merge = kind(), ContinualMergeCallback()
    for number in range(2):
        fit(module, Task(number), merge)
    assert merge.report.merges[1].gradient_evaluations in (1, 2)  # a second piece only if the first helps


def test_labels_outside_the_head_are_found_before_training():
    module, task = Classifier(), Task(0)
    before = weights(module)
    task.train_set.tensors[1].add_(7)
    with pytest.raises(IndexError, match=r"Target \d is out of bounds"):
        fit(module, task, ContinualMergeCallback())
    assert same(weights(module), before)


def test_a_single_label_outside_the_head_is_named_before_training_with_task_and_classes():
    module, task = Classifier(), Task(0, "digits", size=200)
    before = weights(module)
    task.train_set.tensors[1][150] = 98
    with pytest.raises(ValueError, match="'digits' has a training sample of label 98, but .* 3 classes"):
        fit(module, task, ContinualMergeCallback())
    assert same(weights(module), before)


def test_a_label_without_a_score_is_named_before_training_where_no_samples_are_kept():
    module, task = Classifier(), Task(0, "digits")
    before = weights(module)
    task.test_set.tensors[1][2] = 98
    with pytest.raises(ValueError, match="'digits' has a sample of label 98, but Classifier predicts .* 3 classes"):
        fit(module, task, ContinualMergeCallback("average"))
    assert same(weights(module), before)


class Mapped(Classifier):
    """Labels are numbers of the user's own, which the loss maps to classes or leaves out."""

    def training_step(self, batch, batch_idx):
        labels = torch.where(batch[1] < 0, batch[1], batch[1] % 10)
        return F.cross_entropy(self(batch[0]), labels, ignore_index=-7)

    def prediction_step(self, batch, task):
        return self(batch[0]), batch[1] % 10


def test_labels_that_the_module_maps_or_leaves_out_are_merged():
    module, task = Mapped(), Task(0)
    task.train_set.tensors[1][5:] += 40
    task.train_set.tensors[1][9] = -7
    fit(module, task, merge := ContinualMergeCallback(calibration_size=24))
    assert merge.report.tasks == ["task_1"]


class OneOutput(Classifier):
    """A regression, or one logit of a binary classification, by ``loss`` and ``squeeze``."""

    def __init__(self, loss=F.binary_cross_entropy_with_logits, squeeze=False):
        super().__init__(classes=1)
        self.loss, self.squeeze = loss, squeeze

    def forward(self, inputs):
        return super().forward(inputs).squeeze(1) if self.squeeze else super().forward(inputs)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]).flatten(), (batch[1] > 0).float())

    def validation_step(self, batch, batch_idx):
        pass


class Measured(Task):
    """A task whose targets are numbers."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        for data in (self.train_set, self.test_set):
            data.tensors = data.tensors[0], data.tensors[1].float()


@pytest.mark.parametrize("method", ["average", "ode"])
@pytest.mark.parametrize(
    ("settings", "kind", "found"),
    [
        ({}, Task, r"float32 \[5, 1\] and targets int64 \[5\]"),
        ({"squeeze": True}, Task, r"float32 \[5\] and targets int64 \[5\]"),
        ({"loss": F.mse_loss, "squeeze": True}, Measured, r"float32 \[5\] and targets float32 \[5\]"),
        ({"loss": F.mse_loss}, Measured, r"float32 \[5, 1\] and targets float32 \[5\]"),
    ],
)
def test_what_is_no_class_is_refused_before_training(settings, kind, found, method):
    module, merge = OneOutput(**settings), ContinualMergeCallback(method)
    before = weights(module)
    with pytest.raises(
        ValueError, match=rf"OneOutput on task 'task_1' .*, got {found}.*prediction_step\(batch, task\)"
    ):
        fit(module, kind(0), merge)
    assert same(weights(module), before)
    assert not merge.report.tasks


class Thresholded(OneOutput):
    def prediction_step(self, batch, task):
        return self(batch[0]).squeeze(1) > 0, batch[1] > 0


def test_one_logit_is_measured_with_the_prediction_step_that_the_refusal_names():
    module, merge, task = Thresholded(), ContinualMergeCallback("average"), Task(0)
    fit(module, task, merge)
    inputs, targets = task.test_set.tensors
    right = (module.eval()(inputs).squeeze(1) > 0) == (targets > 0)
    assert merge.report.accuracy == [[right.double().mean().item()]]


class WithoutTests(Task):
    """A task that brings no data to measure its accuracies on."""

    def test_dataloader(self):
        return []

    val_dataloader = test_dataloader


def test_without_data_to_measure_on_a_regression_is_merged():
    module, merge = OneOutput(F.mse_loss), ContinualMergeCallback("average")
    with pytest.warns(UserWarning, match="no test or validation data: its accuracies will be NaN"):
        fit(module, WithoutTests(0), merge)
    assert math.isnan(merge.report.accuracy[0][0])


@pytest.mark.parametrize("own_data", [False, True])
def test_data_given_later_for_an_earlier_task_is_checked_before_training(own_data):
    module, merge = Thresholded(), ContinualMergeCallback("average")
    base = weights(module)
    fit(module, WithoutTests(0), merge)
    merge.evaluation_data["task_1"] = [(torch.zeros(3, 4), torch.zeros(3))]
    module.prediction_step = lambda batch, task: (
        Thresholded.prediction_step(module, batch, task) if task == "task_2" else (module(batch[0]), batch[1])
    )
    with pytest.raises(ValueError, match=r"on task 'task_1' .*, got float32 \[3, 1\] and targets float32 \[3\]"):
        fit(module, (Task if own_data else WithoutTests)(1), merge)
    assert same(weights(module), base)  # where training begins
    assert merge.report.tasks == ["task_1"]


def test_data_of_an_earlier_task_without_a_sample_is_refused_before_training():
    module, merge = Thresholded(), ContinualMergeCallback("average")
    base = weights(module)
    fit(module, WithoutTests(0), merge)
    merge.evaluation_data["task_1"] = []
    with pytest.raises(ValueError, match="Task 'task_1' has no sample to measure an accuracy on"):
        fit(module, Task(1), merge)
    assert same(weights(module), base)  # where training begins


@pytest.mark.parametrize("step", [2, 3], ids=["mid_epoch", "between_epochs"])
def test_a_task_resumed_in_another_process_is_checked_before_its_next_step(step, small_stream):
    every = ModelCheckpoint(small_stream, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Thresholded(), Task(0, "task_1"), ContinualMergeCallback("average"), every, enable_checkpointing=True)
    module, incoming = OneOutput(), Incoming()
    with pytest.raises(ValueError, match=r"OneOutput on task 'task_1' .*, got float32 \[5, 1\]"):
        fit(
            module,
            Task(0, "task_1"),
            incoming,
            ContinualMergeCallback("average"),
            ckpt_path=small_stream / f"step={step}.ckpt",
        )
    assert incoming.batches <= 1  # the batch whose step was not taken
    assert same(weights(module), torch.load(small_stream / f"step={step}.ckpt")["state_dict"])


def test_a_disk_without_room_for_the_merge_is_refused_before_training():
    module = Classifier()
    module.register_buffer("table", torch.zeros(1).expand(10**14))  # as large as no disk, without memory
    before = weights(module)
    with pytest.raises(OSError, match=r"The merge of this task writes 12\d{8} MB, but \d+ MB are free"):
        fit(module, Task(0), ContinualMergeCallback("average", dirpath="run"))
    assert same(weights(module), before)
