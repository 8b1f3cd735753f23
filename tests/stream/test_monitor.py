"""A value that the module logs in its own validation, as the score of each task."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torchmetrics.classification import MulticlassF1Score
from toy import Classifier, Task, everything, fit, same

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


class Logging(Classifier):
    """Logs a torchmetrics metric and a loss; its ``forward`` alone would have no accuracy."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.f1 = MulticlassF1Score(3)
        self.epochs = 0

    def validation_step(self, batch, batch_idx):
        assert not self.training
        assert self.trainer.validating or self.trainer.state.fn == "fit"
        scores = self(batch[0])
        self.f1.update(scores, batch[1])
        self.log("val/f1", self.f1)
        self.log("val/loss", F.cross_entropy(scores, batch[1]))

    def on_validation_epoch_end(self):
        self.epochs += 1

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] + 1.0, batch[1]) if self.trainer.training else batch


def stream(module, **settings):
    merge = ContinualMergeCallback("average", **settings)
    for number in range(3):
        trainer = fit(module, Task(number), merge)
    return merge, trainer


def by_hand(module, number):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    return trainer.validate(module, Task(number), verbose=False)[0]


@pytest.mark.parametrize(("name", "mode"), [("val/f1", "max"), ("val/loss", "min")])
def test_the_score_of_each_task_is_what_the_trainers_validation_logs(name, mode):
    module = Logging()
    merge, _ = stream(module, monitor=name, mode=mode)
    assert merge.report.accuracy[2] == pytest.approx([by_hand(module, number)[name] for number in range(3)], abs=1e-6)
    metric = merge.report.metric()
    assert (metric.name, metric.unit, metric.higher_is_better) == (name, "", mode == "max")
    assert merge.table().startswith(name)
    other = {"val/f1": "val/loss", "val/loss": "val/f1"}[name]
    assert merge.report.merges[2].further["task_1"].keys() == {other}


def test_each_task_is_measured_with_its_own_head():
    module = Logging()
    merge, _ = stream(module, monitor="val/f1", exclude=["head"])
    for number in range(3):
        merge.load_task(module, f"task_{number + 1}")
        assert by_hand(module, number)["val/f1"] == pytest.approx(merge.report.accuracy[2][number], abs=1e-6)


def test_the_training_is_that_without_measuring():
    first, second = Logging(batch_norm=True, dropout=0.3), Logging(batch_norm=True, dropout=0.3)
    L.seed_everything(0)
    stream(first, monitor="val/f1")
    L.seed_everything(0)
    stream(second, evaluate=False)
    assert same(everything(first), everything(second))
    assert first.epochs == second.epochs == 6  # Python attributes are as they were


def test_nothing_of_it_reaches_loggers_or_the_trainers_metrics(tmp_path):
    module, merge = Logging(), ContinualMergeCallback("average", monitor="val/f1")
    logger = CSVLogger(tmp_path)
    trainer = fit(module, Task(0), merge, logger=logger)
    in_fit = float(trainer.callback_metrics["val/f1"])
    assert merge.report.accuracy[0][0] == pytest.approx(in_fit)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/f1")
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == 2  # one per epoch


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_it_gets_on_with_the_trainers_progress_bar(bar):
    module, merge = Logging(), ContinualMergeCallback("average", monitor="val/f1")
    for number in range(2):
        fit(module, Task(number), merge, bar(), enable_progress_bar=True)
    assert len(merge.report.tasks) == 2


def test_the_limit_of_validation_batches_applies():
    class Few(Task):
        def val_dataloader(self):
            return torch.utils.data.DataLoader(self.test_set, batch_size=4)

    module, merge = Logging(), ContinualMergeCallback("average", monitor="val/f1")
    trainer = fit(module, Few(0), merge, limit_val_batches=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=1)
    expected = trainer.validate(module, Few(0), verbose=False)[0]["val/f1"]
    assert merge.report.accuracy[0] == pytest.approx([expected])


@pytest.mark.parametrize(
    ("module", "message"),
    [(Logging(), "monitor='val_f1' was not logged .*; logged were: val/f1, val/loss"), (Classifier(), "val_loss")],
)
def test_a_value_that_is_not_logged_is_refused_before_training(module, message):
    before = everything(module)
    with pytest.raises(ValueError, match=message):
        fit(module, Task(0), ContinualMergeCallback("average", monitor="val_f1"))
    assert same(before, everything(module))


def test_a_module_without_validation_step_is_refused_before_training():
    class Plain(Classifier):
        validation_step = L.LightningModule.validation_step

    with pytest.raises(ValueError, match="monitor='val/f1' is what validation_step logs, and Plain has none"):
        fit(Plain(), Task(0), ContinualMergeCallback("average", monitor="val/f1"))


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode is one of max, min, got 'up'"):
        ContinualMergeCallback(monitor="val/f1", mode="up")


def test_a_metric_over_the_whole_validation_is_not_disturbed():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compute.*before the.*update")
        stream(Logging(), monitor="val/f1")
