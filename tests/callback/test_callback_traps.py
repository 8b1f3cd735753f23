"""What Lightning does without a word, and would lose a merge or take one for another."""

import warnings

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from toy import Classifier, Task, everything, fit, make_trainer, same

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}], ids=["no_epoch", "no_batch"])
def test_a_fit_that_trains_nothing_warns_and_leaves_the_merged_weights_in_place(options):
    module, merge = Classifier(), ContinualMergeCallback()
    fit(module, Task(0), merge)
    merged, report = everything(module), merge.report.as_dict()
    with pytest.warns(UserWarning, match="trained nothing, so nothing was merged"):
        fit(module, Task(1), merge, **options)
    assert same(everything(module), merged)
    assert str(merge.report.as_dict()) == str(report)
    fit(module, Task(1), merge)
    assert merge.report.tasks == ["task_1", "task_2"]


def test_a_finished_checkpoint_without_a_pending_merge_warns_and_leaves_the_merged_weights_in_place(tmp_path):
    module, merge = Classifier(), ContinualMergeCallback()
    trainer = fit(module, Task(0), merge)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    merged = everything(module)
    with pytest.warns(UserWarning, match="trained nothing, so nothing was merged"):
        trainer.fit(module, datamodule=Task(0), ckpt_path=tmp_path / "after.ckpt")
    assert same(everything(module), merged)
    assert merge.report.tasks == ["task_1"]


def test_fast_dev_run_merges_and_writes_no_file(small_stream):
    module, merge = Classifier(), ContinualMergeCallback()
    for number in range(2):
        fit(module, Task(number), merge, fast_dev_run=True, logger=CSVLogger("."))
    assert merge.report.tasks == ["task_1", "task_2"]
    assert merge.dirpath is None
    assert merge.last_merged_path is None
    assert files(small_stream) == []


def test_fast_dev_run_in_a_stream_that_has_a_directory_writes_no_file_either(small_stream):
    module, merge = Classifier(), ContinualMergeCallback()
    fit(module, Task(0), merge)
    before = files(small_stream)
    fit(module, Task(1), merge, fast_dev_run=True)
    assert files(small_stream) == before
    assert merge.report.merges[1].checkpoint is None


def test_sanity_checking_records_nothing():
    class Watch(L.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            self.seen = merge.report.as_dict(), merge.dirpath, dict(merge.state_dict()["started"])

    module, merge, watch = Classifier(), ContinualMergeCallback(), Watch()
    before = merge.report.as_dict()
    fit(module, Task(0), merge, watch, num_sanity_val_steps=2)
    assert watch.seen == (before, None, {})
    assert merge.report.tasks == ["task_1"]


def test_evaluating_an_old_checkpoint_does_not_rewind_a_stream_in_progress(tmp_path):
    module, merge = Classifier(), ContinualMergeCallback()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(module, Task(0), merge, checkpoint, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer = fit(module, Task(1), merge)
    merged = everything(module)
    for path in (tmp_path / "one.ckpt", tmp_path / "last.ckpt"):
        for evaluate in (trainer.test, trainer.validate):
            evaluate(module, datamodule=Task(0), ckpt_path=path, verbose=False)
            assert merge.report.tasks == ["task_1", "task_2"]
    fit(module, Task(2), merge)
    assert merge.report.tasks == ["task_1", "task_2", "task_3"]
    other, reference = Classifier(), ContinualMergeCallback()
    for number in range(3):
        fit(other, Task(number), reference)
        if number == 1:
            assert same(everything(other), merged)
    assert same(everything(module), everything(other))


@pytest.mark.parametrize("process", ["same", "other"])
def test_evaluating_a_checkpoint_of_unmerged_weights_warns(tmp_path, process):
    module, merge, last = Classifier(), ContinualMergeCallback(), ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(module, Task(0, "digits"), merge, last, enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unmerged weights")
        trainer.test(module, datamodule=Task(0), verbose=False)
        trainer.test(module, datamodule=Task(0), ckpt_path=merge.last_merged_path, verbose=False)
    if process == "other":
        trainer = make_trainer(ContinualMergeCallback())
    arguments = {"model": module, "ckpt_path": last.last_model_path} if process == "other" else {}
    with pytest.warns(UserWarning, match="saved while task 'digits' was trained: it holds fine-tuned, unmerged"):
        trainer.test(datamodule=Task(0), verbose=False, **arguments)


def test_testing_between_the_tasks_with_one_trainer_changes_nothing():
    results = []
    for tests in (False, True):
        module, merge = Classifier(), ContinualMergeCallback()
        trainer = make_trainer(merge)
        for number in range(3):
            trainer.fit(module, datamodule=Task(number))
            if tests:
                trainer.test(module, datamodule=Task(number), verbose=False)
                trainer.test(module, datamodule=Task(0), ckpt_path=merge.last_merged_path, verbose=False)
        results.append(everything(module))
    assert same(*results)
