"""Lightning's own callbacks and tools beside the merge."""

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from toy import Classifier, Failing, Incoming, Task, everything, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


@pytest.mark.parametrize(
    "averaging",
    [lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), lambda: EMAWeightAveraging(decay=0.5)],
    ids=["swa", "ema"],
)
class TestWeightAveraging:
    def test_behind_the_merge_is_refused_before_training(self, averaging):
        module = Classifier()
        before = weights(module)
        with pytest.raises(MisconfigurationException, match="would overwrite the merged weights"):
            fit(module, Task(0), ContinualMergeCallback(), averaging())
        assert same(weights(module), before)

    def test_before_the_merge_makes_the_average_the_incoming_model(self, averaging):
        plain, module = Classifier(), Classifier()
        fit(plain, Task(0))
        incoming, merge = Incoming(), ContinualMergeCallback()
        fit(module, Task(0), averaging(), incoming, merge)
        assert same(everything(module), incoming.models[0])
        assert not same(weights(module), weights(plain))

    @pytest.mark.parametrize(("one_trainer", "batch_norm"), [(False, False), (True, False), (True, True)])
    def test_an_instance_shared_by_all_tasks_averages_each_anew(self, averaging, one_trainer, batch_norm):
        shared, models = averaging(), []
        for callbacks in (lambda: shared, averaging):
            module, incoming = Classifier(batch_norm=batch_norm), Incoming()
            merge = ContinualMergeCallback("average")
            trainer = make_trainer(callbacks(), incoming, merge, max_epochs=3)
            for number in range(3):
                trainer.fit(module, datamodule=Task(number))
                if not (one_trainer and callbacks() is shared):
                    trainer = make_trainer(callbacks(), incoming, merge, max_epochs=3)
            models.append(incoming.models)
        assert all(map(same, *models))

    def test_validating_after_the_fit_measures_the_merged_model(self, averaging):
        module, merge, average = Classifier(), ContinualMergeCallback(), averaging()
        fit(module, Task(0), average, merge)
        trainer = fit(module, Task(1), average, merge)
        with torch.no_grad():
            inputs, targets = Task(1).test_set.tensors
            expected = F.cross_entropy(module(inputs), targets).item()
        (measured,) = trainer.validate(module, datamodule=Task(1), verbose=False)
        assert measured["val_loss"] == pytest.approx(expected, rel=1e-5)

    def test_checkpoints_saved_after_the_fit_hold_the_merged_model(self, averaging, tmp_path):
        module, merge, average = Classifier(), ContinualMergeCallback(), averaging()
        for number in range(2):
            trainer = fit(module, Task(number), average, merge)
        trainer.save_checkpoint(tmp_path / "full.ckpt")
        for path in (tmp_path / "full.ckpt", merge.last_merged_path):
            assert same(torch.load(path, weights_only=True)["state_dict"], everything(module))


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
def test_early_stopping_shared_by_all_tasks_judges_each_by_its_own_scores(one_trainer):
    class Scored(Classifier):
        """Gets worse from the third epoch on, and each task starts worse than the one before ended."""

        task = 0

        def on_train_epoch_end(self):
            self.log("score", 10.0 * self.task - [2.0, 3.0, 1.0, 0.0][self.current_epoch])

    module, incoming, merge = Scored(), Incoming(), ContinualMergeCallback()
    stopping = EarlyStopping("score", patience=1, mode="min", check_on_train_epoch_end=True)
    trainer = make_trainer(stopping, incoming, merge, max_epochs=4)
    for number in range(3):
        module.task = number
        trainer.fit(module, datamodule=Task(number))
        assert stopping.best_score.item() == 10.0 * number - 3.0
        assert stopping.stopped_epoch == 2
        if not one_trainer:
            trainer = make_trainer(stopping, incoming, merge, max_epochs=4)
    assert incoming.steps == [9, 9, 9]
    assert len(merge.report.tasks) == 3


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
def test_a_timer_shared_by_all_tasks_gives_each_its_time(one_trainer):
    timer = Timer(duration={"microseconds": 1}, interval="epoch")
    module, incoming, merge = Classifier(), Incoming(), ContinualMergeCallback()
    trainer = make_trainer(timer, incoming, merge)
    for number in range(3):
        trainer.fit(module, datamodule=Task(number))
        if not one_trainer:
            trainer = make_trainer(timer, incoming, merge)
    assert incoming.steps == [3, 3, 3]


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
@pytest.mark.parametrize("tool", ["callback", "tuner"])
def test_looking_for_a_learning_rate_does_not_count_as_a_fit(one_trainer, tool):
    finder = [LearningRateFinder(num_training_steps=4)] if tool == "callback" else []
    module, incoming, merge = Classifier(), Incoming(), ContinualMergeCallback()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, Task(0), merge, Failing("on_train_epoch_end", RuntimeError("power cut")))
    trainer = make_trainer(*finder, incoming, merge)
    for number in range(2):
        if tool == "tuner":
            Tuner(trainer).lr_find(module, datamodule=Task(number), num_training=4)
        trainer.fit(module, datamodule=Task(number))
        if not one_trainer:
            trainer = make_trainer(*finder, incoming, merge)
    assert merge.report.tasks == ["task_1", "task_2"]
    assert incoming.steps == [6, 6]
    assert same(*incoming.starts)


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
def test_a_model_checkpoint_shared_by_all_tasks_saves_every_task(one_trainer, tmp_path):
    module, incoming, merge = Classifier(), Incoming(), ContinualMergeCallback()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    options = {"max_epochs": 1, "enable_checkpointing": True}
    trainer = make_trainer(checkpoint, incoming, merge, **options)
    for number in range(3):
        trainer.fit(module, datamodule=Task(number))
        for path in (checkpoint.best_model_path, checkpoint.last_model_path):
            content = torch.load(path, weights_only=True)
            assert same(content["state_dict"], incoming.models[number])
            assert content["callbacks"]["ContinualMergeCallback"]["started"]["task"] == f"task_{number + 1}"
        if not one_trainer:
            trainer = make_trainer(checkpoint, incoming, merge, **options)


@pytest.mark.parametrize("one_trainer", [False, True], ids=["new_trainers", "one_trainer"])
def test_a_model_checkpoint_shared_by_all_tasks_ranks_each_anew_and_keeps_every_tasks_file(one_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_last=True)
    module, merge, found = Classifier(), ContinualMergeCallback(), []
    trainer = make_trainer(merge, checkpoint, enable_checkpointing=True)
    for number in range(3):
        trainer.fit(module, datamodule=Task(number))
        found.append((checkpoint.best_model_path, checkpoint.last_model_path, checkpoint.best_model_score))
        if not one_trainer:
            trainer = make_trainer(merge, checkpoint, enable_checkpointing=True)
    paths = {path for best, last, _ in found for path in (best, last)}
    assert len(paths) == 6
    assert all(Path(path).exists() for path in paths)
    assert len({float(score) for *_, score in found}) == 3


def test_checkpoints_of_weights_only_warn_that_no_task_can_be_resumed_from_them(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="leaves the stream's state out of its files"):
        fit(Classifier(), Task(0), ContinualMergeCallback(), checkpoint, enable_checkpointing=True)


def test_without_model_checkpoints_nothing_is_said_of_their_files(caplog):
    module, merge = Classifier(), ContinualMergeCallback()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        for number in range(2):
            fit(module, Task(number), merge)
    assert merge.last_merged_path in caplog.text
    assert "ModelCheckpoint" not in caplog.text


def test_model_checkpoints_files_hold_the_unmerged_model_and_the_users_are_told(tmp_path, caplog):
    module, incoming, merge = Classifier(), Incoming(), ContinualMergeCallback()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        for number in range(2):
            checkpoint = ModelCheckpoint(tmp_path / str(number), save_last=True)
            fit(module, Task(number), incoming, merge, checkpoint, enable_checkpointing=True)
    held = torch.load(tmp_path / "1" / "last.ckpt", weights_only=True)["state_dict"]
    assert same(held, incoming.models[1])
    assert not same(held, everything(module))
    assert "ModelCheckpoint's files hold unmerged ones" in caplog.text
    assert merge.last_merged_path in caplog.text


@pytest.mark.parametrize("bar", ["rich", "tqdm"])
def test_progress_bars_and_summaries_do_not_get_in_the_way(bar):
    shown = RichProgressBar() if bar == "rich" else TQDMProgressBar()
    module, merge = Classifier(), ContinualMergeCallback()
    for number in range(2):
        fit(module, Task(number), shown, merge, enable_progress_bar=True, enable_model_summary=True)
    assert len(merge.report.tasks) == 2
