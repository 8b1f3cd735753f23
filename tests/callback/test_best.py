"""The best epoch of a training, as ModelCheckpoint ranks them, merged instead of its last step."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Classifier, Task, everything, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.report import StreamReport

pytestmark = pytest.mark.usefixtures("small_stream")


class Ranked(Classifier):
    """Logs a score that is highest in the second of four epochs."""

    def validation_step(self, batch, batch_idx):
        self.log("score", -abs(self.current_epoch - 1.0))


def best_of(directory, **settings):
    return ModelCheckpoint(directory, monitor="score", mode="max", **settings)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("one_trainer", [False, True])
def test_the_best_epoch_is_merged_and_reported(tmp_path, weights_only, one_trainer, recwarn):
    module, merge = Ranked(batch_norm=True), ContinualMergeCallback("average", merge_weights="best")
    ranking = best_of(tmp_path, save_weights_only=weights_only)
    trainer = make_trainer(
        merge, ranking, EarlyStopping("score", mode="max", patience=2), max_epochs=4, enable_checkpointing=True
    )
    for number in range(2):
        trainer.fit(module, datamodule=Task(number))
        if not one_trainer:
            trainer = make_trainer(merge, ranking, max_epochs=4, enable_checkpointing=True)
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in sorted(tmp_path.glob("*.ckpt"))]
    assert [record.epoch for record in merge.report.merges] == [1, 1]
    first, second = (saved[0], saved[1])
    for name, merged in weights(module).items():
        torch.testing.assert_close(merged, (first[name] + second[name]) / 2)
    assert StreamReport.from_dict(merge.report.as_dict()).merges[0].epoch == 1


def test_by_default_the_last_step_is_merged_and_a_line_says_what_was_better(tmp_path, caplog):
    module, merge = Ranked(), ContinualMergeCallback("average")
    with caplog.at_level(logging.INFO):
        fit(module, Task(0), merge, ranking := best_of(tmp_path), max_epochs=4, enable_checkpointing=True)
    assert "last step are merged, score -2; merge_weights='best' would merge those with" in caplog.text
    best = torch.load(ranking.best_model_path, weights_only=True)["state_dict"]
    assert not same(best, everything(module))
    assert merge.report.merges[0].epoch is None


@pytest.mark.parametrize("monitors", [[], [None], ["score", "val_loss"]])
def test_without_one_ranking_of_epochs_it_is_refused_before_training(tmp_path, monitors):
    module = Ranked()
    before = weights(module)
    others = [ModelCheckpoint(tmp_path / str(k), monitor=monitor) for k, monitor in enumerate(monitors)]
    with pytest.raises(MisconfigurationException, match=r"there are \d of them with a monitor"):
        fit(module, Task(0), ContinualMergeCallback(merge_weights="best"), *others, enable_checkpointing=bool(others))
    assert same(before, weights(module))


def test_a_training_of_which_no_epoch_was_ranked_is_merged_as_it_ended(tmp_path):
    class Silent(Task):
        val_dataloader = None

    module, merge = Classifier(), ContinualMergeCallback("average", merge_weights="best")
    ranking = ModelCheckpoint(tmp_path, monitor="loss", every_n_epochs=5)
    with pytest.warns(UserWarning, match="has saved no epoch of this training"):
        fit(module, Task(0), merge, ranking, enable_checkpointing=True)
    assert merge.report.merges[0].epoch is None


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="merge_weights is one of last, best, got 'first'"):
        ContinualMergeCallback(merge_weights="first")
