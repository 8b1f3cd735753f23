"""What a merge leaves untouched in the user's module, and what each task keeps for itself."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from toy import Classifier, Incoming, Task, accuracy, close, everything, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


class Logged(Classifier):
    """Keeps the losses of its training steps, and logs a metric that is a submodule."""

    def __init__(self, **options):
        super().__init__(dropout=0.5, batch_norm=True, **options)
        self.metric = MulticlassAccuracy(num_classes=3)
        self.losses, self.metrics = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.metric(self(batch[0]), batch[1])
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        if self.trainer.training and self.training:
            self.losses.append(loss.item())
        return loss

    def on_train_epoch_end(self):
        self.metrics.append(self.metric.compute().item())


class Splitting(Task):
    """Splits its data at random in setup, without a seed of its own, as many datamodules do."""

    def setup(self, stage):
        self.part, self.rest = random_split(self.train_set, [16, 8])

    def calibration_dataset(self):
        torch.rand(1)
        return self.train_set


@pytest.mark.parametrize("method", ["ode", "average"])
@pytest.mark.parametrize("kind", [Task, Splitting])
def test_training_goes_exactly_as_without_the_callback(method, kind):
    traces = []
    for merge in ([], [ContinualMergeCallback(method, batch_norm="recalibrate")]):
        module = Logged()
        torch.manual_seed(3)
        fit(module, kind(0, shuffle=True), *merge, num_sanity_val_steps=2)
        traces.append((module.losses, module.metrics, torch.rand(3).tolist(), everything(module)))
    (losses, metrics, random, state), (*others, other_state) = traces
    assert len(losses) == 6
    assert [losses, metrics, random] == others
    assert same(state, other_state)


def test_a_later_task_trains_exactly_as_it_would_from_the_base_alone():
    module, alone, merge = Logged(), Logged(), ContinualMergeCallback()
    fit(module, Task(0, shuffle=True), merge)
    module.losses.clear()
    for model, callbacks in ((module, [merge]), (alone, [])):
        torch.manual_seed(3)
        fit(model, Task(1, shuffle=True), *callbacks)
    assert module.losses == alone.losses


class Before(Incoming):
    """Notes what a merge should not change, just before it."""

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.noted = notes(pl_module)


def notes(module):
    return {
        "training": [submodule.training for submodule in module.modules()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "grad": [None if parameter.grad is None else parameter.grad.tolist() for parameter in module.parameters()],
        "random": torch.get_rng_state().tolist(),
        "metric": module.metric.update_count,
        "log": ("log" in vars(module), "log_dict" in vars(module)),
    }


@pytest.mark.parametrize("batch_norm", ["average", "keep", "recalibrate"])
def test_flags_gradients_random_state_and_metrics_are_as_before_the_merge(batch_norm):
    module, before, merge = Logged(), Before(), ContinualMergeCallback(batch_norm=batch_norm)
    module.body[1].eval()  # as a user freezes batch norm
    module.body[0].bias.requires_grad_(False)

    class After(Before):
        pass

    after = After()
    for number in range(2):
        fit(module, Task(number), before, merge, after)
        assert after.noted == before.noted
        assert [submodule.training for submodule in module.modules()].count(False) == 1
        assert not module.body[0].bias.requires_grad


def test_a_merge_that_fails_leaves_flags_gradients_and_random_state_too():
    class Odd(Logged):
        def calibration_step(self, batch, task):
            torch.rand(1)
            loss = F.cross_entropy(self(batch[0]), batch[1])
            trained = self.trainer.fit_loop.epoch_progress.current.completed == 2
            return loss * float("nan") if trained and task == "task_2" else loss

    module, before, merge = Odd(), Before(), ContinualMergeCallback()
    fit(module, Task(0), before, merge)
    with pytest.raises(FloatingPointError):
        fit(module, Task(1), before, merge)
    after = notes(module)
    assert after == before.noted


@pytest.mark.parametrize("policy", ["average", "keep", "recalibrate"])
@pytest.mark.parametrize("method", ["average", "ode"])
def test_batch_norm_statistics_follow_the_policy(policy, method):
    module, incoming = Classifier(batch_norm=True), Incoming()
    merge = ContinualMergeCallback(method, batch_norm=policy)
    for number in range(2):
        fit(module, Task(number), incoming, merge)
    first, second = incoming.models
    after = everything(module)
    mean, var = "body.1.running_mean", "body.1.running_var"
    if policy == "keep":
        expected = {key: first[key] for key in (mean, var)}
    elif policy == "average":
        expected = {key: (first[key] + second[key]) / 2 for key in (mean, var)}
    else:
        with torch.no_grad():
            features = [module.body[0](Task(number).train_set.tensors[0]) for number in range(2)]
        means = torch.stack([part.mean(0) for part in features])
        squares = torch.stack([part.var(0, correction=0) + part.mean(0) ** 2 for part in features])
        expected = {mean: means.mean(0), var: squares.mean(0) - means.mean(0) ** 2}
    assert close({key: after[key] for key in (mean, var)}, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------- parameters of a task


def test_an_excluded_head_is_kept_per_task_and_used_for_its_own_evaluation():
    module, merge, incoming = Classifier(), ContinualMergeCallback("average", exclude=["head"]), Incoming()
    tasks = [Task(number) for number in range(3)]
    for task in tasks:
        fit(module, task, incoming, merge)
    mean = {name: sum(model[name] for model in incoming.models) / 3 for name in incoming.models[0]}
    body = {name: value for name, value in weights(module).items() if name.startswith("body")}
    assert close(body, {name: mean[name] for name in body}, atol=1e-6)
    # The module is left with the head of the last task.
    assert torch.equal(module.head.weight, incoming.models[2]["head.weight"])
    expected = []
    for task, model in zip(tasks, incoming.models, strict=True):
        head = {name: model[name] for name in ("head.weight", "head.bias")}
        module.load_state_dict({**module.state_dict(), **head})
        expected.append(accuracy(module, task.test_set))
    assert merge.report.accuracy[2] == pytest.approx(expected)


def test_load_task_writes_the_merged_weights_and_the_head_of_a_task():
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(exclude=["head"]), Incoming()
    for number in range(3):
        fit(module, Task(number), incoming, merge)
    merged, fresh = everything(module), Classifier(batch_norm=True)
    for number, model in enumerate(incoming.models):
        merge.load_task(fresh, f"task_{number + 1}")
        expected = {name: (model if name.startswith("head") else merged)[name] for name in merged}
        assert same(everything(fresh), expected)
        assert accuracy(fresh, Task(number).test_set) == merge.report.accuracy[2][number]
    with pytest.raises(ValueError, match="'task_9' is not in the stream, which holds: task_1, task_2, task_3"):
        merge.load_task(fresh, "task_9")


def test_load_task_refuses_a_module_of_another_architecture_and_leaves_it_alone():
    module, merge, other = Classifier(), ContinualMergeCallback(), Classifier(classes=5)
    fit(module, Task(0), merge)
    before = everything(other)
    with pytest.raises(ValueError, match="head.weight"):
        merge.load_task(other, "task_1")
    assert same(everything(other), before)


def test_a_task_starts_with_the_excluded_parameters_that_the_module_has():
    module, merge, incoming = Classifier(), ContinualMergeCallback(exclude=["head"]), Incoming()
    fit(module, Task(0), incoming, merge)
    fit(module, Task(1), incoming, merge)
    nn.init.zeros_(module.head.weight)
    fit(module, Task(2), incoming, merge)
    assert torch.equal(incoming.starts[1]["head.weight"], incoming.models[0]["head.weight"])
    assert not incoming.starts[2]["head.weight"].any()
    assert all(torch.equal(start["body.0.weight"], incoming.starts[0]["body.0.weight"]) for start in incoming.starts)


class OneHeadPerTask(Classifier):
    """Makes a head when a task comes that has none, and names them as its own."""

    task_specific = ("heads",)

    def __init__(self):
        super().__init__()
        del self.head
        self.heads = nn.ModuleDict()

    def setup(self, stage):
        self.task = self.trainer.datamodule.task_name
        if self.task not in self.heads:
            self.heads[self.task] = nn.Linear(8, 3)
        for name, head in self.heads.items():
            head.requires_grad_(name == self.task)

    def forward(self, inputs, task=None):
        return self.heads[task or self.task](self.body(inputs))

    def calibration_step(self, batch, task):
        return F.cross_entropy(self(batch[0], task), batch[1])

    def prediction_step(self, batch, task):
        return self(batch[0], task), batch[1]


@pytest.mark.parametrize("one_trainer", [False, True])
def test_a_module_with_a_head_per_task_is_merged_and_evaluated_task_by_task(one_trainer):
    module, merge = OneHeadPerTask(), ContinualMergeCallback()
    trainer = make_trainer(merge)
    heads = {}
    for number, name in enumerate("abc"):
        trainer = trainer if one_trainer else make_trainer(merge)
        trainer.fit(module, datamodule=Task(number, name))
        heads[name] = everything(module.heads[name])
    assert merge.report.tasks == ["a", "b", "c"]
    assert {name: everything(head) for name, head in module.heads.items()}.keys() == heads.keys()
    assert all(same(everything(module.heads[name]), head) for name, head in heads.items())
    for number, name in enumerate("abc"):
        merge.load_task(module, name)
        module.task = name
        assert merge.report.accuracy[2][number] == accuracy(module, Task(number).test_set)


def test_task_specific_patterns_given_as_one_string_are_refused_before_training():
    class Named(OneHeadPerTask):
        task_specific = "heads"

    module = Named()
    before = weights(module)
    with pytest.raises(ValueError, match=r"Named.task_specific is a tuple of patterns.*write \('heads',\)"):
        fit(module, Task(0, "a"), ContinualMergeCallback())
    assert same(before, {name: weights(module)[name] for name in before})


def test_a_failure_while_older_tasks_are_evaluated_leaves_the_new_task_its_head():
    module, merge, incoming = Classifier(), ContinualMergeCallback(exclude=["head"]), Incoming()
    first = Task(0)
    fit(module, first, incoming, merge)

    class Spoil(L.Callback):
        def on_train_end(self, trainer, pl_module):
            first.test_set.tensors[0].resize_(12, 2)  # the next reader of the data fails

    with pytest.raises(RuntimeError):
        fit(module, Task(1), incoming, Spoil(), merge)
    assert same(everything(module), incoming.models[1])
    assert merge.report.tasks == ["task_1"]


def test_an_excluded_and_frozen_parameter_is_no_ones_own():
    module, merge = Classifier(), ContinualMergeCallback(exclude=["head"])
    module.head.requires_grad_(False)
    before = weights(module.head)
    for number in range(2):
        fit(module, Task(number), merge)
    assert same(weights(module.head), before)
    assert merge.state_dict()["task_parameters"] == {"task_1": {}, "task_2": {}}


def test_tied_weights_stay_tied():
    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.body[0] = nn.Linear(4, 4)
            self.head = nn.Linear(4, 4)
            self.head.weight = self.body[0].weight

    module, merge = Tied(), ContinualMergeCallback()
    for number in range(2):
        fit(module, Task(number), merge)
    assert module.head.weight is module.body[0].weight


class Writing(CSVLogger):
    """Counts what is written to it directly."""

    def __init__(self):
        super().__init__("logs")
        self.written = []

    @property
    def experiment(self):
        self.written.append("experiment")
        return super().experiment

    def log_metrics(self, metrics, step=None):
        if "own" in metrics:
            self.written.append(metrics["own"])


class Keeping(Classifier):
    """Keeps what Lightning's migration guide tells it to, and writes to its logger."""

    def __init__(self):
        super().__init__()
        self.outputs, self.seen, self.counts, self.state = [], 0, {"train": []}, []
        self.lifetime, self.latest = MeanMetric(), None
        self.unlabelled = iter(DataLoader(torch.arange(1000), 2))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        self.counts["train"].append(len(batch[0]))
        self.seen += len(batch[0])
        self.lifetime.update(loss.detach())
        self.latest = loss.detach()
        self.logger.log_metrics({"own": loss.item()}, self.global_step)
        self.loggers[0].experiment.log_metrics({"more": loss.item()}, self.global_step)
        return loss + 0.0 * next(self.unlabelled).sum()

    def on_train_epoch_end(self):
        assert len(self.outputs) == self.trainer.num_training_batches
        self.outputs.clear()
        self.state.append((self.seen, str(self.counts), self.lifetime.update_count, self.lifetime.compute().item()))
        self.state.append((self.latest.item(), self.unlabelled._num_yielded))


@pytest.mark.parametrize("method", ["ode", "ode_paper"])
def test_what_training_step_keeps_and_writes_is_as_without_the_callback(method):
    traces = []
    for merge in ([], [ContinualMergeCallback(method, calibration_size=12)]):
        module, logger = Keeping(), Writing()
        torch.manual_seed(3)
        fit(module, Task(0, shuffle=True), *merge, logger=logger)
        traces.append((module.state, module.outputs, logger.written, next(module.unlabelled).tolist()))
    assert traces[0] == traces[1]


def test_every_pass_of_a_merge_begins_with_the_same_counters():
    counters = set()

    class Annealing(Classifier):
        def __init__(self):
            super().__init__()
            self.steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            if not self.training:
                counters.add(self.steps)
            return super().training_step(batch, batch_idx)

    module, merge = Annealing(), ContinualMergeCallback("ode_paper")
    for number in range(2):
        fit(module, Task(number), merge)
    assert counters == {1, 7, 13}  # after none, six and twelve steps of training
