import copy
import gc
import math
import multiprocessing
import os
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.deepspeed import _DEEPSPEED_AVAILABLE
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Classifier, Task, everything, fit, make_trainer, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.callback.guards import (
    FreshStart,
    check_no_spawning,
    check_trainer,
    finish_averages,
    release_averages,
)

pytestmark = pytest.mark.usefixtures("small_stream")


def test_a_plain_trainer_passes(recwarn):
    merge = ContinualMergeCallback()
    check_trainer(make_trainer(merge, ModelCheckpoint(), enable_checkpointing=True), merge)
    assert not [warning for warning in recwarn if "ModelCheckpoint" in str(warning.message)]


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_copy_the_process_are_refused(name):
    merge = ContinualMergeCallback()
    trainer = make_trainer(merge, strategy=name, devices=2)
    with pytest.raises(MisconfigurationException, match="spawn or fork.*Use strategy='ddp'"):
        check_trainer(trainer, merge)


class Guarded:
    def __getstate__(self):
        check_no_spawning()
        return {}


def test_an_object_can_be_pickled_but_not_for_a_spawned_process():
    assert copy.deepcopy(Guarded())
    process = multiprocessing.get_context("spawn").Process(target=print, args=(Guarded(),))
    with pytest.raises(MisconfigurationException, match="spawn or fork.*Use strategy='ddp'"):
        process.start()


def test_ddp_in_subprocesses_passes():
    merge = ContinualMergeCallback()
    check_trainer(make_trainer(merge, strategy="ddp", devices=2), merge)


SHARDING = [
    pytest.param(FSDPStrategy, "FSDPStrategy shards.*ModelParallelStrategy.*callback, and merge.*lightning-odem merge"),
    pytest.param(
        DeepSpeedStrategy,
        r"DeepSpeedStrategy shards.*ModelParallelStrategy.*callback, convert each .*convert_zero_checkpoint_to_fp32_.*"
        r"lightning-odem merge",
        marks=pytest.mark.skipif(not _DEEPSPEED_AVAILABLE, reason="DeepSpeed is not installed"),
    ),
]


@pytest.mark.parametrize(("strategy", "message"), SHARDING)
def test_strategies_that_shard_parameters_are_refused(strategy, message):
    # Lightning lets them run on GPUs only.
    class OnCPU(strategy):
        def setup_environment(self):
            self.accelerator.setup_device(self.root_device)

    OnCPU.__name__ = strategy.__name__
    merge = ContinualMergeCallback()
    # Lightning's launcher would leave the number of the process and more in the environment.
    with patch.dict(os.environ), pytest.raises(MisconfigurationException, match=message):
        fit(Classifier(), Task(0), merge, strategy=OnCPU())


AVERAGING = [
    lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1),
    WeightAveraging,
    lambda: EMAWeightAveraging(decay=0.5),
]


@pytest.mark.parametrize("averaging", AVERAGING)
def test_averaging_is_refused_behind_the_merge_only(averaging):
    merge, average = ContinualMergeCallback(), averaging()
    check_trainer(make_trainer(average, merge), merge)
    name = type(average).__name__
    with pytest.raises(MisconfigurationException, match=rf"callbacks=\[{name}\(...\), ContinualMergeCallback\(...\)\]"):
        check_trainer(make_trainer(merge, average), merge)


def test_checkpoints_without_the_streams_state_warn():
    merge = ContinualMergeCallback()
    trainer = make_trainer(merge, ModelCheckpoint(save_weights_only=True), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="Set save_weights_only=False"):
        check_trainer(trainer, merge)


# ------------------------------------------------------------------------------------------------------- a fresh start


def trained(*callbacks, **options):
    """A Trainer that has fitted one task without any merge callback."""
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(Classifier(), datamodule=Task(0))
    return trainer


class Prepare(L.Callback):
    """Prepares every fit, and notes where it starts and ends."""

    def __init__(self):
        self.fresh, self.starts, self.ends = FreshStart(), [], []

    def setup(self, trainer, pl_module, stage):
        self.fresh.prepare(trainer)

    def on_train_start(self, trainer, pl_module):
        self.starts.append((trainer.current_epoch, trainer.global_step, trainer.estimated_stepping_batches))

    def on_train_end(self, trainer, pl_module):
        self.ends.append((trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize(("options", "steps"), [({"max_epochs": 2}, 6), ({"max_steps": 4}, 4)])
def test_a_trainer_seen_before_counts_from_zero_again(options, steps):
    prepare = Prepare()
    trainer = make_trainer(prepare, **options)
    for number in range(3):
        trainer.fit(Classifier(), datamodule=Task(number))
    assert prepare.starts == [(0, 0, steps)] * 3
    assert prepare.ends == [(2, steps)] * 3


def test_testing_from_a_checkpoint_does_not_count_as_resuming(tmp_path):
    prepare = Prepare()
    trainer = make_trainer(prepare)
    trainer.fit(Classifier(), datamodule=Task(0))
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    trainer.test(Classifier(), datamodule=Task(0), ckpt_path=tmp_path / "file.ckpt", verbose=False)
    trainer.fit(Classifier(), datamodule=Task(0))
    assert prepare.ends == [(2, 6)] * 2


def test_limits_raised_by_hand_are_left_to_lightning():
    fresh, trainer = FreshStart(), make_trainer()
    fresh.prepare(trainer)
    trainer.fit(Classifier(), datamodule=Task(0))
    trainer.fit_loop.max_epochs = 5
    fresh.prepare(trainer)
    assert trainer.current_epoch == 2


def test_a_trainer_seen_for_the_first_time_keeps_its_counters():
    trainer = trained()
    FreshStart().prepare(trainer)
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)


def test_what_callbacks_remember_of_a_fit_is_forgotten():
    stopping, checkpoint = EarlyStopping("val_loss", patience=1), ModelCheckpoint("saved")
    swa, average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1), WeightAveraging()
    fresh = FreshStart()
    fresh.prepare(make_trainer(stopping, checkpoint, swa, average, enable_checkpointing=True))
    trainer = trained(stopping, checkpoint, swa, enable_checkpointing=True)
    trained(average)
    assert math.isfinite(stopping.best_score)
    assert swa.n_averaged == 2
    assert average._latest_update_step == checkpoint._last_global_step_saved == 6
    path = checkpoint.best_model_path
    trainer.callbacks.append(average)
    fresh.prepare(trainer)
    assert math.isinf(stopping.best_score)
    assert (stopping.wait_count, stopping.stopped_epoch) == (0, 0)
    assert (swa.n_averaged, swa._initialized, swa._latest_update_epoch) == (None, False, -1)
    assert average._latest_update_step == checkpoint._last_global_step_saved == 0
    assert (checkpoint.best_model_path, checkpoint.best_k_models, checkpoint.last_model_path) == ("", {}, "")
    assert Path(path).exists()


def test_settings_of_callbacks_stay_as_the_user_changes_them():
    stopping, fresh = EarlyStopping("val_loss", patience=1), FreshStart()
    trainer = make_trainer(stopping)
    fresh.prepare(trainer)
    stopping.patience = 9
    fresh.prepare(trainer)
    assert stopping.patience == 9


def test_a_model_checkpoint_ranks_the_epochs_of_the_next_task_by_themselves(recwarn):
    monitoring = ModelCheckpoint("b", monitor="val_loss")
    fresh, trainer = FreshStart(), make_trainer(monitoring, enable_checkpointing=True)
    fresh.prepare(trainer)
    trainer.fit(Classifier(), datamodule=Task(0))
    path = monitoring.best_model_path
    recwarn.clear()
    fresh.prepare(trainer)
    assert not recwarn
    assert (monitoring.best_model_score, monitoring.current_score, monitoring.best_k_models) == (None, None, {})
    trainer.fit(Classifier(), datamodule=Task(1))
    assert monitoring.best_model_path != path
    assert Path(path).exists()


def test_trainers_and_callbacks_are_not_kept_alive():
    fresh, trainer = FreshStart(), make_trainer(EarlyStopping("loss"))
    fresh.prepare(trainer)
    assert len(fresh._limits) == len(fresh._memories) == 1
    del trainer
    gc.collect()
    assert len(fresh._limits) == len(fresh._memories) == 0


# ------------------------------------------------------------------------------------------------------------ averages


def test_released_averages_do_not_come_back_in_a_validation():
    average, module = EMAWeightAveraging(decay=0.9), Classifier()
    trainer = make_trainer(average)
    trainer.fit(module, datamodule=Task(0))
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.zero_()
    release_averages(trainer)
    (measured,) = trainer.validate(module, datamodule=Task(0), verbose=False)
    assert measured["val_loss"] == pytest.approx(math.log(3))


@pytest.mark.parametrize("averaging", AVERAGING)
def test_finished_averages_are_put_into_the_module(averaging):
    average, module = averaging(), Classifier()
    trainer = make_trainer(average)
    trainer.fit(module, datamodule=Task(0))
    expected = everything(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    finish_averages(trainer, module)
    assert same(everything(module), expected)
