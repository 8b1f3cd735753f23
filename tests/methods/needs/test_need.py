"""A need defined here alone: callback, comparisons and merges of trained models know nothing of it."""

import pytest
import torch
from images import make_model, make_stream
from images import make_trainer as make_image_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import Classifier, Task, Watching, fit, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import (
    BaseModel,
    MergeContext,
    MergeMethod,
    MergeResult,
    Need,
    RepresentationCorrection,
    Snapshots,
    resolve_method,
)
from lightning_odem.methods.needs import SecondMoments, combine
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import TrainingTrace


class Drift(Need[torch.Tensor]):
    """Sum of the weights over the steps of the training, a vector [d]."""

    source = "the sum of the weights over the training"

    def __init__(self, longest=100):
        self.longest = longest

    def check(self, run):
        if run.trainer.max_epochs > self.longest:
            raise ValueError(f"{run.method} sums {self.longest} epochs at most, got {run.trainer.max_epochs}.")

    def see(self, run, kept):
        now = take_snapshot(run.module, run.select)
        kept["sum"] = {name: tensor + kept["sum"][name] for name, tensor in now.items()} if kept else now

    def collect(self, run, kept):
        return kept["sum"]

    def build(self, sources):
        return sources.vector.gather(sources.collected[Drift])

    def account(self, built, record):
        record.sample_gradients += 7


class Drifting(Watching):
    """The incoming model plus the sum."""

    needs = (Drift(),)

    def __init__(self, *needs):
        super().__init__(*(needs or self.needs))

    def merge(self, merged, incoming, t, context):
        self.contexts.append(context)
        return MergeResult(incoming + context[Drift])


class Recorded(Classifier):
    """Sums its weights itself, from the first step of each training on."""

    def on_train_start(self):
        self.sum = 0

    def on_train_batch_end(self, *_):
        self.sum = self.sum + flat(weights(self))


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


def test_a_need_of_ones_own_goes_through_the_callback(small_stream):
    module, method = Recorded(), Drifting()
    merge = ContinualMergeCallback(method)
    for number in range(2):
        fit(module, Task(number), merge)
        assert torch.equal(method.contexts[number][Drift], module.sum)
    assert [record.sample_gradients for record in merge.report.merges] == [7, 7]


def test_a_need_of_ones_own_is_checked_before_the_training(small_stream):
    module, merge = Classifier(), ContinualMergeCallback(Drifting(Drift(longest=1)))
    before = weights(module)
    with pytest.raises(ValueError, match="Drifting sums 1 epochs at most, got 2"):
        fit(module, Task(0), merge)
    assert torch.equal(flat(weights(module)), flat(before))


def test_what_a_need_keeps_goes_through_a_checkpoint(small_stream):
    whole, resumed = Drifting(), Drifting()
    fit(Classifier(), Task(0), ContinualMergeCallback(whole))
    saving, broken = ModelCheckpoint("saved"), ContinualMergeCallback(Drifting())
    fit(Classifier(), Task(0, "task_1"), broken, saving, max_epochs=1, enable_checkpointing=True)
    fit(Classifier(), Task(0, "task_1"), ContinualMergeCallback(resumed), ckpt_path=saving.best_model_path)
    assert torch.equal(resumed.contexts[0][Drift], whole.contexts[0][Drift])


def test_a_need_of_ones_own_goes_through_a_stream():
    base, found = take_snapshot(Classifier()), []
    module, stream = Classifier(), Stream(Drifting(), base=base)
    for shift in (1.0, 2.0):
        drift = {name: torch.full_like(tensor, shift) for name, tensor in base.items()}
        found.append(stream.merge(module, base, str(shift), trace=TrainingTrace(collected={Drift: drift})))
    assert all(torch.equal(stream.state.merged[name], tensor + 2.0) for name, tensor in base.items())
    assert found[1].sample_gradients == 7


def test_a_merge_without_what_is_needed_is_refused_with_its_source():
    with pytest.raises(ValueError, match="'Drifting' needs the sum of the weights over the training, which this merge"):
        Stream(Drifting()).merge(Classifier(), take_snapshot(Classifier()), "a")


def test_a_comparison_keeps_what_a_need_collects_with_the_fine_tuned_models(tmp_path):
    settings = {"orders": 1, "weighting": ["uniform"], "calibration_sizes": [24], "joint": False}
    methods = [Drifting(), Drifting()]
    files = []
    for method, more in zip(methods, ({}, {"split": "val"}), strict=True):
        make_image_trainer().compare(
            make_model(), make_stream(), methods={"it": method}, dirpath=str(tmp_path), **settings, **more
        )
        files.append({path: path.stat().st_mtime_ns for path in (tmp_path / "fine_tuned").iterdir()})
    assert files[0] == files[1]
    trained, loaded = ([context[Drift] for context in method.contexts] for method in methods)
    assert len(trained) == 3
    assert all(map(torch.equal, trained, loaded))
    assert all(drift.any() for drift in trained)


def test_a_wrapper_adds_to_the_needs_of_what_it_wraps():
    assert [type(need).__name__ for need in RepresentationCorrection(Drifting()).needs] == ["Drift", "TrainingData"]


def test_needs_are_equal_where_class_and_settings_are():
    assert Snapshots(4) == Snapshots(4) != Snapshots(8)
    assert BaseModel() == BaseModel() != Snapshots()
    assert len({Snapshots(4), Snapshots(4), Snapshots(8), BaseModel()}) == 3


def test_of_one_class_there_is_one_need_that_serves_all():
    assert combine([BaseModel(), Snapshots(4), Drift(), Snapshots(16), Drift(), BaseModel()]) == (
        *(BaseModel(), Snapshots(16), Drift()),
    )


def test_what_is_not_declared_is_refused_when_it_is_read():
    with pytest.raises(LookupError, match=r"reads context\[Drift\], but does not declare it.* Declared are: BaseModel"):
        MergeContext([], [], {BaseModel: torch.zeros(1)})[Drift]


class Idle(MergeMethod):
    def merge(self, merged, incoming, t, context):
        return MergeResult(incoming)


def test_a_class_stands_for_a_need_without_arguments_and_one_needs_no_tuple():
    method = Idle()
    method.needs = (BaseModel, SecondMoments())
    assert resolve_method(method).needs == (BaseModel(), SecondMoments())
    method.needs = Snapshots(3)
    assert resolve_method(method).needs == (Snapshots(3),)


@pytest.mark.parametrize("needs", [("bases",), (3,), (int,), "base", {"base"}])
def test_what_is_no_need_is_refused(needs):
    method = Idle()
    method.needs = needs
    with pytest.raises(ValueError, match=r"a method can need objects such as BaseModel\(\), Calibration\(\)"):
        resolve_method(method)
