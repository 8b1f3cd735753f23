"""Where the samples come from: those of the calibration, and those that accuracies are measured on."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from toy import Classifier, Incoming, Streamed, Task, accuracy, close, everything, fit, make_trainer, same, weights

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.methods import METHODS
from lightning_odem.methods.needs import Calibration

pytestmark = pytest.mark.usefixtures("small_stream")


def test_an_iterable_dataset_is_sampled_while_it_trains():
    module, merge = Classifier(), ContinualMergeCallback(calibration_size=10)
    for number in range(2):
        fit(module, Streamed(number), merge)
    assert merge.report.merges[0].calibration == {"task_1": 10}
    assert merge.report.merges[1].calibration == {"task_1": 5, "task_2": 5}
    samples = merge.state_dict()["buffer"]["tasks"]["task_2"]
    assert samples["transferred"]
    offered = {tuple(row) for row in Task(1).train_set.tensors[0].tolist()}
    assert {tuple(row) for row in samples["samples"][0].tolist()} <= offered


def test_an_iterable_dataset_gives_the_same_merge_as_a_dataset_kept_whole():
    modules = []  # of the whole buffer's gradients: minibatches depend on the samples' order
    for kind in (Streamed, Task):
        module, merge = Classifier(), ContinualMergeCallback("ode_paper", calibration_size=100)
        for number in range(2):
            fit(module, kind(number), merge)
        modules.append(module)
    assert close(*map(weights, modules), atol=1e-5)


def buffered(merge, task):
    return merge.state_dict()["buffer"]["tasks"][task]["samples"][0]


def test_a_calibration_dataset_of_the_datamodule_comes_before_its_training_data():
    class Prepared(Task):
        def calibration_dataset(self):
            return self.test_set

    merge = ContinualMergeCallback(calibration_size=12)
    fit(Classifier(), Prepared(0), merge)
    assert sorted(buffered(merge, "task_1").tolist()) == sorted(Task(0).test_set.tensors[0].tolist())


def test_a_calibration_dataloader_of_the_datamodule_is_read_until_there_is_enough():
    class Prepared(Task):
        def calibration_dataloader(self):
            return self.test_dataloader()

    merge = ContinualMergeCallback(calibration_size=7)
    fit(Classifier(), Prepared(0), merge)
    held = {tuple(row) for row in buffered(merge, "task_1").tolist()}
    assert len(held) == 7
    assert held <= {tuple(row) for row in Task(0).test_set.tensors[0][:10].tolist()}


def test_calibration_data_given_to_the_callback_comes_before_the_datamodules():
    class Prepared(Task):
        def calibration_dataset(self):
            return self.test_set

    merge = ContinualMergeCallback(calibration_size=24)
    given = Task(7).train_set
    merge.calibration_data["a"] = given
    fit(Classifier(), Prepared(0, "a"), merge)
    assert sorted(buffered(merge, "a").tolist()) == sorted(given.tensors[0].tolist())


def test_a_calibration_set_without_room_for_a_task_is_refused_before_training():
    module, merge = Classifier(), ContinualMergeCallback(calibration_size=1)
    fit(module, Task(0), merge)
    with pytest.raises(ValueError, match="no place for task 2"):
        fit(module, Task(1), merge)


def test_a_task_of_weight_zero_gets_no_place_where_places_go_by_utility():
    module = Classifier()
    options = CalibrationOptions(quota="utility")
    merge = ContinualMergeCallback(weights=[1.0, 0.0, 1.0], calibration_size=12, calibration=options)
    for number in range(3):
        fit(module, Task(number), merge)
    assert merge.report.merges[1].calibration == {"task_1": 12, "task_2": 0}
    assert merge.report.merges[2].calibration == {"task_1": 6, "task_2": 0, "task_3": 6}


def test_tasks_of_weight_zero_at_the_start_of_a_stream_are_merged_where_places_go_by_utility():
    module, incoming = Classifier(), Incoming()
    options = CalibrationOptions(quota="utility")
    merge = ContinualMergeCallback(weights=[0.0, 0.0, 1.0], calibration=options)
    for number in range(3):
        fit(module, Task(number), incoming, merge)
    assert same(everything(module), incoming.models[2])


def test_several_training_loaders_are_refused_before_training():
    class Several(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    class Pair(Task):
        def train_dataloader(self):
            loader = super().train_dataloader()
            return [loader, loader]

    with pytest.raises(ValueError, match=r"of type list; give the datamodule a calibration_dataset\(\)"):
        fit(Several(), Pair(0), ContinualMergeCallback())


def test_loaders_given_after_a_datamodule_take_its_place_in_one_trainer():
    module, merge = Classifier(), ContinualMergeCallback()
    trainer, second = make_trainer(merge), Task(1)
    trainer.fit(module, datamodule=Task(0, "first"))
    trainer.fit(module, second.train_dataloader(), second.val_dataloader())
    assert merge.report.tasks == ["first", "task_2"]
    assert merge.report.accuracy[1][1] == accuracy(module, second.test_set)


def test_loaders_of_the_module_itself_serve_as_well():
    class Whole(Classifier):
        def setup(self, stage):
            self.data = Task(self.number)

        def train_dataloader(self):
            return self.data.train_dataloader()

        def test_dataloader(self):
            return self.data.test_dataloader()

    module, merge = Whole(), ContinualMergeCallback()
    for module.number in range(2):
        make_trainer(merge).fit(module)
    assert merge.report.accuracy[1] == [accuracy(module, Task(number).test_set) for number in range(2)]


def merge_two(kind, **options):
    module, merge = Classifier(), ContinualMergeCallback(calibration_size=6, **options)
    for number in range(2):
        fit(module, kind(number), merge)
    return module, merge


def test_the_samples_that_the_buffer_keeps_are_the_same_for_every_method():
    kept = [merge_two(Task, method=method)[1].state_dict()["buffer"]["tasks"] for method in ("ode", "ode_paper")]
    for task in ("task_1", "task_2"):
        assert (kept[0][task]["samples"][0] == kept[1][task]["samples"][0]).all()


class Notes(dict):
    """What a test writes down; plain dicts of a module are put back after a merge."""


class Seeing(Classifier):
    """Notes how its batches come: the containers, and dtype, device and order in memory of what is in them."""

    def __init__(self):
        super().__init__()
        self.seen = Notes({True: set(), False: set()})

    def training_step(self, batch, batch_idx):
        self.note(batch)
        inputs, targets = batch.values() if isinstance(batch, dict) else batch
        # As users write it, for batches of their own.
        return cross_entropy(self(inputs.mul_(2)), targets.neg_().neg_().view(-1)[::2])

    def prediction_step(self, batch, task):
        inputs, targets = self.note(batch)
        return self(inputs), targets[:, 0]

    def validation_step(self, batch, batch_idx):
        pass

    def note(self, batch):
        leaves = list(batch.values()) if isinstance(batch, dict) else list(batch)
        forms = [(leaf.dtype, leaf.device, leaf.is_contiguous(), leaf.mT.is_contiguous()) for leaf in leaves]
        if len(leaves[0]) > 1:  # of a single sample all orders are one
            self.seen[self.training].add((type(batch), *forms))
        return leaves


def pairs(task, container, transposed):
    """A dataloader of inputs and of two targets a sample."""

    def collate(samples):
        inputs, targets = default_collate(samples)
        inputs = inputs.t().contiguous().t() if transposed else inputs
        return container((inputs, torch.stack([targets, targets], 1)))

    return DataLoader(task.train_set, batch_size=8, collate_fn=collate)


def as_dict(pair):
    return dict(zip("xy", pair, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("container", [list, tuple, as_dict])
@pytest.mark.parametrize("method", [name for name, rule in METHODS.items() if Calibration() in rule.needs])
def test_a_merge_gives_training_step_batches_as_the_dataloader_does(method, container, transposed):
    module, merge = Seeing(), ContinualMergeCallback(method, calibration_size=30)
    for number in range(3):
        loader = pairs(Task(number), container, transposed)
        make_trainer(merge).fit(module, loader, loader)
    held = merge.state_dict()["buffer"]["tasks"]["task_1"]["samples"]
    offered = {tuple(row) for row in Task(0).train_set.tensors[0].tolist()}
    assert {tuple(row) for row in (held["x"] if container is as_dict else held[0]).tolist()} <= offered
    assert len(module.seen[True]) == 1
    assert module.seen[False] == module.seen[True]
