"""Fits in a row: what each starts from, how long it trains, what is merged."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from toy import Classifier, Failing, Incoming, Task, close, everything, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


class Counted(ContinualMergeCallback):
    """Counts merges."""

    merges = 0

    def merge(self, trainer, pl_module):
        self.merges += 1
        return super().merge(trainer, pl_module)


def run(tasks, merge, module=None, one_trainer=False, **options):
    """Fit tasks in a row; returns the module and what came in to the merges."""
    module, incoming = module or Classifier(), Incoming()
    trainer = make_trainer(incoming, merge, **options)
    for number in range(tasks):
        if number and not one_trainer:
            trainer = make_trainer(incoming, merge, **options)
        torch.manual_seed(number)
        trainer.fit(module, datamodule=Task(number, shuffle=True))
    return module, incoming


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({}, 2, 6),
        ({"max_epochs": 1}, 1, 3),
        ({"max_steps": 4}, 2, 4),
        ({"max_steps": 4, "max_epochs": 3}, 2, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 2, 6),
    ],
    ids=["default", "max_epochs", "max_steps", "both_limits", "accumulation"],
)
def test_every_fit_trains_its_full_length_and_merges_once(one_trainer, options, epochs, steps):
    merge = Counted()
    _, incoming = run(3, merge, one_trainer=one_trainer, **options)
    assert merge.merges == 3
    assert incoming.epochs == [epochs] * 3
    assert incoming.steps == [steps] * 3
    assert merge.report.tasks == ["task_1", "task_2", "task_3"]


@pytest.mark.parametrize("options", [{}, {"max_steps": 4}], ids=["epochs", "steps"])
@pytest.mark.parametrize("finetune_from", ["base", "merged"])
def test_one_trainer_gives_the_same_merged_weights_as_new_ones_to_the_last_bit(options, finetune_from):
    results = [
        run(3, ContinualMergeCallback(finetune_from=finetune_from), Classifier(0.5, True), one, **options)
        for one in (False, True)
    ]
    (module, incoming), (other, other_incoming) = results
    assert same(everything(module), everything(other))
    assert all(map(same, incoming.models, other_incoming.models))


def test_a_run_is_reproduced_to_the_last_bit():
    modules = [run(2, ContinualMergeCallback(), Classifier(0.5, True))[0] for _ in range(2)]
    assert same(everything(modules[0]), everything(modules[1]))


class OneCycle(Classifier):
    """Its schedule lasts as long as the Trainer says the training does; writes down every learning rate."""

    def __init__(self):
        super().__init__()
        self.rates, self.global_steps = [], []

    def training_step(self, batch, batch_idx):
        if self.training:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.global_steps.append(self.trainer.global_step)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize(("options", "steps"), [({}, 6), ({"max_steps": 5}, 5)], ids=["epochs", "steps"])
def test_one_cycle_schedule_goes_through_a_full_cycle_on_every_fit_of_one_trainer(options, steps):
    module, _ = run(3, ContinualMergeCallback("average"), OneCycle(), one_trainer=True, **options)
    first, second, third = (module.rates[start : start + steps] for start in (0, steps, 2 * steps))
    assert first == second == third
    assert min(first) < 0.01
    assert max(first) > 0.09
    assert module.global_steps == 3 * list(range(steps))


def test_limits_raised_by_hand_train_on_as_lightning_does():
    module, incoming, merge = Classifier(), Incoming(), Counted()
    trainer = make_trainer(incoming, merge)
    trainer.fit(module, datamodule=Task(0))
    trainer.fit_loop.max_epochs += 3
    trainer.fit(module, datamodule=Task(1))
    assert incoming.steps == [6, 9]
    assert incoming.epochs == [2, 5]
    assert merge.merges == 2


def test_the_step_axis_of_the_loggers_goes_on_with_one_trainer():
    merge, module, trainer = ContinualMergeCallback(), Classifier(), None
    trainer = make_trainer(merge)
    seen = []
    for number in range(2):
        trainer.fit(module, datamodule=Task(number))
        seen.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
    assert seen == [6, 12]


def test_base_is_what_the_module_holds_when_the_first_fit_starts():
    module = Classifier()
    nn.init.constant_(module.body[0].weight, 0.25)
    base = weights(module)
    merge, incoming = ContinualMergeCallback(), Incoming()
    fit(module, Task(0), incoming, merge)
    first = everything(module)
    assert not same(weights(module), base)
    # What is done to the module between the fits does not matter.
    nn.init.zeros_(module.body[0].weight)
    fit(module, Task(1), incoming, merge)
    fit(module, Task(2), incoming, merge)
    for start in incoming.starts:
        assert same(start, base)
    assert same(first, incoming.models[0])


def test_finetuning_from_merged_starts_every_task_from_the_merged_model():
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(finetune_from="merged"), Incoming()
    merged = [everything(module)]
    for number in range(3):
        fit(module, Task(number), incoming, merge)
        merged.append(everything(module))
    assert all(map(same, incoming.starts, merged))


def test_a_first_fit_that_fails_leaves_its_base_for_the_next():
    module, merge, incoming = Classifier(), ContinualMergeCallback(), Incoming()
    base = weights(module)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, Task(0), incoming, merge, Failing("on_train_epoch_end", RuntimeError("power cut")))
    assert not same(weights(module), base)
    fit(module, Task(0), incoming, merge)
    assert same(incoming.starts[1], base)


def weighted_mean(models, utilities):
    total = sum(utilities)
    pairs = list(zip(models, utilities, strict=True))
    return {name: sum(model[name].double() * w for model, w in pairs).float() / total for name in models[0]}


class Overlapping(Task):
    def __init__(self, number, weight=None):
        super().__init__(number, name=f"t{number}", weight=weight)


@pytest.mark.parametrize(
    ("given", "on_tasks", "utilities"),
    [
        (None, (None, None, None), (1.0, 1.0, 1.0)),
        ([2.0, 1.0, 5.0], (None, None, None), (2.0, 1.0, 5.0)),
        ({"t2": 5.0, "t0": 2.0, "t1": 1.0}, (9.0, 9.0, 9.0), (2.0, 1.0, 5.0)),
        (None, (0.5, 3.0, 0.25), (0.5, 3.0, 0.25)),
    ],
    ids=["equal", "list", "dict_before_datamodule", "datamodule"],
)
def test_average_of_three_tasks_is_the_weighted_mean_of_the_incoming_models(given, on_tasks, utilities):
    module, merge, incoming = Classifier(), ContinualMergeCallback("average", weights=given), Incoming()
    for number, weight in enumerate(on_tasks):
        fit(module, Overlapping(number, weight), incoming, merge)
    assert merge.report.weights == list(utilities)
    assert close(weights(module), weighted_mean(incoming.models, utilities), atol=1e-6)
    expected = [utilities[k] / sum(utilities[: k + 1]) for k in range(3)]
    assert [record.t for record in merge.report.merges] == pytest.approx(expected)


@pytest.mark.parametrize("weight", [0.0, 0.001, 1.0, 1000.0])
def test_the_first_merge_takes_the_incoming_model_whatever_its_weight(weight):
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(), Incoming()
    fit(module, Task(0, weight=weight), incoming, merge)
    assert same(everything(module), incoming.models[0])


@pytest.mark.parametrize("method", ["ode", "average"])
@pytest.mark.parametrize("batch_norm", ["average", "keep"])
def test_a_task_of_weight_zero_leaves_the_merged_model_as_it_is_to_the_last_bit(method, batch_norm):
    module = Classifier(batch_norm=True)
    merge = ContinualMergeCallback(method, weights=[1.0, 2.0, 0.0], batch_norm=batch_norm)
    for number in range(2):
        fit(module, Task(number), merge)
    merged = everything(module)
    fit(module, Task(2), merge)
    assert same(everything(module), merged)
    assert len(merge.report.tasks) == 3


def test_a_task_after_tasks_of_weight_zero_takes_over():
    module, merge, incoming = Classifier(), ContinualMergeCallback(weights=[0.0, 1.0]), Incoming()
    for number in range(2):
        fit(module, Task(number), incoming, merge)
    assert same(everything(module), incoming.models[1])


def test_plain_dataloaders_without_a_datamodule_are_enough():
    module, merge = Classifier(), ContinualMergeCallback()
    for number in range(2):
        task = Task(number)
        make_trainer(merge).fit(module, DataLoader(task.train_set, batch_size=8), DataLoader(task.test_set))
    assert merge.report.tasks == ["task_1", "task_2"]
    assert len(merge.report.accuracy[1]) == 2


def test_a_stream_may_go_on_with_another_module_object_of_the_same_architecture():
    merge, incoming = ContinualMergeCallback("average"), Incoming()
    modules = [Classifier(), Classifier()]
    for number, module in enumerate(modules):
        fit(module, Task(number), incoming, merge)
    assert close(weights(modules[1]), weighted_mean(incoming.models, (1.0, 1.0)), atol=1e-6)


def test_ode_moves_towards_the_incoming_model_and_stops_on_the_way():
    module, merge, incoming = Classifier(), ContinualMergeCallback(), Incoming()
    fit(module, Task(0), incoming, merge)
    before = nn.utils.parameters_to_vector(module.parameters()).detach()
    fit(module, Task(1), incoming, merge)
    after = nn.utils.parameters_to_vector(module.parameters()).detach()
    arrived = torch.cat([value.flatten() for value in incoming.models[1].values()])
    assert 0 < (after - before).norm() <= (arrived - before).norm()
    record = merge.report.merges[1]
    assert record.path["t"][-1] == record.t == 0.5
    assert record.gradient_evaluations in (1, 2)  # a second piece only if the first helps


def test_the_stream_holds_the_tensors_of_its_method_once():
    merge = ContinualMergeCallback("ode", calibration_size=8)
    run(2, merge)
    stream, method = merge.state_dict()["method"], merge.method.state_dict()
    assert stream["mean"].keys() == method["mean"].keys()
    assert all(stream["mean"][name] is method["mean"][name] for name in method["mean"])
